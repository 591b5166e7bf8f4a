"""The life of one chunk's gradient, from autograd to the step.

1. A parameter's gradient *lands*: it is copied into the chunk's local buffer [numel] and freed. Later micro-batches are
   added there, in float32.
2. The local buffer is *reduced* over the ranks, on the lane for collectives, into this rank's part [owned_numel], which
   is added to that of earlier micro-batches. Their sum stays on the device until the last one, if that has room for
   it, and is moved to where it waits for the step (`gradient_tier`); else it is added there.
3. The step takes that part, and it is gone: at once, or when the update that `step()` published has read it.

On one rank, with the optimizer state on the device or with updates in the backward pass, there is nothing to reduce and
nowhere to go: a gradient is kept as the tensor that autograd made.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..kernels import sum_of_squares
from .budgets import MAX_IN_FLIGHT
from .chunk import Chunk
from .collectives import RankGroup, all_reduce, reduce_scatter
from .disk_tensor import DiskTensor, in_memory
from .lanes import Event, Lane
from .layout import Slot
from .staging import Staging
from .tiers import BufferPool, Ledger, Payload, Tier, Work


@dataclass
class GradientTraffic:
    """What the gradients of one engine share: the lane, the buffers, and how many of those may be in flight."""

    group: RankGroup
    lane: Lane
    pool: BufferPool
    ledger: Ledger
    staging: Staging
    """Of the lane, to the drive."""
    _in_flight: deque[tuple[Event, list[torch.Tensor]]] = field(default_factory=deque)

    def hold(self, event: Event, buffers: list[torch.Tensor]) -> None:
        """Keep `buffers` until `event`, before which the lane uses them."""
        self._in_flight.append((event, buffers))
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._release_oldest()

    def drain(self) -> None:
        while self._in_flight:
            self._release_oldest()

    def _release_oldest(self) -> None:
        event, buffers = self._in_flight.popleft()
        event.wait()
        for buffer in buffers:
            self.pool.give_back(buffer)


@dataclass(frozen=True)
class GradientPart:
    """Elements [start, stop) of the owned part of a chunk's gradient."""

    start: int
    stop: int
    values: torch.Tensor | DiskTensor  # 1D [stop - start]


class ChunkGradient:
    def __init__(self, chunk: Chunk, traffic: GradientTraffic) -> None:
        self.chunk = chunk
        self._traffic = traffic
        self._kept: dict[str, torch.Tensor] = {}  # by name, each 1D [slot numel], where gradients stay
        self._local: torch.Tensor | None = None  # 1D [numel], on the device
        self._landed: set[str] = set()
        self._reduced: torch.Tensor | DiskTensor | None = None  # 1D [owned_numel]
        self._is_on_device = False  # that
        self._is_waiting = False  # there for more, to leave later
        self._sum_of_squares: float | torch.Tensor | None = None  # of all parts
        self._event: Event | None = None

    @property
    def _stays(self) -> bool:
        """There is nothing to reduce, and nowhere to go."""
        return not self._traffic.group.is_distributed and self._tier is Tier.DEVICE

    @property
    def is_empty(self) -> bool:
        return not self._kept and self._local is None and self._reduced is None

    @property
    def is_complete(self) -> bool:
        """Every parameter's has landed."""
        return len(self._kept if self._stays else self._landed) == len(self.chunk.spec.slots)

    @property
    def waiting_bytes(self) -> int:
        """What the sum of micro-batches takes where it waits on the device; 0 for one that does not leave."""
        return 0 if self._tier is Tier.DEVICE else 4 * self.chunk.placement.owned_numel

    @property
    def has_local(self) -> bool:
        """Something landed that has not been reduced."""
        return self._local is not None

    def land(self, slot: Slot, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise RuntimeError(f"{slot.fqn}: a sparse gradient; build its embedding with sparse=False")
        self._sum_of_squares = None
        if self._stays:
            self._keep(slot.fqn, gradient.contiguous().view(-1))
            return
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

    def _keep(self, fqn: str, gradient: torch.Tensor) -> None:
        earlier = self._kept.get(fqn)
        if earlier is not None:
            self._enter(-earlier.nbytes)
            gradient = earlier.float().add_(gradient)
        self._kept[fqn] = gradient
        self._enter(gradient.nbytes)

    def _enter(self, nbytes: int) -> None:
        self._traffic.ledger.add(Tier.DEVICE, Payload.GRADIENT, nbytes)

    def reduce(self, final: bool, waits: bool = False) -> None:
        """Start the reduction of what has landed; what has not counts as zero. A collective.

        `final`: no more is expected before the step, so that the norm is taken while the values are in the cache.
        `waits`: for more micro-batches, with their sum on the device, wherever it leaves for then.
        """
        if self._stays:
            return
        local = self._take_local()
        pool, group, owned_numel = self._traffic.pool, self._traffic.group, self.chunk.placement.owned_numel
        in_place = owned_numel == self.chunk.spec.numel
        part = local if in_place else pool.take(owned_numel, local.dtype)
        received = pool.take(group.scratch_numel(local.numel()), local.dtype)

        def exchange() -> None:
            if group.is_distributed:
                collective = all_reduce if in_place else reduce_scatter
                collective(local, part, received, group, self.chunk.index)
                self.chunk.did(Work.COLLECTIVE, (2 if in_place else 1) * group.received_bytes(local))

        self._collect(part, [received] if in_place else [received, local], exchange, final, waits)

    def leave(self) -> None:
        """Let a sum go that waits on the device for micro-batches, after the last of which there was none."""
        if self._is_waiting:
            self._collect(None, [], lambda: None, final=True, waits=False)

    def _collect(
        self,
        part: torch.Tensor | None,
        used: list[torch.Tensor],
        exchange: Callable[[], None],
        final: bool,
        waits: bool,
    ) -> None:
        """Add `part` (1D [owned_numel], there after `exchange`) to what there is of earlier micro-batches, and have the
        sum move to its tier, unless it `waits`."""
        earlier = self.finish()  # the lane adds to it, so the reduction that made it must have ended
        outside = None if self._is_on_device else earlier  # to be added there
        self._sum_of_squares = None
        value = part if earlier is None or outside is not None else self._in_float32(earlier)
        if value is not part and part is not None:
            used.append(part)
        target = total = update = None
        self._is_on_device = self._tier is Tier.DEVICE or waits
        self._is_waiting = waits and self._tier is not Tier.DEVICE
        if self._is_on_device:
            self._reduced = value
        else:
            used.append(value)
            self._reduced = target = self._place(outside, value.dtype)
            update = self.chunk.pending  # reads what the last step's gradient left there
        if isinstance(target, DiskTensor) and outside is not None:
            total = self._traffic.pool.take(value.numel(), torch.float32)  # on its way through memory to the drive
            used.append(total)

        def work() -> None:
            if update is not None:
                update.wait_for_values()
            with torch.profiler.record_function(f"megalith::reduce {self.chunk.name}"):
                exchange()
                if value is not part and part is not None:
                    value.add_(part)
                summed = value if target is None else self._move(value, target, outside, total)
                if final:
                    self._sum_of_squares = self._squares_of(summed)

        self._event = self._traffic.lane.submit(work, f"reduce {self.chunk.name}")
        self._traffic.hold(self._event, used)

    def _move(
        self,
        value: torch.Tensor,
        target: torch.Tensor | DiskTensor,
        outside: torch.Tensor | DiskTensor | None,
        total: torch.Tensor | None,
    ) -> torch.Tensor:
        """`value` from the device to `target`, added to what is outside. Returns the sum, wherever it is at hand."""
        self.chunk.did(Work.LINK_OUT, value.nbytes)
        if isinstance(target, DiskTensor):
            summed = value if outside is None else self._add_to_disk(outside, value, total)
            self._traffic.staging.write(summed, target)
            return summed
        if outside is None:
            target.copy_(value, non_blocking=True)
            return value
        return target.add_(value.to(target.device))

    def _place(self, outside: torch.Tensor | DiskTensor | None, dtype: torch.dtype) -> torch.Tensor | DiskTensor:
        """Where a part of `dtype` goes off the device."""
        if self._tier is Tier.HOST:
            return self._host_target(outside, dtype)
        return self.chunk.rest_grad.of(dtype if outside is None else torch.float32)

    @property
    def _tier(self) -> Tier:
        return self.chunk.placement.gradient_tier

    def _add_to_disk(self, earlier: DiskTensor, part: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """total = earlier + part, in float32."""
        narrow = total.view(earlier.dtype)[: total.numel()]
        self._traffic.staging.read(earlier, narrow)
        if earlier.dtype != torch.float32:
            total.copy_(narrow.clone())
        return total.add_(part)

    def finish(self) -> torch.Tensor | DiskTensor | None:
        """The reduced gradient [owned_numel], None when there is none. The host waits for it where it lies off the
        device."""
        if self._event is not None:
            self._event.wait()
            if not self._is_on_device:
                self._event.synchronize()
            self._event = None
        return self._reduced

    def parts(self) -> list[GradientPart]:
        """What the step consumes, in storage order."""
        if self._stays:
            return [
                GradientPart(slot.offset_numel, slot.stop_numel, self._kept[slot.fqn])
                for slot in self.chunk.spec.slots
                if slot.fqn in self._kept
            ]
        reduced = self.finish()
        return [] if reduced is None else [GradientPart(0, reduced.numel(), reduced)]

    def squares(self) -> float | torch.Tensor:
        """The sum of squares of all parts; a tensor (float64) where it may still be computed."""
        self.finish()  # the lane, which is a stream of its own on a GPU, may have summed them
        if self._sum_of_squares is None:
            values = [in_memory(part.values) for part in self.parts()]
            self._sum_of_squares = self._squares_of(*values).sum() if values else 0.0
        return self._sum_of_squares

    def _squares_of(self, *values: torch.Tensor) -> torch.Tensor:
        self.chunk.did(Work.NORM, sum(each.nbytes for each in values))
        return sum_of_squares(*values)

    def hand_over(self) -> tuple[list[GradientPart], Callable[[], None]]:
        """The parts, for an update on a lane, and what to call when it is done with them."""
        parts, reduced = self.parts(), self._reduced
        kept_bytes = sum(kept.nbytes for kept in self._kept.values())
        is_extra = self._is_extra(reduced)
        self._reduced = None
        self._sum_of_squares = None
        self._kept.clear()

        def release() -> None:
            self._enter(-kept_bytes)
            if is_extra:
                self._traffic.ledger.add(Tier.HOST, Payload.GRADIENT, -reduced.nbytes)

        return parts, release

    def drop(self) -> None:
        """Forget everything, landed and reduced."""
        for kept in self._kept.values():
            self._enter(-kept.nbytes)
        self._kept.clear()
        reduced = self.finish()
        if self._local is not None:
            self._traffic.pool.give_back(self._take_local())
        if reduced is not None and self._is_on_device:
            self._traffic.pool.give_back(reduced)
        elif self._is_extra(reduced):
            self._traffic.ledger.add(Tier.HOST, Payload.GRADIENT, -reduced.nbytes)
        self._reduced = None
        self._is_waiting = False
        self._sum_of_squares = None

    def _is_extra(self, reduced: torch.Tensor | DiskTensor | None) -> bool:
        """Whether it has host memory of its own, for float32 sums."""
        off_device = self._tier is Tier.HOST and not self._is_on_device
        return off_device and reduced is not None and reduced is not self.chunk.rest_grad

    def _take_local(self) -> torch.Tensor:
        local = self._local
        if local is None:
            local = self._traffic.pool.take(self.chunk.spec.numel, self.chunk.spec.dtype)
        for slot in self.chunk.spec.slots:
            if slot.fqn not in self._landed:
                local[slot.offset_numel : slot.stop_numel].zero_()
        for padding in self.chunk.spec.padding():
            local[padding].zero_()  # it counts in no norm
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
        slab = self.chunk.rest_grad
        if earlier is None and dtype == slab.dtype:
            return slab
        if earlier is not None and earlier.dtype == torch.float32:
            return earlier
        wide = torch.empty(slab.numel(), dtype=torch.float32, device=slab.device)
        self._traffic.ledger.add(Tier.HOST, Payload.GRADIENT, wide.nbytes)
        return wide if earlier is None else wide.copy_(earlier)
