"""Where Adam of what lies on the host runs: there, or on the device, which the state is streamed through. Pure.

Both work side by side. The host takes what its processor needs, and what of a chunk lives on the device goes out and
back in. Through the device a chunk goes in pieces, so that copies in, Adam and copies out are under way at once, and
the slowest of the three tells:

    host_s   = numel / host_adam + out_bytes / link_out + in_bytes / link_in
    device_s = max(in_bytes / link_in, numel / device_adam, out_bytes / link_out)

Chunks are given out in the order in which they are used next, each to the worker that will be done with it first: list
scheduling (Graham 1969, "Bounds on multiprocessing timing anomalies"; for machines of two speeds Cho and Sahni 1980).
The first chunks are the first to be ready. And where both times are in proportion to a chunk's size, at rates h and d,
all chunks up to any place in the order are ready within w / (h + d) of the best that is possible for these alone, w
being the largest of them: the worker that ends last would have ended no sooner on the other side, so that the end M
has M h ≤ H + w and M d ≤ D + w, where the host was given H parameters before and the device D; and nothing can end
before (H + D + w) / (h + d).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .config import Precision, StatePrecision
from .layout import ChunkSpec
from .placement import ChunkPlacement, StoragePlan
from .rates import UpdateRates
from .streaming_sizes import NO_RING, Ring, device_ring_of, host_ring_of, slot_itemsizes
from .tiers import Tier


@dataclass(frozen=True)
class UpdateCost:
    """What the update of one chunk moves over the link, in bytes, and computes."""

    numel: int
    host: tuple[int, int]
    """(in to the device, out of it) when the host's processor updates it."""
    device: tuple[int, int] | None
    """When the device does; None where it cannot."""

    def seconds(self, rates: UpdateRates) -> tuple[float, float | None]:
        """On the host and through the device."""
        host_in, host_out = self.host
        host_s = self.numel / rates.host_adam_numel
        if host_in or host_out:
            host_s += host_in / rates.link_in_bytes + host_out / rates.link_out_bytes
        if self.device is None:
            return host_s, None
        device_in, device_out = self.device
        transfers = max(device_in / rates.link_in_bytes, device_out / rates.link_out_bytes)
        return host_s, max(transfers, self.numel / rates.device_adam_numel)


def update_cost(placement: ChunkPlacement, spec: ChunkSpec, gradient_itemsize: int) -> UpdateCost:
    """Of a chunk whose state is not on the device. Where something is on a drive the host updates it, piece by piece as
    it is read."""
    weight_bytes = placement.owned_numel * spec.dtype.itemsize
    gradient_bytes = placement.owned_numel * gradient_itemsize
    both_ways = placement.state_bytes(spec) + (weight_bytes if placement.weight_tier is Tier.HOST else 0)
    weight_on_device = weight_bytes if placement.weight_tier is Tier.DEVICE else 0
    gradient_on_device = placement.gradient_tier is Tier.DEVICE
    host = (weight_on_device, weight_on_device + (gradient_bytes if gradient_on_device else 0))
    device = (both_ways + (0 if gradient_on_device else gradient_bytes), both_ways)
    return UpdateCost(placement.owned_numel, host, device if is_movable(placement) else None)


def is_movable(placement: ChunkPlacement) -> bool:
    """Whether the device may update a chunk whose state is elsewhere."""
    tiers = (placement.weight_tier, placement.optimizer_tier, placement.gradient_tier)
    return placement.optimizer_tier is Tier.HOST and Tier.NVME not in tiers


class Balance:
    """Gives chunks to the host or to the device, as they come."""

    def __init__(self, rates: UpdateRates | None) -> None:
        """All go to the host without rates of a device and of the link to it."""
        self._rates = rates if rates is not None and rates.have_device else None
        self._host_s = self._device_s = 0.0  # until each is done with what it was given

    def give(self, cost: UpdateCost) -> Tier:
        if self._rates is None:
            return Tier.HOST
        host_s, device_s = cost.seconds(self._rates)
        if device_s is not None and self._device_s + device_s < self._host_s + host_s:
            self._device_s += device_s
            return Tier.DEVICE
        self._host_s += host_s
        return Tier.HOST


def choose_updaters(costs: Iterable[UpdateCost], rates: UpdateRates | None) -> list[Tier]:
    """Tier.HOST or Tier.DEVICE for each chunk, given in the order of use."""
    balance = Balance(rates)
    return [balance.give(cost) for cost in costs]


def planned_updaters(
    plan: StoragePlan, rates: UpdateRates | None, accumulates: bool, in_backward: bool
) -> dict[Tier, int]:
    """How many of the chunks whose state is on the host are updated there, and how many by the device, as a run of
    `plan` chooses it. `accumulates`: gradients are float32 sums of micro-batches."""
    placements = iter(plan.placements)
    groups = [[(spec, next(placements)) for spec in group.chunks] for group in plan.layout.groups]
    chunks = [
        (spec, placement)
        for group in (reversed(groups) if in_backward else groups)
        for spec, placement in group
        if spec.trainable and placement.optimizer_tier is not Tier.DEVICE
    ]
    costs = [update_cost(p, s, 4 if accumulates else s.dtype.itemsize) for s, p in chunks]
    chosen = choose_updaters(costs, rates if plan.device_ring.nbytes else None)
    on_host = [tier for tier, (_, p) in zip(chosen, chunks, strict=True) if p.optimizer_tier is Tier.HOST]
    return {tier: on_host.count(tier) for tier in (Tier.HOST, Tier.DEVICE)}


def device_ring(
    specs: list[ChunkSpec],
    placements: list[ChunkPlacement],
    precision: Precision,
    state_precision: StatePrecision,
    budget: int | None,
) -> Ring:
    """`budget`: bytes of the device's, of which the ring takes a small share."""
    trainable = [(s, p) for s, p in zip(specs, placements, strict=True) if s.trainable]
    movable = [placement for _, placement in trainable if is_movable(placement)]
    if not movable:
        return NO_RING
    sizes = slot_itemsizes(precision, state_precision)
    if all(placement.weight_tier is Tier.DEVICE for placement in movable):
        del sizes["weight"]
    if all(placement.gradient_tier is Tier.DEVICE for placement in movable):
        del sizes["gradient"]
    # The largest of all, wherever it is: the same size for every placement that is tried.
    return device_ring_of(max(placement.owned_numel for _, placement in trainable), sizes, budget)


def host_ring(specs: list[ChunkSpec], placements: list[ChunkPlacement], precision: Precision) -> Ring:
    """For weights and gradients that live on the device, of chunks whose state is on the host."""
    sizes = {"weight": precision.dtype.itemsize, "gradient": 4}  # which may be a sum of micro-batches
    apart = [
        (placement.owned_numel, {"weight": placement.weight_tier, "gradient": placement.gradient_tier})
        for spec, placement in zip(specs, placements, strict=True)
        if spec.trainable and placement.optimizer_tier is Tier.HOST
    ]
    needed = {name: size for name, size in sizes.items() if any(tiers[name] is Tier.DEVICE for _, tiers in apart)}
    return host_ring_of(max(numel for numel, _ in apart), needed) if needed else NO_RING
