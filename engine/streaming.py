"""Updates of chunks of which something is on a drive: piece by piece through a ring of host buffers.

While one piece is updated, the next one, be it of this chunk or of the one that is updated after it, is read, and the
one before is written. So an update of any size holds the ring and nothing else, and ends no sooner and hardly later
than the slowest of reading, computing and writing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from .config import Precision
from .disk_tensor import DiskTensor
from .lanes import Event
from .nvme import Handle
from .streaming_sizes import SLOTS, ring_bytes_of, slot_itemsizes
from .tiers import HostSlab
from .update import PAYLOADS, ChunkUpdate, Run, adam_runs


@dataclass
class Slot:
    """Host memory for one piece."""

    buffers: dict[str, torch.Tensor]  # uint8, by payload
    writes: list[Handle] = field(default_factory=list)
    """Under way from the buffers."""

    def view(self, payload: str, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        return self.buffers[payload][start * dtype.itemsize : stop * dtype.itemsize].view(dtype)


@dataclass
class Piece:
    """Owned elements [start, stop) of a chunk, on their way through the ring."""

    update: ChunkUpdate
    start: int
    stop: int
    runs: list[Run]
    slot: Slot | None = None
    reads: list[Handle] = field(default_factory=list)

    @property
    def part(self) -> slice:
        return slice(self.start, self.stop)


class UpdateStream:
    """Belongs to the lane of the updates."""

    def __init__(self, piece_numel: int, precision: Precision, pin: bool) -> None:
        self._piece_numel = piece_numel
        slab = HostSlab(ring_bytes_of(piece_numel, precision), pin)
        sizes = slot_itemsizes(precision)
        self._slots = [
            Slot({payload: slab.take(itemsize * piece_numel, torch.uint8) for payload, itemsize in sizes.items()})
            for _ in range(SLOTS)
        ]
        self._next_slot = 0
        self._ahead: Piece | None = None

    @torch.no_grad()
    def execute(self, update: ChunkUpdate, following: ChunkUpdate | None) -> list[Handle]:
        """Update a chunk; `following` is the one that is given next. Returns the last writes, which may still be under
        way: weight and state are those of the step when all have ended."""
        pieces = list(self._pieces(update))
        if not pieces:  # this rank's part is padding
            return []
        ahead = next(self._pieces(following), None) if following is not None else None
        if self._ahead is not None:
            if self._ahead.update is not update:
                raise RuntimeError(f"chunk {update.chunk.name} is not the one that was said to follow")
            pieces[0] = self._ahead  # whose reads the chunk before has begun
        self._ahead = None
        writes: list[Handle] = []
        for piece, coming in zip(pieces, [*pieces[1:], ahead], strict=True):
            for each in (piece, coming):
                if each is not None and each.slot is None:
                    self._begin(each)
            writes = [write for write in writes if not write.done() or write.wait()]
            writes += self._finish(piece)
        self._ahead = ahead
        return writes

    def _pieces(self, update: ChunkUpdate) -> Iterator[Piece]:
        """Those in which something is updated."""
        numel = update.chunk.placement.owned_numel
        for start in range(0, numel, self._piece_numel):
            stop = min(start + self._piece_numel, numel)
            runs = [run.cut(start, stop) for run in update.runs if run.start < stop and start < run.stop]
            if runs:
                yield Piece(update, start, stop, runs)

    def _begin(self, piece: Piece) -> None:
        """Take the next slot, when what it held is written, and start to read."""
        piece.slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % SLOTS
        for write in piece.slot.writes:
            write.wait()
        piece.slot.writes = []
        for payload in PAYLOADS:
            values = getattr(piece.update.chunk, payload)
            if isinstance(values, DiskTensor):
                buffer = piece.slot.view(payload, values.dtype, 0, piece.stop - piece.start)
                piece.reads.append(values[piece.part].begin_read(buffer))
        for run in piece.runs:
            if isinstance(run.gradient, DiskTensor):
                piece.reads.append(run.gradient.begin_read(self._gradient(piece, run)))

    def _finish(self, piece: Piece) -> list[Handle]:
        """Update a piece when it has been read, and start to write it."""
        for read in piece.reads:
            read.wait()
        chunk, slot = piece.update.chunk, piece.slot
        tensors: dict[str, torch.Tensor | None] = {}
        for payload in PAYLOADS:
            values = getattr(chunk, payload)
            if isinstance(values, DiskTensor) or (values is not None and values.is_cuda):
                tensors[payload] = slot.view(payload, values.dtype, 0, piece.stop - piece.start)
            else:
                tensors[payload] = None if values is None else values.detach()[piece.part]
            if isinstance(values, torch.Tensor) and values.is_cuda:
                tensors[payload].copy_(values.detach()[piece.part])
        runs = [
            replace(run, gradient=self._gradient(piece, run)) if isinstance(run.gradient, DiskTensor) else run
            for run in piece.runs
        ]
        with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
            adam_runs(tensors, piece.start, runs, piece.update.factor)
        for payload, updated in tensors.items():
            values = getattr(chunk, payload)
            if isinstance(values, DiskTensor):
                slot.writes.append(values[piece.part].begin_write(updated))
            elif values is not None and values.is_cuda:
                values.detach()[piece.part].copy_(updated)
        return list(slot.writes)

    def _gradient(self, piece: Piece, run: Run) -> torch.Tensor:
        return piece.slot.view("gradient", run.gradient.dtype, run.start - piece.start, run.stop - piece.start)


class WrittenEvent:
    """Of an update whose last writes may outlive its place on the lane."""

    def __init__(self, updated: Event, writes: list[Handle]) -> None:
        self._updated = updated
        self._writes = writes  # filled by the lane

    def wait(self) -> None:
        self._updated.wait()
        for write in self._writes:
            write.wait()

    synchronize = wait
