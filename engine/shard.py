"""`initialize`: the wiring of one engine, in the order in which it happens."""

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn

from .activations import ActivationOffload
from .blocks import ModelParts, find_parts
from .budgets import Machine, check_budgets, plan_storage, ring_itemsizes
from .chunk import Chunk
from .chunk_group import ChunkGroup
from .collectives import RankGroup, make_rank_group
from .config import EngineConfig, Precision, StatePrecision, check_folder
from .device_updates import DeviceUpdates
from .engine_lanes import Lanes, make_lanes
from .gradients import GradientTraffic
from .hooks import register_hooks
from .host_updates import HostUpdates
from .lanes import MakeLane, make_lane, on_worker
from .layout import Layout, ParamSpec, pack
from .loader import Loader, WeightLoader
from .machine import make_meter, read_machine
from .manager import Manager, Meter
from .migration import Migration
from .nvme import NvmeStore
from .optimizer import ZeroOptimizer, read_adam_groups
from .placement import STORE_RING_BYTES, WEIGHT_STAGING_BYTES, StoragePlan
from .pretrained import PretrainedFolder
from .rates import UpdateRates, agreed_update_rates
from .schedule import Schedule
from .staging import Staging
from .streaming import UpdateStream
from .tiers import BufferPool, Ledger, Payload, Storage, Tier
from .updaters import Updaters

_ENGINE_ATTRIBUTE = "_megalith_engine"
_gathered_count = itertools.count()


@dataclass
class Engine:
    """Everything that one call of `initialize` made. Reached through the model, by the functions below and in
    `checkpoint`."""

    model: nn.Module
    optimizer: ZeroOptimizer | None
    config: EngineConfig
    layout: Layout
    groups: list[ChunkGroup]
    schedule: Schedule
    rank_group: RankGroup
    ledger: Ledger
    migration: Migration | None
    """Where placement="auto" has put something off the device, and there is something to train."""

    def __deepcopy__(self, memo: dict) -> "Engine":
        raise RuntimeError("a model that is sharded cannot be copied: copy it before initialize()")

    @property
    def compute_dtype(self) -> torch.dtype:
        return Precision(self.config.precision).dtype

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for group in self.groups for chunk in group.chunks]


def engine_of(model: nn.Module) -> Engine:
    """Raises ValueError when `initialize` did not return this model."""
    engine = model.__dict__.get(_ENGINE_ATTRIBUTE)
    if engine is None:
        raise ValueError(f"this {type(model).__name__} is not one that megalith.engine.initialize returned")
    return engine


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    pretrained: str | os.PathLike | None = None,
    allow_missing: Collection[str] = (),
    stored_name: Callable[[str], str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    lane_delay: Callable[[], float] | None = None,
    manager: Manager | None = None,
    rates: UpdateRates | None = None,
    **options: Any,
) -> tuple[nn.Module, ZeroOptimizer | None]:
    """Store `model` in chunks, shard them over the ranks and place them on tiers.

    The rest of a training loop stays as it was: forward, `loss.backward()` (in fp16 `optimizer.backward(loss)`),
    `step()`, `zero_grad()`. Gradients are averaged over the ranks; `parameter.grad` is always None, since they live in
    chunks.

    Args:
        model: any module, on cpu, cuda or meta. The same object is returned, its parameters' names unchanged.
        optimizer: a torch.optim.Adam or AdamW over its trainable parameters, or None when all are frozen. What is
        returned
            shares its param_groups.
        pretrained: a folder of safetensors in Hugging Face layout, streamed into the chunks.
        allow_missing: patterns (`"score.*"`) of parameters that the folder may lack. They keep the values they have,
            rank 0's; on meta, they are initialised by the model's own rules.
        stored_name: what a parameter of the model is called in the folder, where layers were wrapped since.
        process_group: the ranks that share the model; by default all.
        device: where to compute; by default the current CUDA device, or the CPU where there is none.
        lane_delay: for tests on a CPU: seconds to sleep before each piece of work on a lane.
        manager: shares its budgets with the other engines that it is given to.
        rates: what `measure_rates` returned. By them each chunk whose state is on the host is updated there, or by the
            device. Where it is not given, a GPU and its host are measured for about a second.
        options: the fields of `EngineConfig`.

    A model on meta without `pretrained` is initialised by its own rules, the same at every world size. Otherwise the
    weights of rank 0 count.

    Raises ValueError, TypeError, FileNotFoundError or NotImplementedError that name the argument; OutOfBudgetError when
    the budgets do not hold what is stored; NvmeError when the drive does not.
    """
    device = _compute_device(device)
    timeout_s = options.get("timeout_s", EngineConfig.timeout_s)
    rank_group = make_rank_group(process_group, device, timeout_s if isinstance(timeout_s, int | float) else 60)
    manager = manager or Manager()
    manager.send_all_home()
    machine = read_machine(device, rank_group)
    rates = agreed_update_rates(rates, device, None if optimizer is None else _valid(options), rank_group)
    machine = replace(machine, working_bytes=manager.working_bytes, rates=rates)
    prepared, error = None, None

    def open_folder() -> PretrainedFolder | None:
        if pretrained is None:
            return None
        path = check_folder(pretrained, "pretrained")
        return PretrainedFolder(path, model, allow_missing=allow_missing, stored_name=stored_name)

    try:
        prepared = prepare(model, optimizer, open_folder, options, rank_group, machine, manager)
    except Exception as caught:
        error = caught
    rank_group.barrier(error)
    config, folder, parts, storage_plan = prepared
    _check_same_model(model, folder, storage_plan.layout, config, rank_group)
    store = _open_store(storage_plan, config, rank_group, lane_delay)
    ground = Ground(
        device,
        rank_group,
        Ledger(manager.ledger),
        store,
        machine.device_room,
        partial(make_lane, device=device, delay=lane_delay),
        make_meter(device) if options.get("device_budget") is None and manager.budgets[Tier.DEVICE] is None else None,
        rates,
    )
    loader = WeightLoader(model, folder, config, rank_group, device)
    engine = assemble(model, optimizer, config, parts, storage_plan, ground, loader, manager)
    return model, engine.optimizer


@dataclass(frozen=True)
class Ground:
    """What an engine stands on: memory, ranks, drive and lanes. A rehearsal has one of its own, on which nothing is
    stored or moved."""

    device: torch.device
    rank_group: RankGroup
    ledger: Ledger
    store: NvmeStore | None
    device_room: int
    """Bytes to assume where `device_budget` is None."""
    make_lane: MakeLane
    meter: Meter | None = None
    """Tells what the device has room for, where no budget does."""
    rates: UpdateRates | None = None
    """By which it is decided where Adam of the state on the host runs."""


def assemble(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: EngineConfig,
    parts: ModelParts,
    storage_plan: StoragePlan,
    ground: Ground,
    loader: Loader,
    manager: Manager,
) -> Engine:
    """Store, shard and hook up a model, as planned."""
    layout, placements = storage_plan.layout, storage_plan.placements
    device, rank_group, ledger = ground.device, ground.rank_group, ground.ledger
    storage = Storage(device, ledger, ground.store)
    storage.reserve_host(storage_plan.slab_bytes)
    if storage_plan.uses_disk:
        ledger.add(Tier.HOST, Payload.STAGING, storage_plan.staging_bytes)
    lanes = make_lanes(ground.make_lane, storage_plan, rank_group, config)
    staging_bytes = WEIGHT_STAGING_BYTES if storage_plan.uses_disk else 0
    traffic = GradientTraffic(
        rank_group, lanes.transfers, BufferPool(storage, Payload.GRADIENT), ledger, Staging(device, staging_bytes)
    )
    weight_staging = Staging(device, staging_bytes)

    groups: list[ChunkGroup] = []
    chunk_index = 0
    for group_index, group_spec in enumerate(layout.groups):
        chunks = []
        for spec in group_spec.chunks:
            name = f"{group_spec.name}[{len(chunks)}]"
            chunks.append(Chunk(name, chunk_index, spec, placements[chunk_index], storage))
            chunk_index += 1
        loader.load(chunks)
        for chunk in chunks:
            if chunk.placement.sharded:
                chunk.free_full()
        groups.append(
            ChunkGroup(
                group_spec.name, group_index, chunks, rank_group, lanes.transfers, lanes.copies, weight_staging, traffic
            )
        )
    loader.load_buffers()

    schedule = Schedule(groups, layout, config, traffic, ground.device_room, manager)
    register_hooks(model, parts, groups, schedule, config)
    if config.offload_activations:
        chunks = [chunk for group in groups for chunk in group.chunks]
        schedule.activations = ActivationOffload(chunks, device, lanes.activations, ledger, config.prefetch)
        schedule.activations.register(model, parts.block_modules)
    zero_optimizer = migration = None
    if optimizer is not None:
        if config.placement == "auto" and not all(p.is_on_device(s) for _, s, p in storage_plan.named_chunks()):
            migration = Migration(groups, schedule, rank_group, config, manager, ground.meter)
            if ground.meter is not None and not rank_group.is_distributed:
                schedule.on_forward = migration.expect
        updaters = _make_updaters(storage_plan, config, lanes, storage, ground.rates)
        zero_optimizer = ZeroOptimizer(optimizer, groups, schedule, rank_group, config, model, updaters, migration)
    engine = Engine(model, zero_optimizer, config, layout, groups, schedule, rank_group, ledger, migration)
    for module in model.modules():
        module.__dict__[_ENGINE_ATTRIBUTE] = engine
    weakref.finalize(model, _close, lanes, ground.store, ledger)
    return engine


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Full weights of every parameter on every rank, for reading or generating. A collective. Writing to them has no
    effect on what is at rest."""
    schedule = engine_of(model).schedule
    schedule.recover()
    token = f"gathered() number {next(_gathered_count)}"
    schedule.hold(schedule.groups, token)
    try:
        yield model
    finally:
        schedule.release(schedule.groups, token)


def can_gather(model: nn.Module) -> bool:
    """Whether `gathered` stays within the device's budget, beside what is at rest there; True without a budget. Of this
    rank alone."""
    return engine_of(model).schedule.has_room_for_all()


def is_gathered(model: nn.Module) -> bool:
    """Whether a `gathered` context holds all weights, which then stay where they are until it ends."""
    return all(group.is_held for group in engine_of(model).groups)


def memory_report(model: nn.Module) -> dict[str, dict[str, dict[str, int]]]:
    """{tier: {payload: {"bytes", "peak_bytes"}}} on this rank, with each tier's "total"."""
    return engine_of(model).ledger.report()


# The steps of initialize


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    open_folder: Callable[[], PretrainedFolder | None],
    options: dict[str, Any],
    rank_group: RankGroup,
    machine: Machine,
    manager: Manager,
) -> tuple[EngineConfig, PretrainedFolder | None, ModelParts, StoragePlan]:
    """All that can be wrong without anything having been allocated."""
    config = within(manager, EngineConfig.from_keywords(**options))
    for name, module in model.named_modules():
        if _ENGINE_ATTRIBUTE in module.__dict__:
            raise ValueError(
                f"{name or 'this model'} was given to initialize() before, alone or as a part of another model"
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ValueError(
                f"{name}: an nn.Embedding with max_norm writes its weight in forward, which is not supported"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ValueError(
                f"{name} is {parameter.dtype} and requires gradients: only real floating-point ones are trained"
            )
    folder = open_folder()
    group_of = optimizer_groups(model, optimizer)
    parts = find_parts(model, config.max_chunk_numel)
    if config.offload_activations and not parts.block_modules:
        raise ValueError(
            "offload_activations=True, and the model has no blocks: it has neither _no_split_modules nor an "
            "nn.ModuleList of modules"
        )
    layout = pack(
        layout_specs(model, parts, group_of, config),
        rank_group.world_size,
        config.max_chunk_numel,
        StatePrecision(config.state_precision).slot_multiple,
    )
    storage_plan = plan_storage(layout, config, rank_group, machine)
    if config.placement == "auto" and config.device_budget is None:
        config = replace(config, device_budget=machine.device_room)
    check_budgets(storage_plan, config)
    return config, folder, parts, storage_plan


def _valid(options: dict[str, Any]) -> EngineConfig | None:
    """None for what `prepare` raises."""
    try:
        return EngineConfig.from_keywords(**options)
    except (TypeError, ValueError):
        return None


def _compute_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be 'cpu' or 'cuda'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda': this machine has no CUDA device")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def optimizer_groups(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[nn.Parameter, int]:
    """The optimizer group of each parameter. Raises ValueError for trainable parameters that no group has, and the
    reverse."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in names if parameter.requires_grad]
    if optimizer is None:
        if trainable:
            raise ValueError(
                f"optimizer=None, but {len(trainable)} parameters require gradients, such as {names[trainable[0]]}: "
                "give an optimizer, or call model.requires_grad_(False)"
            )
        return {}
    read_adam_groups(optimizer)
    result = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"optimizer group {index} has a parameter of shape {list(parameter.shape)} not in model"
                )
            result[parameter] = index
    missing = [names[parameter] for parameter in trainable if parameter not in result]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters require gradients but are in no optimizer group, such as {missing[0]}: "
            "add them, or call requires_grad_(False) on them"
        )
    return result


def layout_specs(
    model: nn.Module, parts: ModelParts, group_of: dict[nn.Parameter, int], config: EngineConfig
) -> list[tuple[str, list[ParamSpec]]]:
    compute_dtype = Precision(config.precision).dtype

    def spec(fqn: str) -> ParamSpec:
        parameter = model.get_parameter(fqn)
        dtype = compute_dtype if parameter.is_floating_point() else parameter.dtype
        trainable = parameter.requires_grad
        return ParamSpec(fqn, tuple(parameter.shape), dtype, trainable, group_of[parameter] if trainable else -1)

    return [(name, [spec(fqn) for fqn in fqns]) for name, fqns in parts.blocks]


def _check_same_model(
    model: nn.Module, folder: PretrainedFolder | None, layout: Layout, config: EngineConfig, rank_group: RankGroup
) -> None:
    on_meta = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    digests = rank_group.gather_objects(
        {
            "parameters": crc32(repr(layout).encode()),
            "options": asdict(config) | {"nvme_dir": None},  # ranks may have drives of their own
            "whether pretrained is given": folder is not None,
            "which parameters are on meta": crc32(repr(on_meta).encode()),
        }
    )
    for rank, digest in enumerate(digests):
        different = [what for what, value in digest.items() if value != digests[0][what]]
        if different:
            raise ValueError(f"rank {rank} and rank 0 called initialize() with different {' and '.join(different)}")


def within(manager: Manager, config: EngineConfig) -> EngineConfig:
    """With the budgets that the manager's other engines have left. Raises ValueError where the engine has its own."""
    for field, tier in (("device_budget", Tier.DEVICE), ("host_budget", Tier.HOST)):
        left = manager.left(tier)
        if left is not None and getattr(config, field) is not None:
            raise ValueError(f"{field}={getattr(config, field)!r}: the manager has one: leave it out here")
        if left is not None:
            config = replace(config, **{field: left})
    return config


def _open_store(
    storage_plan: StoragePlan, config: EngineConfig, rank_group: RankGroup, lane_delay: Callable[[], float] | None
) -> NvmeStore | None:
    """Raises on every rank where any has not got the space."""
    store, error = None, None
    if storage_plan.uses_disk:
        try:
            store = NvmeStore(
                config.nvme_dir,
                rank_group.rank,
                storage_plan.disk_sizes(),
                checksums=config.nvme_checksums,
                ring_bytes=STORE_RING_BYTES,
                lane_delay=lane_delay,
                timeout_s=config.timeout_s,
                tell=rank_group.tell,
            )
        except Exception as caught:
            error = caught
    try:
        rank_group.barrier(error)
    except BaseException:
        if store is not None:
            store.close()
        raise
    return store


def _make_updaters(
    plan: StoragePlan, config: EngineConfig, lanes: Lanes, storage: Storage, rates: UpdateRates | None
) -> Updaters:
    stream = by_host = by_device = None
    if plan.uses_disk:
        itemsizes = ring_itemsizes(config, storage.device.type == "cuda")
        stream = UpdateStream(plan.piece_numel, itemsizes, storage.device, weights_at_hand=config.update_in_backward)
    if plan.device_ring.nbytes:
        by_device = DeviceUpdates(plan.device_ring, storage, lanes.states_in, lanes.states_out)
    if plan.host_ring.nbytes:
        by_host = HostUpdates(plan.host_ring, storage)
    return Updaters(lanes.updates, stream, by_host, lanes.device_updates, by_device, rates)


def _close(lanes: Lanes, store: NvmeStore | None, ledger: Ledger) -> None:
    if on_worker():  # where the garbage collector came by in the middle of a transfer, whose locks the thread holds
        threading.Thread(target=_close, args=(lanes, store, ledger), name="closing of an engine").start()
        return
    lanes.close()
    if store is not None:
        store.close()
    ledger.clear()
