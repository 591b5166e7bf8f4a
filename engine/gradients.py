"""The life of one chunk's gradient, from autograd to the step.

1. A parameter's gradient *lands*: it is copied into the chunk's local buffer [numel] and freed. Later micro-batches are
added
   there, in float32.
2. The local buffer is *reduced* over the ranks, on the lane for collectives, into this rank's part [owned_numel], which
is
   moved to the tier of the optimizer state, and added to what earlier micro-batches left there.
3. The step takes that part, and it is gone.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from ..kernels import sum_of_squares
from .chunk import Chunk
from .collectives import RankGroup, all_reduce, reduce_scatter
from .lanes import Event, Lane
from .layout import Slot
from .tiers import BufferPool, Ledger, Payload, Tier

MAX_IN_FLIGHT = 4
"""Local buffers that wait for their reduction; one more and the backward pass waits for the oldest."""


@dataclass
class GradientTraffic:
    """What the gradients of one engine share: the lane, the buffers, and how many of those may be in flight."""

    group: RankGroup
    lane: Lane
    pool: BufferPool
    ledger: Ledger
    _in_flight: deque[tuple[Event, torch.Tensor]] = field(default_factory=deque)

    def hold(self, event: Event, buffer: torch.Tensor) -> None:
        """Keep `buffer` until `event`, before which the lane reads it."""
        self._in_flight.append((event, buffer))
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._release_oldest()

    def drain(self) -> None:
        while self._in_flight:
            self._release_oldest()

    def _release_oldest(self) -> None:
        event, buffer = self._in_flight.popleft()
        event.wait()
        self.pool.give_back(buffer)


class ChunkGradient:
    def __init__(self, chunk: Chunk, traffic: GradientTraffic) -> None:
        self.chunk = chunk
        self._traffic = traffic
        self._local: torch.Tensor | None = None  # 1D [numel], on the device
        self._landed: set[str] = set()
        self._reduced: torch.Tensor | None = None  # 1D [owned_numel], on the optimizer's tier
        self._sum_of_squares: torch.Tensor | None = None  # float64 [1], of the reduced gradient
        self._event: Event | None = None

    @property
    def has_local(self) -> bool:
        """Something landed that has not been reduced."""
        return self._local is not None

    def land(self, slot: Slot, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise RuntimeError(f"{slot.fqn}: a sparse gradient; build its embedding with sparse=False")
        if self._local is None:
            self._local = self._traffic.pool.take(self.chunk.spec.numel, gradient.dtype)
        if slot.fqn in self._landed:
            self._local = self._in_float32(self._local)
        place = self._local[slot.offset_numel : slot.stop_numel].view(slot.shape)
        if slot.fqn in self._landed:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self._landed.add(slot.fqn)

    def reduce(self, final: bool) -> None:
        """Start the reduction of what has landed; what has not counts as zero. A collective.

        `final`: no more is expected before the step, so that the norm is taken while the values are in the cache.
        """
        local = self._take_local()
        earlier = self.finish()  # the lane adds to it, so the reduction that made it must have ended
        self._sum_of_squares = None
        on_host = self.chunk.placement.optimizer_tier is Tier.HOST
        if not self._traffic.group.is_distributed and not on_host:
            if earlier is None:
                self._reduced = local
            else:
                self._reduced = self._in_float32(earlier).add_(local)
                self._traffic.pool.give_back(local)
            if final:
                self._sum_of_squares = sum_of_squares(self._reduced)
            return
        in_place = self.chunk.placement.owned_numel == self.chunk.spec.numel
        part = local if in_place else self._traffic.pool.take(self.chunk.placement.owned_numel, local.dtype)
        if on_host:
            self._reduced = self._host_target(earlier, part.dtype)
        else:
            self._reduced = part if earlier is None else self._in_float32(earlier)
        target, first = self._reduced, earlier is None

        def work() -> None:
            with torch.profiler.record_function(f"megalith::reduce {self.chunk.name}"):
                if self._traffic.group.is_distributed:
                    collective = all_reduce if in_place else reduce_scatter
                    collective(local, part, self._traffic.group, self.chunk.index)
                if target is not part and first:
                    target.copy_(part, non_blocking=True)
                elif target is not part:
                    target.add_(part.to(target.device))
                if final:
                    self._sum_of_squares = sum_of_squares(part if first else target)

        self._event = self._traffic.lane.submit(work, f"reduce {self.chunk.name}")
        if not in_place:
            self._traffic.hold(self._event, local)
        if target is not part:
            self._traffic.hold(self._event, part)

    def finish(self) -> torch.Tensor | None:
        """The reduced gradient [owned_numel] on the optimizer's tier, None when there was none. The host waits for it
        where it lies on the host."""
        if self._event is not None:
            self._event.wait()
            if self.chunk.placement.optimizer_tier is Tier.HOST:
                self._event.synchronize()
            self._event = None
        return self._reduced

    def squares(self) -> torch.Tensor | None:
        """The sum of squares of the reduced gradient, float64 [1], None when there is no gradient."""
        reduced = self.finish()
        if reduced is not None and self._sum_of_squares is None:
            self._sum_of_squares = sum_of_squares(reduced)
        return self._sum_of_squares

    def drop(self) -> None:
        """Forget everything, landed and reduced."""
        reduced = self.finish()
        if self._local is not None:
            self._traffic.pool.give_back(self._take_local())
        if reduced is not None and self.chunk.placement.optimizer_tier is Tier.DEVICE:
            self._traffic.pool.give_back(reduced)
        elif reduced is not None and reduced is not self.chunk.host_grad:
            self._traffic.ledger.add(Tier.HOST, Payload.GRADIENT, -reduced.nbytes)
        self._reduced = None
        self._sum_of_squares = None

    def _take_local(self) -> torch.Tensor:
        local = self._local
        if local is None:
            local = self._traffic.pool.take(self.chunk.spec.numel, self.chunk.spec.dtype)
        for slot in self.chunk.spec.slots:
            if slot.fqn not in self._landed:
                local[slot.offset_numel : slot.stop_numel].zero_()
        local[self.chunk.spec.used_numel :].zero_()  # padding counts in no norm
        self._local = None
        self._landed = set()
        return local

    def _in_float32(self, buffer: torch.Tensor) -> torch.Tensor:
        if buffer.dtype == torch.float32:
            return buffer
        wide = self._traffic.pool.take(buffer.numel(), torch.float32)
        wide.copy_(buffer)
        self._traffic.pool.give_back(buffer)
        return wide

    def _host_target(self, earlier: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Where a part of `dtype` goes on the host: the chunk's own slab, unless float32 is needed and the slab is
        narrower."""
        slab = self.chunk.host_grad
        if earlier is None and dtype == slab.dtype:
            return slab
        if earlier is not None and earlier.dtype == torch.float32:
            return earlier
        wide = torch.empty(slab.numel(), dtype=torch.float32)
        self._traffic.ledger.add(Tier.HOST, Payload.GRADIENT, wide.nbytes)
        return wide if earlier is None else wide.copy_(earlier)
