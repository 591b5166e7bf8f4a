"""A step on meta: the run's own hooks, chunks, lanes and step, with no storage under them, and simulated clocks.

The engine is assembled as for a run, on a `Ground` where tensors are on meta, collectives and the drive do nothing, and
a lane's work is done at once by the caller. So the ledger records what a run would store and move. Time is simulated:
every lane, the drive, and the model's computation have a clock. What they do moves their own clock on; a wait moves it
to the end of what is waited for. Since work is submitted in the order of the program, and a lane does it in order,
that is all that a schedule is.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .budgets import Machine
from .chunk import Chunk
from .collectives import RankGroup
from .lanes import InlineLane, Lane
from .loader import bind
from .manager import Manager
from .migration import Promotion
from .peer_memory import can_read_own
from .rates import Rates
from .shard import Engine, Ground, assemble, prepare
from .tiers import Ledger, Payload, Tier, Work
from .trace import AccessTrace

COMPUTE = "compute"
DISK = "disk"
STEPS = 3
"""Rehearsed: the first has no trace of the order of use, the second no update of a step before the one before it, and
after it spare memory is used (`migration`)."""


@dataclass(frozen=True)
class Moment:
    """From one use of weights to the next."""

    name: str
    """What used them, such as "backward model.layers.3"; or a part of the step."""
    start_s: float
    stored_bytes: int
    """On the device, at most, by the engine."""
    activation_bytes: int
    """On the device, at most, by everything else."""


@dataclass(frozen=True)
class Forecast:
    """Of one step, the third, on one rank, and of the peaks until then."""

    memory: dict[str, dict[str, dict[str, int]]]
    """As `memory_report` has it."""
    activation_peak_bytes: int
    device_peak_bytes: int
    """Of what the engine stores and everything else together."""
    work: dict[Work, int]
    flops: int
    step_s: float | None
    """None without rates, as are the other times."""
    busy_s: dict[str, float]
    """By lane, COMPUTE and DISK."""
    moments: list[Moment]
    promotion: Promotion | None = None
    """What spare device memory was used for after the second step, with placement="auto"."""

    @property
    def bound(self) -> str | None:
        """What the step's time is mostly made of."""
        return max(self.busy_s, key=self.busy_s.get) if self.busy_s else None

    @property
    def written_bytes_a_day(self) -> float | None:
        written = self.work.get(Work.DISK_WRITE, 0)
        return written * 86_400 / self.step_s if self.step_s else None


class Clocks:
    """The simulated time of every actor, in seconds."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.actor = COMPUTE
        """Who does what is being done."""

    def spend(self, seconds: float) -> None:
        self.now[self.actor] += seconds
        self.busy[self.actor] += seconds

    def wait_until(self, when: float) -> None:
        self.now[self.actor] = max(self.now[self.actor], when)

    @contextmanager
    def acting(self, actor: str) -> Iterator[None]:
        """What follows is done by `actor`, and begins no sooner than now."""
        caller, self.actor = self.actor, actor
        self.wait_until(self.now[caller])
        try:
            yield
        finally:
            self.actor = caller


@dataclass(frozen=True)
class SimulatedEvent:
    """Has the methods of a lane's event and of a drive's handle."""

    clocks: Clocks
    when: float

    def wait(self) -> None:
        self.clocks.wait_until(self.when)

    synchronize = settle = wait

    def done(self) -> bool:
        return self.clocks.now[self.clocks.actor] >= self.when


@dataclass(frozen=True)
class SimulatedLane:
    name: str
    clocks: Clocks

    def submit(self, work: Callable[[], None], label: str) -> SimulatedEvent:
        with self.clocks.acting(self.name):
            work()
        return SimulatedEvent(self.clocks, self.clocks.now[self.name])

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class SimulatedStore:
    """A drive that serves one transfer after the other: many at once are no faster."""

    clocks: Clocks
    ledger: Ledger

    def read(self, name: str, out: torch.Tensor, offset_bytes: int = 0, urgent: bool = False) -> SimulatedEvent:
        return self._transfer(Work.DISK_READ, out.nbytes)

    def write(self, name: str, source: torch.Tensor, offset_bytes: int = 0) -> SimulatedEvent:
        return self._transfer(Work.DISK_WRITE, source.nbytes)

    def close(self) -> None:
        return None

    def _transfer(self, work: Work, nbytes: int) -> SimulatedEvent:
        with self.clocks.acting(DISK):
            self.ledger.did(work, nbytes)
        return SimulatedEvent(self.clocks, self.clocks.now[DISK])


@dataclass(frozen=True)
class SimulatedGroup(RankGroup):
    """Ranks that all do the same."""

    @property
    def reads_peers(self) -> bool:
        return can_read_own()

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.world_size


class Observer(Ledger):
    """A ledger that follows the clocks and the activations too."""

    def __init__(self, clocks: Clocks, rates: Rates | None, of_all: Ledger, world_size: int) -> None:
        super().__init__(of_all)
        # Payloads that chunks get anew when they are promoted. On one rank, weights stay where they were gathered.
        self._promoted = (Payload.MASTER, Payload.EXP_AVG, Payload.EXP_AVG_SQ, Payload.SCALES)
        self._promoted += (Payload.WEIGHT,) if world_size > 1 else ()
        self._clocks = clocks
        self._rates = rates
        self._other_bytes = 0  # of all that is not a chunk's
        self._counted_bytes_at_rest = 0
        self._recent_activation_bytes = 0
        self.activation_peak_bytes = self.device_peak_bytes = 0
        self.moments: list[Moment] = []
        self.flops = 0

    def add(self, tier: Tier, payload: Payload, nbytes: int) -> None:
        super().add(tier, payload, nbytes)
        self._look()

    def did(self, work: Work, amount: int) -> None:
        super().did(work, amount)
        if self._rates is not None:
            self._clocks.spend(self._rates.seconds(work, amount))

    def computed(self, name: str, flops: int, moved_bytes: int) -> None:
        """The operation `name` of the model took place."""
        self.flops += flops
        rates = self._rates
        if rates is not None:
            flop_rate, byte_rate = rates.compute_flops, rates.memory_bytes
            if "attention" in name:
                flop_rate = rates.attention_flops or flop_rate
            if any(function in name for function in _FUNCTIONS):
                byte_rate = rates.function_bytes or byte_rate
            self._clocks.spend(max(flops / flop_rate, moved_bytes / byte_rate) + rates.call_s)

    def begin_steps(self) -> None:
        """What was stored before is at rest."""
        self._counted_bytes_at_rest = self._counted_bytes()

    def allocated(self, nbytes: int) -> None:
        """A tensor was made, or is gone: of activations, or of what the ledger has already."""
        self._other_bytes += nbytes
        self._look()

    def begin_moment(self, name: str) -> None:
        self.moments.append(Moment(name, self._clocks.now[COMPUTE], 0, 0))
        self._look()

    def take_recent_activations(self) -> int:
        """The most since the last call."""
        recent, self._recent_activation_bytes = self._recent_activation_bytes, self._activation_bytes()
        return recent

    def _counted_bytes(self) -> int:
        """In the ledger, of tensors that are made in steps."""
        gradients = sum(self.bytes(tier, Payload.GRADIENT) for tier in Tier)
        promoted = sum(self.bytes(Tier.DEVICE, payload) for payload in self._promoted)
        return gradients + promoted + self.bytes(Tier.HOST, Payload.ACTIVATION)  # what lies elsewhere is on meta too

    def _activation_bytes(self) -> int:
        return max(self._other_bytes - (self._counted_bytes() - self._counted_bytes_at_rest), 0)

    def _look(self) -> None:
        stored, activations = self.tier_bytes(Tier.DEVICE), self._activation_bytes()
        self._recent_activation_bytes = max(self._recent_activation_bytes, activations)
        self.activation_peak_bytes = max(self.activation_peak_bytes, activations)
        self.device_peak_bytes = max(self.device_peak_bytes, stored + activations)
        if self.moments:
            last = self.moments[-1]
            if stored > last.stored_bytes or activations > last.activation_bytes:
                self.moments[-1] = replace(
                    last,
                    stored_bytes=max(stored, last.stored_bytes),
                    activation_bytes=max(activations, last.activation_bytes),
                )


@dataclass(frozen=True)
class ObservedMeter:
    """A GPU's memory in a rehearsal, where nothing is fragmented."""

    ledger: Observer
    gpu_bytes: int

    def take_other_bytes(self, stored_bytes: int) -> int:
        return self.ledger.take_recent_activations()

    def room_bytes(self) -> int:
        return self.gpu_bytes

    def take_overshoot(self) -> int:
        return max(self.ledger.device_peak_bytes - self.gpu_bytes, 0)


class ObservedTrace(AccessTrace):
    """Tells of every use of weights."""

    def __init__(self, ledger: Observer, names: list[str]) -> None:
        super().__init__()
        self._ledger = ledger
        self._names = names

    def visit(self, use: tuple[str, int, int]) -> None:
        phase, _, group = use
        self._ledger.begin_moment(f"{phase} {self._names[group]}")
        super().visit(use)


class Operations(TorchDispatchMode):
    """Sees every operation of the model: what it computes, moves and allocates."""

    def __init__(self, ledger: Observer, clocks: Clocks, watch: Callable[[], None]) -> None:
        super().__init__()
        self._ledger = ledger
        self._clocks = clocks
        self._watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._watch()
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _assumed(args[0])
        result = function(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage()._cdata for each in given}
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        for each in made:
            storage = each.untyped_storage()
            if each.is_meta and storage._cdata not in known:
                known.add(storage._cdata)
                self._ledger.allocated(storage.nbytes())
                weakref.finalize(storage, self._ledger.allocated, -storage.nbytes())
        if self._clocks.actor == COMPUTE and not function.is_view and not _is_free(function):
            flops = _flops(function, args, kwargs, result)
            moved_bytes = sum(each.numel() * each.itemsize for each in [*given, *made])
            self._ledger.computed(function.overloadpacket.__name__, flops, moved_bytes)
        return result


class FlashAttention(torch.overrides.TorchFunctionMode):
    """On meta torch would take attention apart, with every score in memory. A CPU and a GPU run it fused.

    Entered by the modules' forward, since it would not reach what a backward pass recomputes from outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0  # of modules

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_pre_hook(self._begin, prepend=True)
            module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._depth += 1
        if self._depth == 1:
            self.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.__exit__(None, None, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return _fused_attention(*args, **kwargs)


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _assumed(value: torch.Tensor) -> bool:
    """What a model asks of values that are not there: of masks, whether all rows are full. They are said to be."""
    if value.dtype is torch.bool:
        return True
    raise RuntimeError(
        f"the model reads a value of dtype {value.dtype} on its way, as routing to experts does, so that its step "
        "cannot be rehearsed without data: plan it without `step`"
    )


_FUNCTIONS = ("silu", "gelu", "tanh", "sigmoid", "softmax", "exp", "log", "erf", "sin", "cos")
"""Within the names of operations that are not done as soon as their bytes are moved."""

_FREE = ("empty", "detach", "alias", "_unsafe_view", "empty_like", "new_empty")


def _is_free(function) -> bool:
    return function.overloadpacket.__name__ in _FREE


def _flops(function, args, kwargs, result) -> int:
    packet = function.overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        causal = len(args) > 4 and args[4]
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, *_of_all_heads(query, key, value)) // (2 if causal else 1)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        gradient, query, key, value = args[:4]
        shapes = _of_all_heads(query, key, value)
        return sdpa_backward_flop_count(gradient.shape, query.shape, *shapes) // (2 if args[7] else 1)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def _of_all_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes of keys and values, as if each head of the queries had its own."""
    return [(*query.shape[:2], *each.shape[2:]) for each in (key, value)]


@dataclass(frozen=True)
class BindOnly:
    """A loader of no weights."""

    model: nn.Module

    def load(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            for fqn, view in chunk.views.items():
                bind(self.model, fqn, view)

    def load_buffers(self) -> None:
        return None


def meta_copy(model: nn.Module) -> nn.Module:
    """The same module without weights; nothing is copied."""
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, known)


def meta_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, on_meta: nn.Module
) -> torch.optim.Optimizer | None:
    """AdamW over the copy's parameters, in the same groups; None for a frozen model."""
    twins = dict(zip(model.parameters(), on_meta.parameters(), strict=True))
    if optimizer is None:
        trainable = [parameter for parameter in on_meta.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable) if trainable else None
    return torch.optim.AdamW(
        [{"params": [twins[each] for each in group["params"]]} for group in optimizer.param_groups]
    )


def rehearse(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    loss_of: Callable[[nn.Module], torch.Tensor],
    options: dict[str, Any],
    *,
    group: SimulatedGroup,
    accumulation_steps: int,
    machine: Machine,
    rates: Rates | None,
    watch: Callable[[], None],
) -> Forecast:
    """Some steps of training, or without anything to train some passes, of a copy of `model` on meta. `watch` is called
    with every operation."""
    clocks = Clocks()
    manager = Manager()
    ledger = Observer(clocks, rates, manager.ledger, group.world_size)
    on_meta = meta_copy(model)
    ours = meta_optimizer(model, optimizer, on_meta)
    config, _, parts, storage_plan = prepare(on_meta, ours, lambda: None, options, group, machine, manager)
    store = SimulatedStore(clocks, ledger) if storage_plan.uses_disk else None

    def make_lane(name: str, *, waits: bool, waits_for_host: bool) -> Lane:
        return SimulatedLane(name, clocks) if waits or machine.on_gpu else InlineLane(name)  # as lanes.make_lane

    has_budget = options.get("device_budget") is not None
    meter = None if has_budget or machine.gpu_bytes is None else ObservedMeter(ledger, machine.gpu_bytes)
    on_meta_device = torch.device("meta")
    ground = Ground(on_meta_device, group, ledger, store, machine.device_room, make_lane, meter, machine.rates)
    manager.trace = ObservedTrace(ledger, [each.name for each in storage_plan.layout.groups])
    engine = assemble(on_meta, ours, config, parts, storage_plan, ground, BindOnly(on_meta), manager)

    ledger.begin_steps()
    before, flops, busy, started, first_moment = Counter(), 0, Counter(), 0.0, 0
    FlashAttention().watch(on_meta)
    with Operations(ledger, clocks, watch):
        for _ in range(STEPS):
            before, flops, busy = ledger.work.copy(), ledger.flops, clocks.busy.copy()
            started, first_moment = clocks.now[COMPUTE], len(ledger.moments)
            _step(engine, loss_of, accumulation_steps, ledger)
    busy = clocks.busy - busy
    elapsed = clocks.now[COMPUTE] - started
    if rates is not None and rates.host_computes:
        elapsed = max(elapsed, sum(seconds for actor, seconds in busy.items() if actor != DISK))
    return Forecast(
        memory=ledger.report(),
        activation_peak_bytes=ledger.activation_peak_bytes,
        device_peak_bytes=ledger.device_peak_bytes,
        work=dict(ledger.work - before),
        flops=ledger.flops - flops,
        step_s=None if rates is None else elapsed,
        busy_s=dict(busy),
        moments=ledger.moments[first_moment:],
        promotion=None if engine.migration is None else engine.migration.promotion,
    )


def _step(engine: Engine, loss_of: Callable, accumulation_steps: int, ledger: Observer) -> None:
    for _ in range(accumulation_steps):
        ledger.begin_moment("forward")
        if engine.optimizer is None:
            with torch.no_grad():
                loss_of(engine.model)
            continue
        loss = loss_of(engine.model)
        ledger.begin_moment("backward")
        engine.optimizer.backward(loss)
        del loss
    if engine.optimizer is not None:
        ledger.begin_moment("step")
        engine.optimizer.step()
