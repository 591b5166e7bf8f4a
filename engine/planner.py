"""What `initialize` would store where, and what a step would take, computed from a model on meta by the run's own
packing, placement and schedule."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .blocks import find_parts
from .budgets import (
    count_that_fit,
    device_peak,
    gathered_window,
    gradient_peak,
    group_bytes,
    plan_storage,
    working_peak,
)
from .collectives import RankGroup
from .config import EngineConfig, StatePrecision
from .layout import ChunkSpec, Layout, pack
from .machine import read_machine
from .manager import Manager
from .placement import StoragePlan
from .plan_table import forecast_lines
from .rates import Rates
from .rehearsal import Forecast, SimulatedGroup, rehearse
from .shard import layout_specs, optimizer_groups, within
from .tiers import Payload, Tier
from .updater_choice import planned_updaters


@dataclass(frozen=True)
class Plan:
    """The memory of one rank (rank 0; all ranks store the same), and what a step does."""

    config: EngineConfig
    layout: Layout
    bytes_at_rest: dict[Tier, dict[Payload, int]]
    gathered_peak_bytes: int
    """Whole weights of sharded chunks: a block that ends, the one that begins, and those that are prefetched."""
    gradient_peak_bytes: int
    """On the device, when the last gradient of a step has landed."""
    forecast: Forecast | None
    """Of a step; None where none was given."""
    updaters: dict[Tier, int]
    """Of the chunks whose optimizer state is on the host, how many the host updates, and how many the device."""

    @property
    def chunks(self) -> list[ChunkSpec]:
        return self.layout.chunks

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def padding_fraction(self) -> float:
        return self.layout.padding_fraction

    @property
    def param_numel(self) -> int:
        return self.layout.param_numel

    @property
    def peak_bytes(self) -> dict[Tier, int]:
        """At most stored at once by tier, activations not counted; without a forecast, bounds."""
        if self.forecast is not None:
            return {Tier(tier): payloads["total"]["peak_bytes"] for tier, payloads in self.forecast.memory.items()}
        peaks = {tier: sum(payloads.values()) for tier, payloads in self.bytes_at_rest.items()}
        peaks[Tier.DEVICE] = peaks.get(Tier.DEVICE, 0) + self.gathered_peak_bytes + self.gradient_peak_bytes
        if self.config.placement == "auto" and len(peaks) > 1:  # what is spare is used, within the budget
            peaks[Tier.DEVICE] = max(peaks[Tier.DEVICE], self.config.device_budget or 0)
        return peaks

    def problems(self, room: dict[Tier, int]) -> list[str]:
        """What does not fit into the bytes of `room`, one line each; a tier that is not named has room."""
        needed = self.peak_bytes
        activations = 0
        if self.forecast is not None:
            needed[Tier.DEVICE] = self.forecast.device_peak_bytes
            activations = self.forecast.activation_peak_bytes
        return [
            f"{tier.value}: {needed[tier] / 1e9:,.2f} GB at most, and there are {nbytes / 1e9:,.2f} GB"
            + (f" ({activations / 1e9:,.2f} GB are activations)" if tier is Tier.DEVICE and activations else "")
            for tier, nbytes in room.items()
            if needed.get(tier, 0) > nbytes
        ]

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{self.param_numel:,} parameters in {len(self.chunks)} chunks, "
            f"padding {100 * self.padding_fraction:.3f} %; ZeRO-{config.zero_stage}, {config.precision}, "
            f"placement {config.placement}, {self.world_size} ranks. Per rank:",
            f"{'tier':8}{'payload':14}{'MB at rest':>14}",
        ]
        for tier, payloads in self.bytes_at_rest.items():
            for payload, nbytes in payloads.items():
                lines.append(f"{tier.value:8}{payload.value:14}{nbytes / 1e6:14,.1f}")
        lines.append(
            f"{'device':8}{'gathered':14}{self.gathered_peak_bytes / 1e6:14,.1f}  at most, while a block is in use"
        )
        lines.append(f"{'device':8}{'gradient':14}{self.gradient_peak_bytes / 1e6:14,.1f}  at most, until the step")
        for tier, nbytes in self.peak_bytes.items():
            lines.append(f"{tier.value:8}{'peak':14}{nbytes / 1e6:14,.1f}  without activations")
        if self.updaters[Tier.DEVICE]:
            by_device, count = self.updaters[Tier.DEVICE], sum(self.updaters.values())
            lines.append(f"Adam of the state on the host: the device does it for {by_device} of {count} chunks")
        if self.forecast is not None:
            lines += forecast_lines(self.forecast)
        return "\n".join(lines)


def plan(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    world_size: int = 1,
    accumulation_steps: int = 1,
    step: Callable[[nn.Module], torch.Tensor] | None = None,
    rates: Rates | None = None,
    on_gpu: bool | None = None,
    manager: Manager | None = None,
    watch: Callable[[], None] = lambda: None,
    **options,
) -> Plan:
    """What each of `world_size` ranks stores when `model` (on meta or not; it is only read) is given to `initialize`
    with the same options. Without `optimizer`, trainable parameters count as one optimizer group.

    `step` makes it a rehearsal: a function from the model, here a copy on meta, to the loss of a micro-batch of inputs
    on meta. It is trained for some steps, and `forecast` tells peaks by tier, payload and moment, activations, bytes
    moved, and with `rates` the time of a step. `on_gpu`: whether the planned machine has one (None: whether this does).
    `rates` also decide, as in `initialize`, which chunks the device updates; without, the host updates all of its own.
    `manager`: as in `initialize`, of engines that share budgets. One for plans alone: what is planned to be at rest is
    entered there. `watch` is called with every operation of a rehearsal, and ends it when it raises.

    Raises as `initialize` does for wrong options and budgets, RuntimeError for a model that needs data on its way, and
    ValueError where `rates` lack what the plan does.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r}: must be a whole number of ranks, at least 1")
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps!r}: must be a whole number, at least 1")
    config = EngineConfig.from_keywords(**options)
    if manager is not None:
        config = within(manager, config)
        options = options | {"device_budget": config.device_budget, "host_budget": config.host_budget}
    if optimizer is None:
        group_of = {parameter: 0 for parameter in model.parameters() if parameter.requires_grad}
    else:
        group_of = optimizer_groups(model, optimizer)
    parts = find_parts(model, config.max_chunk_numel)
    layout = pack(
        layout_specs(model, parts, group_of, config),
        world_size,
        config.max_chunk_numel,
        StatePrecision(config.state_precision).slot_multiple,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = read_machine(device, RankGroup(0, 1, None, None))
    if on_gpu is not None:
        machine = replace(machine, on_gpu=on_gpu, gpu_bytes=machine.gpu_bytes if on_gpu else None)
    machine = replace(machine, rates=rates)
    if manager is not None:
        machine = replace(machine, working_bytes=manager.working_bytes)
    group = SimulatedGroup(0, world_size, None, None, on_gpu=machine.on_gpu)
    storage_plan = plan_storage(layout, config, group, machine)
    forecast = None
    if step is not None:
        forecast = rehearse(
            model,
            optimizer,
            step,
            options,
            group=group,
            accumulation_steps=accumulation_steps,
            machine=machine,
            rates=rates,
            watch=watch,
        )
    at_rest = {tier: dict(payloads) for tier, payloads in storage_plan.at_rest().items()}
    if manager is not None:
        _enter(manager, storage_plan, config, group)
    return Plan(
        config,
        layout,
        at_rest,
        _gathered_peak(storage_plan, config, group),
        gradient_peak(layout, storage_plan.placements, config, group, accumulation_steps)
        + (_sums_on_device(storage_plan, config, group, machine.device_room) if accumulation_steps > 1 else 0),
        forecast,
        planned_updaters(storage_plan, rates, accumulation_steps > 1, config.update_in_backward),
    )


def _sums_on_device(storage_plan: StoragePlan, config: EngineConfig, group: RankGroup, device_room: int) -> int:
    """Of gradients that leave after the last micro-batch: as a run decides it."""
    if config.zero_stage < 2 and group.is_distributed:
        return 0  # nothing is summed before
    sizes = [
        4 * placement.owned_numel
        for _, spec, placement in storage_plan.named_chunks()
        if spec.trainable and placement.gradient_tier is not Tier.DEVICE
    ]
    budget = device_room if config.device_budget is None else config.device_budget
    return sum(sizes[: count_that_fit(sizes, budget - device_peak(storage_plan, config, group, 0))])


def _enter(manager: Manager, storage_plan: StoragePlan, config: EngineConfig, group: RankGroup) -> None:
    """What an engine would have in its manager's ledger between two steps."""
    for tier, payloads in storage_plan.at_rest().items():
        for payload, nbytes in payloads.items():
            manager.ledger.add(tier, payload, nbytes)
    manager.bounds[len(manager.bounds)] = working_peak(storage_plan.layout, storage_plan.placements, config, group)


def _gathered_peak(storage_plan: StoragePlan, config: EngineConfig, group: RankGroup) -> int:
    placements = storage_plan.placements
    window = gathered_window(storage_plan.layout, placements, config)
    if config.device_budget is None:
        return window
    reserved = storage_plan.tier_bytes(Tier.DEVICE) + gradient_peak(storage_plan.layout, placements, config, group, 2)
    return min(sum(group_bytes(storage_plan.layout, placements)), max(config.device_budget - reserved, window))
