"""What `initialize` would store where, computed from a model on meta by the run's own packing and placement."""

from dataclasses import dataclass

import torch
from torch import nn

from .blocks import find_parts
from .collectives import RankGroup
from .config import EngineConfig
from .gradients import MAX_IN_FLIGHT
from .layout import ChunkSpec, Layout, pack
from .machine import host_room_of
from .placement import ChunkPlacement, plan_storage
from .shard import layout_specs, optimizer_groups
from .tiers import Payload, Tier


@dataclass(frozen=True)
class Plan:
    """The memory of one rank (rank 0; all ranks store the same). Activations are not counted."""

    config: EngineConfig
    layout: Layout
    bytes_at_rest: dict[Tier, dict[Payload, int]]
    gathered_peak_bytes: int
    """Whole weights of sharded chunks: a block that ends, the one that begins, and those that are prefetched."""
    gradient_peak_bytes: int
    """On the device, when the last gradient of a step has landed."""

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
        """At most stored at once by tier."""
        peaks = {tier: sum(payloads.values()) for tier, payloads in self.bytes_at_rest.items()}
        peaks[Tier.DEVICE] = peaks.get(Tier.DEVICE, 0) + self.gathered_peak_bytes + self.gradient_peak_bytes
        return peaks

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
        return "\n".join(lines)


def plan(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    world_size: int = 1,
    accumulation_steps: int = 1,
    **options,
) -> Plan:
    """What each of `world_size` ranks stores when `model` (on meta or not; it is only read) is given to `initialize`
    with the same options. Without `optimizer`, trainable parameters count as one optimizer group. Raises as
    `initialize` does for wrong options."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r}: must be a whole number of ranks, at least 1")
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps!r}: must be a whole number, at least 1")
    config = EngineConfig.from_keywords(**options)
    if optimizer is None:
        group_of = {parameter: 0 for parameter in model.parameters() if parameter.requires_grad}
    else:
        group_of = optimizer_groups(model, optimizer)
    parts = find_parts(model, config.max_chunk_numel)
    layout = pack(layout_specs(model, parts, group_of, config), world_size, config.max_chunk_numel)
    on_gpu = torch.cuda.is_available()
    host_room = host_room_of(torch.device("cuda" if on_gpu else "cpu"), RankGroup(0, 1, None, None))
    storage_plan = plan_storage(layout, config, 0, world_size, on_gpu=on_gpu, host_room=host_room)
    placements = storage_plan.placements
    return Plan(
        config,
        layout,
        {tier: dict(payloads) for tier, payloads in storage_plan.at_rest().items()},
        _gathered_peak(layout, placements, config),
        _gradient_peak(layout, placements, config, accumulation_steps),
    )


def _gathered_peak(layout: Layout, placements: list[ChunkPlacement], config: EngineConfig) -> int:
    remaining = iter(placements)
    sizes = [sum(spec.nbytes for spec in group.chunks if next(remaining).sharded) for group in layout.groups]
    if config.device_budget is not None:
        return min(sum(sizes), max(config.device_budget, _largest_window(sizes, config.prefetch + 2)))
    return _largest_window(sizes, config.prefetch + 2)


def _largest_window(sizes: list[int], length: int) -> int:
    return max((sum(sizes[start : start + length]) for start in range(len(sizes))), default=0)


def _gradient_peak(
    layout: Layout, placements: list[ChunkPlacement], config: EngineConfig, accumulation_steps: int
) -> int:
    """Local gradients are whole; what they are reduced to is this rank's part, in float32 once micro-batches are
    added."""
    trainable = [(s, p) for s, p in zip(layout.chunks, placements, strict=True) if s.trainable]

    def itemsize(spec: ChunkSpec) -> int:
        return 4 if accumulation_steps > 1 else spec.dtype.itemsize

    whole = [spec.numel * itemsize(spec) for spec, _ in trainable]
    owned = sum(p.owned_numel * itemsize(s) for s, p in trainable if p.optimizer_tier is Tier.DEVICE)
    leave = any(placement.gradient_tier is not Tier.DEVICE for _, placement in trainable)
    if layout.world_size == 1 and not leave:
        return sum(whole)
    if config.zero_stage < 2 and accumulation_steps > 1:
        return sum(whole)
    if layout.world_size == 1 or config.zero_stage == 0:
        in_flight = sorted(
            (w for w, (_, p) in zip(whole, trainable, strict=True) if p.gradient_tier is not Tier.DEVICE)
        )
        return owned + sum(in_flight[-MAX_IN_FLIGHT - 1 :])
    return owned + sum(sorted(whole)[-MAX_IN_FLIGHT - 1 :])
