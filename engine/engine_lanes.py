"""The lanes of one engine."""

from dataclasses import dataclass, fields

from .collectives import RankGroup
from .config import EngineConfig
from .lanes import InlineLane, Lane, MakeLane
from .placement import StoragePlan
from .tiers import Tier


@dataclass(frozen=True)
class Lanes:
    """In the order in which they are closed: a lane before those that its work is given on to."""

    copies: Lane
    """Weights that come from where they are at rest."""
    updates: Lane
    """The host's part of the step of chunks whose state is offloaded."""
    device_updates: Lane
    """The device's part."""
    states_in: Lane
    """What the device updates of the host's."""
    states_out: Lane
    transfers: Lane
    """Collectives, and gradients that leave."""
    activations: Lane
    """Saved inputs of blocks, out and back in."""

    def close(self) -> None:
        for field in fields(self):
            getattr(self, field.name).close()


def make_lanes(make: MakeLane, plan: StoragePlan, rank_group: RankGroup, config: EngineConfig) -> Lanes:
    fetches = any(placement.weight_tier is not Tier.DEVICE for placement in plan.placements)
    updates = any(placement.optimizer_tier is not Tier.DEVICE for placement in plan.placements)
    on_disk = any(Tier.NVME in (placement.weight_tier, placement.optimizer_tier) for placement in plan.placements)
    by_device = plan.device_ring.nbytes > 0

    def lane(name: str, needed: bool, waits: bool, waits_for_host: bool) -> Lane:
        return make(name, waits=waits, waits_for_host=waits_for_host) if needed else InlineLane(name)

    is_distributed, after_updates = rank_group.is_distributed, updates or on_disk
    return Lanes(
        copies=lane("copies", fetches, on_disk, after_updates),
        updates=lane("updates", updates, on_disk, after_updates),
        # Threads on a CPU too, which is told to be a device beside the host.
        device_updates=lane("device updates", by_device, True, True),
        states_in=lane("states in", by_device, True, False),
        states_out=lane("states out", by_device, True, False),
        transfers=lane("transfers", is_distributed or fetches or updates, is_distributed or on_disk, after_updates),
        activations=lane("activations", config.offload_activations, False, False),
    )
