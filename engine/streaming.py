"""Updates of chunks of which something is on a drive: piece by piece through a ring of host buffers.

While one piece is updated, the next ones, be they of this chunk or of those that are updated after it, are read, and
the ones before are written. So an update of any size holds the ring and nothing else, and ends no sooner and hardly
later than the slowest of reading, computing and writing.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .chunk import Chunk, payload_part
from .disk_tensor import DiskTensor
from .nvme import Handle
from .streaming_sizes import SLOTS, ring_bytes_of
from .tiers import HostSlab, PieceBuffers, Work
from .update import PAYLOADS, ChunkUpdate, Run, adam_runs, pieces_of


@dataclass
class Slot:
    """Host memory for one piece."""

    buffers: PieceBuffers
    writes: list[Handle] = field(default_factory=list)
    """Under way from the buffers."""

    @property
    def is_free(self) -> bool:
        return all(write.done() for write in self.writes)


@dataclass
class Piece:
    """Owned elements [start, stop) of a chunk, on their way through the ring."""

    chunk: Chunk
    start: int
    stop: int
    slot: Slot
    version: int
    """Of the chunk, when the reads began."""
    reads: list[Handle] = field(default_factory=list)

    def part(self, payload: str) -> slice:
        return payload_part(payload, self.start, self.stop)


Source = ChunkUpdate | Chunk
"""What will be read: for an update that is known, or for one that is foreseen."""


class UpdateStream:
    """Belongs to the lane of the updates."""

    def __init__(
        self, piece_numel: int, itemsizes: dict[str, int], device: torch.device, weights_at_hand: bool
    ) -> None:
        """`itemsizes`: of what goes through the ring (`slot_itemsizes`). `weights_at_hand`: updates come with those
        that are at rest on a drive."""
        self._weights_at_hand = weights_at_hand
        self._piece_numel = piece_numel
        slab = HostSlab(ring_bytes_of(piece_numel, itemsizes), device)
        self._slots = deque(
            Slot(PieceBuffers({p: slab.take(itemsize * piece_numel, torch.uint8) for p, itemsize in itemsizes.items()}))
            for _ in range(SLOTS)
        )  # the longest unused first
        self._ahead: deque[Piece] = deque()  # being read, in the order in which they are needed

    @torch.no_grad()
    def execute(self, update: ChunkUpdate, coming: Sequence[Source]) -> list[Handle]:
        """Update a chunk; `coming` are read ahead as far as the ring goes. Returns the last writes, which may still be
        under way: weight and state are those of the step when all have ended."""
        writes: list[Handle] = []
        wanted = list(self._cut(update))
        for number, (start, stop, runs) in enumerate(wanted):
            piece = self._take(update.chunk, start, stop, runs)
            rest = [(update.chunk, *each) for each in wanted[number + 1 :]]
            self._read_ahead(rest, coming, most=SLOTS - 2)
            writes = [write for write in writes if not write.done() or write.wait()]
            writes += self._finish(piece, update, runs)
        update.chunk.version += 1
        return writes

    @torch.no_grad()
    def read_ahead(self, coming: Sequence[Source]) -> None:
        """With nothing to update for a while: fill the ring with what is foreseen."""
        for slot in self._slots:
            for write in slot.writes:
                write.settle()
        self._read_ahead([], coming, most=SLOTS)

    def _cut(self, source: Source) -> Iterator[tuple[int, int, list[Run]]]:
        """(start, stop, runs) of the pieces in which something is, or may be, updated."""
        chunk, runs = (source, None) if isinstance(source, Chunk) else (source.chunk, source.runs)
        return pieces_of(chunk, runs, self._piece_numel)

    def _take(self, chunk: Chunk, start: int, stop: int, runs: list[Run]) -> Piece:
        """The piece, whose reads have begun."""
        while self._ahead:
            piece = self._ahead.popleft()
            if (piece.chunk, piece.start, piece.version) == (chunk, start, chunk.version):
                return piece
            for read in piece.reads:  # foreseen wrongly
                read.settle()
            self._slots.append(piece.slot)
        return self._begin(chunk, start, stop, runs)

    def _read_ahead(self, rest: list[tuple], coming: Sequence[Source], most: int) -> None:
        """Begin to read what follows, into slots that need no wait; one that does is waited for when nothing else is
        being read."""
        count = len(self._ahead)
        following = (each for source in coming for each in self._named(source))
        for number, (chunk, start, stop, runs) in enumerate((*rest, *following) if len(rest) < most else rest):
            if number >= most:
                return
            if number < count:
                continue  # begun already
            if not self._slots or not (self._slots[0].is_free or not self._ahead):
                return
            self._ahead.append(self._begin(chunk, start, stop, runs))

    def _named(self, source: Source) -> Iterator[tuple]:
        chunk = source if isinstance(source, Chunk) else source.chunk
        return ((chunk, *each) for each in self._cut(source))

    def _begin(self, chunk: Chunk, start: int, stop: int, runs: list[Run]) -> Piece:
        """Take the next slot, when what it held is written, and start to read."""
        slot = self._slots.popleft()
        for write in slot.writes:
            write.wait()
        slot.writes = []
        piece = Piece(chunk, start, stop, slot, chunk.version)
        for payload in PAYLOADS:
            values = getattr(chunk, payload)
            if isinstance(values, DiskTensor) and not (payload == "weight" and self._weights_at_hand):
                source = values[piece.part(payload)]
                piece.reads.append(source.begin_read(slot.buffers.view(payload, values.dtype, 0, source.numel())))
        for run in runs:
            if isinstance(run.gradient, DiskTensor):
                piece.reads.append(run.gradient.begin_read(self._gradient(piece, run)))
        return piece

    def _finish(self, piece: Piece, update: ChunkUpdate, runs: list[Run]) -> list[Handle]:
        """Update a piece when it has been read, and start to write it."""
        for read in piece.reads:
            read.wait()
        chunk, slot = piece.chunk, piece.slot
        sources = {payload: getattr(chunk, payload) for payload in PAYLOADS}
        if update.weight is not None:
            sources["weight"] = update.weight
        tensors: dict[str, torch.Tensor | None] = {}
        for payload, values in sources.items():
            part = piece.part(payload)
            if isinstance(values, DiskTensor) or (values is not None and values.is_cuda):
                tensors[payload] = slot.buffers.view(payload, values.dtype, 0, part.stop - part.start)
            else:
                tensors[payload] = None if values is None else values.detach()[part]
            if isinstance(values, torch.Tensor) and values.is_cuda:
                tensors[payload].copy_(values.detach()[part])
        runs = [replace(run, gradient=self._in_host_memory(piece, run)) for run in runs]
        chunk.did(Work.HOST_ADAM, sum(run.stop - run.start for run in runs))
        with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
            adam_runs(tensors, piece.start, runs, update)
        for payload, updated in tensors.items():
            at_rest, source, part = getattr(chunk, payload), sources[payload], piece.part(payload)
            if isinstance(at_rest, DiskTensor):
                slot.writes.append(at_rest[part].begin_write(updated))
            if isinstance(source, torch.Tensor) and source.is_cuda:
                source.detach()[part].copy_(updated)
        self._slots.append(slot)
        return list(slot.writes)

    def _in_host_memory(self, piece: Piece, run: Run) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The gradient of a run, which has been read if it was on the drive."""
        if isinstance(run.gradient, DiskTensor):
            return self._gradient(piece, run)
        parts = run.gradient if isinstance(run.gradient, tuple) else (run.gradient,)
        if not parts[0].is_cuda:
            return run.gradient
        start, stop = run.start - piece.start, run.stop - piece.start
        copies = piece.slot.buffers.view("gradient", parts[0].dtype, start, stop)
        for copy, part in zip(copies.split([part.numel() for part in parts]), parts, strict=True):
            copy.copy_(part)
        return copies

    def _gradient(self, piece: Piece, run: Run) -> torch.Tensor:
        return piece.slot.buffers.view("gradient", run.gradient.dtype, run.start - piece.start, run.stop - piece.start)
