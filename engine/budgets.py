"""What fits where: the plan of an engine's storage within budgets, and what is evicted when not all fits. Pure."""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add

from .collectives import RankGroup
from .config import EngineConfig, Precision, StatePrecision
from .layout import ChunkSpec, Layout
from .placement import (
    STORE_RING_BYTES,
    WEIGHT_STAGING_BYTES,
    ChunkPlacement,
    StoragePlan,
    fixed_tiers,
    place_chunks,
)
from .rates import UpdateRates
from .streaming_sizes import NO_RING, piece_numel_of, ring_bytes_of, slot_itemsizes
from .tiers import OutOfBudgetError, Tier
from .updater_choice import device_ring, host_ring


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    on_gpu: bool
    device_room: int
    """Bytes to assume where `device_budget` is None and placement="auto"."""
    host_room: int
    """Bytes to assume where `host_budget` is None."""
    gpu_bytes: int | None = None
    """Of a GPU, free for the engine and activations."""
    working_bytes: int = 0
    """What another engine with the same budget needs on the device while it computes."""
    rates: UpdateRates | None = None
    """By which it is decided where Adam of the state on the host runs. None: there."""


def plan_storage(layout: Layout, config: EngineConfig, group: RankGroup, machine: Machine) -> StoragePlan:
    """Raises OutOfBudgetError for a ring that is too small, and where no automatic placement fits; NotImplementedError
    for what several ranks cannot do."""
    if config.update_in_backward and group.is_distributed:
        raise NotImplementedError(
            f"update_in_backward=True with {group.world_size} ranks: which parameters got a gradient on any of them is "
            "known in step(): leave it out"
        )
    device_room = _device_room(config, machine)
    if machine.rates is not None and machine.rates.have_device:
        try:
            plan = _plan(layout, config, group, machine)
            if device_room is None or device_peak(plan, config, group, machine.working_bytes) <= device_room:
                return plan
        except OutOfBudgetError:
            pass  # perhaps it is for the ring alone that there is no room
    return _plan(layout, config, group, replace(machine, rates=None))


def _device_room(config: EngineConfig, machine: Machine) -> int | None:
    """None: whatever there is."""
    if config.device_budget is None and config.placement == "auto":
        return machine.device_room
    return config.device_budget


def _plan(layout: Layout, config: EngineConfig, group: RankGroup, machine: Machine) -> StoragePlan:
    def assemble(weight_tiers: list[Tier], state_tiers: list[Tier]) -> StoragePlan:
        placements = place_chunks(layout.chunks, config, group.rank, group.world_size, weight_tiers, state_tiers)
        return _with_staging_and_gradients(layout, config, placements, machine)

    if config.placement != "auto":
        return assemble(*fixed_tiers(layout.chunks, config))
    device_room = _device_room(config, machine)
    host_room = machine.host_room if config.host_budget is None else config.host_budget
    return choose_tiers(layout, config, group, assemble, device_room, host_room, machine.working_bytes)


def choose_tiers(
    layout: Layout,
    config: EngineConfig,
    group: RankGroup,
    assemble: Callable[[list[Tier], list[Tier]], StoragePlan],
    device_room: int,
    host_room: int,
    working_bytes: int,
) -> StoragePlan:
    """placement="auto". What moves most bytes a step for its size gets the fastest memory that has room.

    The device keeps what is used last in the forward pass whole, weights and state, beside the room for blocks in use
    and for gradients. Of the rest, the host takes weights first, which would be read twice and written once a step from
    the drive, and then state (read once, written once) of the chunks that the next step needs first. The drive has the
    remainder. Without a device_budget, what has to be there is, whatever room was read.
    """
    count = len(layout.chunks)

    def tiers(on_device: int, weights_on_host: int, states_on_host: int) -> StoragePlan:
        left = count - on_device
        return assemble(
            [Tier.NVME] * (left - weights_on_host) + [Tier.HOST] * weights_on_host + [Tier.DEVICE] * on_device,
            [Tier.HOST] * states_on_host + [Tier.NVME] * (left - states_on_host) + [Tier.DEVICE] * on_device,
        )

    def device_need(on_device: int) -> int:
        rest_on_host = (
            0 if config.nvme_dir is not None else count - on_device
        )  # the drive costs more room for gradients
        return device_peak(tiers(on_device, rest_on_host, rest_on_host), config, group, working_bytes)

    least = device_need(0)
    if least > device_room and config.device_budget is None:
        # A room that was read is a guess, and this need a bound that supposes micro-batches: the least is tried.
        device_room = least
    if least > device_room:
        raise OutOfBudgetError(
            f"device_budget is {device_room} bytes, and with all else offloaded the blocks in use and their gradients "
            f"take {least}: raise it, or lower prefetch or max_chunk_numel"
        )
    on_device = count  # which takes no ring
    if device_need(count) > device_room:
        on_device = _largest(count - 1, lambda number: device_need(number) <= device_room)
    left = count - on_device
    on_host = tiers(on_device, left, left)
    if on_host.host_peak <= host_room:
        return on_host
    if config.nvme_dir is None:
        raise OutOfBudgetError(
            f"host_budget is {host_room} bytes, and what the device has no room for takes "
            f"{on_host.host_peak}: give nvme_dir, a folder on a local drive, or raise the budgets"
        )

    # Gradients that could be on the drive are on the host only where they fit: they never are what does not.
    weights = _largest(left, lambda number: tiers(on_device, number, 0).host_peak <= host_room)
    states = _largest(left, lambda number: tiers(on_device, weights, number).host_peak <= host_room)
    return tiers(on_device, weights, states)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, 0 if none: `fits` is monotone."""
    return max(bisect_left(range(1, most + 1), True, key=lambda number: not fits(number)), 0)


def _with_staging_and_gradients(
    layout: Layout, config: EngineConfig, placements: list[ChunkPlacement], machine: Machine
) -> StoragePlan:
    on_disk = [p for p in placements if Tier.NVME in (p.weight_tier, p.optimizer_tier)]
    piece_numel = staging_bytes = 0
    if on_disk:
        largest_numel = max(placement.owned_numel for placement in on_disk)
        itemsizes = ring_itemsizes(config, machine.on_gpu)
        piece_numel = piece_numel_of(config.nvme_ring, largest_numel, itemsizes)
        staging_bytes = ring_bytes_of(piece_numel, itemsizes) + STORE_RING_BYTES
        staging_bytes += 2 * WEIGHT_STAGING_BYTES if machine.on_gpu else 0
    if config.update_in_backward:  # they are never kept
        placements = [replace(placement, gradient_tier=Tier.DEVICE) for placement in placements]
    precision, has_rates = Precision(config.precision), machine.rates is not None
    for_host = host_ring(layout.chunks, placements, precision) if has_rates else NO_RING
    plan = StoragePlan(layout, placements, piece_numel, staging_bytes, host_ring=for_host)
    room = (machine.host_room if config.host_budget is None else config.host_budget) - plan.host_peak
    placements = _gradients_to_host(layout.chunks, placements, room)
    for_device = NO_RING
    if has_rates:
        kinds = precision, StatePrecision(config.state_precision)
        for_device = device_ring(layout.chunks, placements, *kinds, _device_room(config, machine))
    return replace(plan, placements=placements, device_ring=for_device)


def ring_itemsizes(config: EngineConfig, on_gpu: bool) -> dict[str, int]:
    """Of the ring that streams updates."""
    at_hand = config.update_in_backward and not on_gpu
    return slot_itemsizes(Precision(config.precision), StatePrecision(config.state_precision), at_hand)


def _gradients_to_host(specs: list[ChunkSpec], placements: list[ChunkPlacement], room: int) -> list[ChunkPlacement]:
    """Gradients that would wait on the drive wait on the host while there is room."""
    result = []
    for spec, placement in zip(specs, placements, strict=True):
        if placement.gradient_tier is Tier.NVME and spec.trainable:
            on_host = replace(placement, gradient_tier=Tier.HOST)
            # With a float32 sum of micro-batches beside it.
            nbytes = on_host.gradient_bytes(spec) + (4 * on_host.owned_numel if spec.dtype.itemsize < 4 else 0)
            if nbytes <= room:
                room -= nbytes
                placement = on_host
        result.append(placement)
    return result


def check_budgets(plan: StoragePlan, config: EngineConfig) -> None:
    """Raises OutOfBudgetError when a budget does not hold what must be stored."""
    for tier, budget, field in (
        (Tier.DEVICE, config.device_budget, "device_budget"),
        (Tier.HOST, config.host_budget, "host_budget"),
    ):
        needed = plan.tier_bytes(tier)
        if budget is not None and needed > budget:
            raise OutOfBudgetError(
                f"{field} is {budget} bytes, and what is at rest on the {tier.value} takes {needed} bytes: "
                "raise it, shard over more ranks, or offload more"
            )


MAX_IN_FLIGHT = 2
"""Reductions of gradients, or updates in the backward pass, whose buffers are held; one more and the backward pass
waits for the oldest."""


def device_peak(plan: StoragePlan, config: EngineConfig, group: RankGroup, working_bytes: int) -> int:
    """The most that is stored on the device at once when weights are freed as soon as may be. Gradients are counted as
    float32 sums of micro-batches."""
    own_bytes = working_peak(plan.layout, plan.placements, config, group)
    return plan.tier_bytes(Tier.DEVICE) + max(own_bytes, working_bytes)


def working_peak(layout: Layout, placements: list[ChunkPlacement], config: EngineConfig, group: RankGroup) -> int:
    """What the device needs at most beside what is at rest there, while an engine computes."""
    return gathered_window(layout, placements, config) + gradient_peak(layout, placements, config, group, 2)


def gathered_window(layout: Layout, placements: list[ChunkPlacement], config: EngineConfig) -> int:
    """Whole weights of sharded chunks, at most, where groups are used in their order."""
    sizes = group_bytes(layout, placements)
    length = window_length(placements, config)
    return max((sum(sizes[start : start + length]) for start in range(len(sizes))), default=0)


def window_length(placements: list[ChunkPlacement], config: EngineConfig) -> int:
    """Groups that are whole together: a block that ends, the one that begins, those that are prefetched, and those that
    are updated in place."""
    updated = config.update_in_backward and any(placement.weight_tier is Tier.NVME for placement in placements)
    return config.prefetch + 2 + (MAX_IN_FLIGHT if updated else 0)


def group_bytes(layout: Layout, placements: list[ChunkPlacement]) -> list[int]:
    """What unsharding each group allocates."""
    remaining = iter(placements)
    return [sum(spec.nbytes for spec in group.chunks if next(remaining).sharded) for group in layout.groups]


def gradient_peak(
    layout: Layout, placements: list[ChunkPlacement], config: EngineConfig, group: RankGroup, accumulation_steps: int
) -> int:
    """On the device, while gradients land and are reduced. Local ones are whole; what they are reduced to is this
    rank's part, in float32 once micro-batches are added."""
    trainable = [(s, p) for s, p in zip(layout.chunks, placements, strict=True) if s.trainable]

    def itemsize(spec: ChunkSpec) -> int:
        return 4 if accumulation_steps > 1 else spec.dtype.itemsize

    whole = [spec.numel * itemsize(spec) for spec, _ in trainable]
    owned = sum(p.owned_numel * itemsize(s) for s, p in trainable if p.optimizer_tier is Tier.DEVICE)
    leave = any(placement.optimizer_tier is not Tier.DEVICE for _, placement in trainable)
    if not group.is_distributed and not leave:
        return sum(whole)
    # What a reduction takes beside the local gradient: this rank's part where it is apart, and what is received.
    beside = [
        itemsize(s) * (group.scratch_numel(s.numel) + (p.owned_numel if p.owned_numel < s.numel else 0))
        for s, p in trainable
    ]
    one_more = max(beside, default=0)  # begun before the oldest in flight is waited for
    if config.zero_stage < 2 and accumulation_steps > 1 and group.is_distributed:
        return sum(whole) + sum(sorted(beside)[-MAX_IN_FLIGHT:]) + one_more
    # Where something leaves. All chunks of a block land before the first of them is reduced.
    passing = [
        w if group.is_distributed or p.optimizer_tier is not Tier.DEVICE else 0
        for w, (_, p) in zip(whole, trainable, strict=True)
    ]
    remaining = iter(passing)
    landing = [sum(next(remaining) for spec in group.chunks if spec.trainable) for group in layout.groups]
    # Sums on the drive come through memory to be added to.
    sums = [p.owned_numel * 4 for _, p in trainable if p.gradient_tier is Tier.NVME and accumulation_steps > 1]
    in_flight = sum(sorted(map(add, passing, beside))[-MAX_IN_FLIGHT:]) + sum(sorted(sums)[-MAX_IN_FLIGHT - 1 :])
    return owned + max(landing, default=0) + in_flight + one_more


def count_that_fit(sizes: Sequence[int], room: int) -> int:
    """How many of the first of `sizes` fit into `room` together."""
    return sum(total <= room for total in accumulate(sizes))


def choose_evictions(candidates: Sequence[tuple[Hashable, int, int | None]], needed_bytes: int) -> list[Hashable]:
    """Which of `candidates` (key, bytes, how many uses from now its next one is; None if none is foreseen) to evict so
    that `needed_bytes` are freed; all where that is not enough.

    What is used farthest in the future goes first (Belady 1966), and stays after all where the others free enough: of
    what would be read back sooner, the fewest bytes."""
    farthest = sorted(candidates, key=lambda each: math.inf if each[2] is None else each[2], reverse=True)
    chosen: list[tuple[Hashable, int]] = []
    freed = 0
    for key, nbytes, _ in farthest:
        if freed >= needed_bytes:
            break
        chosen.append((key, nbytes))
        freed += nbytes
    for each in reversed(chosen[:]):
        if freed - each[1] >= needed_bytes:
            chosen.remove(each)
            freed -= each[1]
    return [key for key, _ in chosen]
