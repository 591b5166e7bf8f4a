"""A group: the chunks of one block, unsharded, resharded and reduced together."""

from collections.abc import Collection

import torch

from .chunk import Chunk, ShardState
from .collectives import RankGroup, all_gather_
from .disk_tensor import DiskTensor
from .gradients import ChunkGradient, GradientTraffic
from .lanes import Event, Lane, UpdateEvent
from .staging import Staging
from .tiers import Tier, Work


class ChunkGroup:
    """Weights are whole between `wait` and `reshard`. `unshard` starts a transfer and returns; `wait` orders the
    caller's work after it. All three are collectives where ranks share the weights."""

    def __init__(
        self,
        name: str,
        index: int,
        chunks: list[Chunk],
        group: RankGroup,
        lane: Lane,
        copy_lane: Lane,
        staging: Staging,
        traffic: GradientTraffic,
    ) -> None:
        self.name = name
        self.index = index
        self.chunks = chunks
        self.gradients = [ChunkGradient(chunk, traffic) for chunk in chunks if chunk.spec.trainable]
        self._group = group
        self._lane = lane
        self._copy_lane = copy_lane
        self._staging = staging  # of the copy lane
        self._event: Event | None = None
        self._stale = [chunk for chunk in chunks if chunk.placement.sharded]
        """Chunks whose `full` does not hold the weights."""
        self.units: set[str] = set()
        """Those that need these weights, a block being one."""
        self.pins: set[str] = set()
        """The units that are computing with the weights."""
        self.holders: set[str] = set()
        """The `gathered` contexts that they were promised to."""

    @property
    def stays(self) -> bool:
        """Weights, state and gradients are all where they are used: with one rank, on the device."""
        placements = [chunk.placement for chunk in self.chunks]
        state_on_device = all(placement.optimizer_tier is Tier.DEVICE for placement in placements)
        return not self._group.is_distributed and not self.is_sharded and state_on_device

    @property
    def is_sharded(self) -> bool:
        """Whether resharding frees anything."""
        return any(chunk.placement.sharded for chunk in self.chunks)

    @property
    def is_held(self) -> bool:
        return bool(self.holders)

    @property
    def is_idle(self) -> bool:
        """Nobody needs the weights now."""
        return not self.pins and not self.holders

    @property
    def is_updated_in_place(self) -> bool:
        """Whether updates in the backward pass need the gathered weights."""
        return any(chunk.is_updated_in_place for chunk in self.chunks)

    @property
    def is_updating(self) -> bool:
        """An update is under way, before whose end the weights cannot be resharded without a wait."""
        return any(chunk.pending is not None and not chunk.pending.done() for chunk in self.chunks)

    @property
    def is_complete(self) -> bool:
        """The gradients of all parameters have landed."""
        return all(gradient.is_complete for gradient in self.gradients)

    @property
    def is_whole(self) -> bool:
        """The weights are there, or on their way."""
        return not self._stale

    @property
    def gathered_bytes(self) -> int:
        """What unsharding allocates."""
        return sum(chunk.full.nbytes for chunk in self.chunks if chunk.placement.sharded)

    def unshard(self) -> None:
        if not self._stale:
            return
        stale, self._stale = self._stale, []
        offloaded = [chunk for chunk in stale if chunk.placement.weight_tier is not Tier.DEVICE]
        for chunk in stale:
            if chunk.state is ShardState.SHARDED:
                chunk.allocate_full()
        label = f"unshard {self.name}"
        copied = None
        if offloaded:
            updates = _updates(offloaded)
            copied = self._copy_lane.submit(lambda: _copy_in(updates, self._staging), label)
        device_updates = _updates([chunk for chunk in stale if chunk.placement.weight_tier is Tier.DEVICE])

        def work() -> None:
            with torch.profiler.record_function(f"megalith::{label}"):
                if copied is not None:
                    copied.wait()
                _copy_in(device_updates, self._staging)
                for chunk in stale:
                    if self._shares(chunk):
                        all_gather_(chunk.full.data, self._group, chunk.index)
                        chunk.did(Work.COLLECTIVE, self._group.received_bytes(chunk.full))

        self._event = self._lane.submit(work, label)

    def wait(self) -> None:
        if self._event is not None:
            self._event.wait()
            self._event = None
        for chunk in self.chunks:  # one that is updated in place has no transfer that would wait for it
            chunk.follow_update()

    def reshard(self) -> None:
        if not self.is_idle:
            raise RuntimeError(f"group {self.name} cannot be resharded: its weights are in use")
        self.wait()  # a transfer that nobody used may still be writing
        for chunk in self.chunks:
            if chunk.is_updated_in_place:
                chunk.settle()  # the drive takes the weights from `full`
            if chunk.placement.sharded and chunk.state is ShardState.UNSHARDED:
                chunk.free_full()
        self._stale = [chunk for chunk in self.chunks if chunk.placement.sharded]

    def mark_updated(self, updated: list[Chunk]) -> None:
        """The owned parts of these chunks have new values, so that the others' parts in `full` are old."""
        self._stale = [
            chunk for chunk in self.chunks if chunk.placement.sharded or (chunk in updated and self._shares(chunk))
        ]

    def mark_updated_in_place(self, updated: list[Chunk]) -> None:
        """As `mark_updated`, on one rank in a backward pass: `full` has, or will have when the update is done, the new
        values of those chunks whose weights are at rest on a drive."""
        old = [
            chunk
            for chunk in updated
            if chunk.placement.sharded and not chunk.is_updated_in_place and chunk not in self._stale
        ]
        self._stale += old

    def promote(self, chunk: Chunk) -> None:
        """Move it to the device for good, as `Chunk.promote` has it."""
        chunk.promote(self._copy_lane, self._staging)

    def send_home(self, chunk: Chunk) -> None:
        self.wait()
        chunk.send_home(self._copy_lane, self._staging)
        if self.is_idle and chunk.placement.sharded:
            self.reshard()

    def reduce_gradients(self, final: bool, waiting: Collection[ChunkGradient] = ()) -> None:
        """Those in `waiting` wait on the device for more."""
        for gradient in self.gradients:
            gradient.reduce(final, gradient in waiting)

    def _shares(self, chunk: Chunk) -> bool:
        return self._group.is_distributed and chunk.placement.owned_numel < chunk.spec.numel


def _updates(chunks: list[Chunk]) -> list[tuple[Chunk, UpdateEvent | None]]:
    """With the update that each is to be read after: a later one must not be waited for."""
    return [(chunk, chunk.pending) for chunk in chunks]


def _copy_in(chunks: list[tuple[Chunk, UpdateEvent | None]], staging: Staging) -> None:
    for chunk, update in chunks:
        if update is not None:
            # What is at rest on the drive is read from there, when it has all been written.
            (update.wait if isinstance(chunk.weight, DiskTensor) else update.wait_for_values)()
        chunk.copy_weight_in(staging)
