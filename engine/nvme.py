"""Named flat buffers in one preallocated file: read and written by a pool of threads, several at a time.

It knows nothing of chunks. A transfer is cut into pieces, one system call each, which the threads take in any order:
`os.preadv` and `os.pwritev` let go of the interpreter's lock, so that the drive sees as many requests as there are
threads. A piece goes straight between the drive and the caller's tensor where that is aligned (`aligned_empty`), and
else through the thread's part of a ring of aligned memory.
"""

import concurrent.futures
import os
import queue
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import Tensor

from .direct_io import ALIGNMENT, DirectFile, aligned_empty, round_down, round_up
from .job_folder import DATA_SUFFIX, JobFolder
from .thread_pool import ThreadPool

CHECKSUM_BYTES = 2**18
"""One checksum guards this many bytes: with checksums on, the least that is read or written."""


THREAD_NAME = "megalith-nvme"


class NvmeError(RuntimeError):
    """A transfer failed, or there is no room; the message names buffer and file, `__cause__` is the system's error."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a buffer that are moved at once: [start, stop) are wanted, [block_start, block_stop) go over the wire,
    since files are read and written by whole blocks."""

    start: int
    stop: int
    block_start: int
    block_stop: int

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (self.block_start, self.block_stop)


def cut(start: int, stop: int, buffer_bytes: int, block_bytes: int, piece_bytes: int) -> list[Piece]:
    """[start, stop) of a buffer, cut at multiples of `piece_bytes`, which is a multiple of `block_bytes`."""
    pieces = []
    end = round_up(buffer_bytes, ALIGNMENT)  # the last block of a buffer may be a short one
    while start < stop:
        piece_stop = min(stop, round_down(start, piece_bytes) + piece_bytes)
        block_stop = min(round_up(piece_stop, block_bytes), end)
        pieces.append(Piece(start, piece_stop, round_down(start, block_bytes), block_stop))
        start = piece_stop
    return pieces


class Handle:
    """A transfer in flight. Has the methods of the lanes' `Event`."""

    def __init__(self, label: str, timeout_s: float) -> None:
        self._label = label
        self._timeout_s = timeout_s
        self._futures: list[Future] = []

    def wait(self) -> None:
        """Block until every byte is where it belongs. Raises NvmeError."""
        self.settle()
        for future in self._futures:
            future.result()

    synchronize = wait

    def settle(self) -> None:
        """Block until the transfer has ended, well or not. Raises NvmeError after the time-out."""
        if concurrent.futures.wait(self._futures, self._timeout_s).not_done:
            raise NvmeError(f"{self._label}: the drive has not answered in {self._timeout_s:g} s")

    def done(self) -> bool:
        return all(future.done() for future in self._futures)


@dataclass(frozen=True)
class Transfer:
    """What is in flight on a buffer: bytes [start, stop), whole blocks."""

    start: int
    stop: int
    writes: bool
    handle: Handle

    def conflicts(self, other: "Transfer") -> bool:
        return (self.writes or other.writes) and self.start < other.stop and other.start < self.stop


class NvmeStore:
    """Buffers of fixed `sizes` (bytes by name) in a file of their own. A buffer that was never written reads as zeros.

    All space is taken here, in a folder of this process inside `folder`, gone when the store is closed or collected or
    when the process ends; that of a process that was killed is removed by the next one to start or to end. A rank makes
    one store. `ring_bytes` is the memory for unaligned transfers, shared by `threads`.

    `checksums` guards every block with a CRC-32 that a read is compared with: `CHECKSUM_BYTES` is then the block.
    `lane_delay` (seconds) is slept before each piece: for tests that look for a missing wait, as `open_file` is for
    those that inject faults. `tell` is called, on a thread of the store's, with what failed, before somebody waits for
    it. Raises NvmeError if the space is not there, with what is needed and what is free.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        rank: int,
        sizes: Mapping[str, int],
        *,
        checksums: bool = False,
        ring_bytes: int = 2**25,
        threads: int = 8,
        lane_delay: Callable[[], float] | None = None,
        timeout_s: float = 600.0,
        open_file: Callable[[str, int], DirectFile] = DirectFile,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._block_bytes = CHECKSUM_BYTES if checksums else ALIGNMENT
        self._piece_bytes = round_down(ring_bytes // threads, self._block_bytes)
        if self._piece_bytes == 0:
            raise ValueError(f"ring_bytes={ring_bytes}: {threads} threads need at least {threads * self._block_bytes}")
        self._sizes = dict(sizes)
        self._offsets: dict[str, int] = {}
        self.nbytes = 0
        """Of the file: every buffer begins on a block of its own."""
        for name, nbytes in self._sizes.items():
            self._offsets[name] = self.nbytes
            self.nbytes += round_up(nbytes, ALIGNMENT)
        self._checksums: dict[str, dict[int, int]] | None = {name: {} for name in sizes} if checksums else None
        self._timeout_s = timeout_s
        self._delay = lane_delay
        self._tell = tell
        self._lock = threading.Lock()
        self._in_flight: dict[str, list[Transfer]] = {name: [] for name in sizes}
        self.bytes_read = self.bytes_written = 0
        """Over the wire, whole blocks."""

        ring = aligned_empty(threads * self._piece_bytes).numpy()
        self._ring: queue.SimpleQueue[numpy.ndarray] = queue.SimpleQueue()
        for start in range(0, len(ring), self._piece_bytes):
            self._ring.put(ring[start : start + self._piece_bytes])
        try:
            job = JobFolder(folder, f"rank{rank}")
            try:
                self._file = open_file(str(job.path / f"rank{rank}{DATA_SUFFIX}"), self.nbytes)
            except BaseException:
                job.remove()
                raise
        except OSError as error:
            raise NvmeError(f"rank {rank}: {error}") from error
        self._pool = ThreadPool(threads, THREAD_NAME)
        # Runs at the interpreter's exit too, after the pool's own end.
        self._finalizer = weakref.finalize(self, _release, self._pool, self._file, job, os.getpid())

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def direct(self) -> bool:
        """Whether transfers pass the page cache by."""
        return self._file.direct

    def read(self, name: str, out: Tensor, offset_bytes: int = 0, urgent: bool = False) -> Handle:
        """Fill `out` (contiguous, on the CPU, any dtype) with the buffer's bytes from `offset_bytes` on. `out` is not
        to be touched before the handle was waited for. `urgent`: before what others have asked for and is not."""
        return self._submit(name, out, offset_bytes, writes=False, urgent=urgent)

    def write(self, name: str, source: Tensor, offset_bytes: int = 0) -> Handle:
        """Write the bytes of `source`, which is not to be changed before the handle was waited for."""
        return self._submit(name, source, offset_bytes, writes=True, urgent=False)

    def close(self) -> None:
        """What is in flight is done first; the file and its folder are gone afterwards."""
        self._finalizer()

    def _submit(self, name: str, tensor: Tensor, offset_bytes: int, writes: bool, urgent: bool) -> Handle:
        if not self._finalizer.alive:
            raise RuntimeError(f"the NVMe store is closed and cannot serve {name!r}")
        values = self._bytes_of(name, tensor, offset_bytes)
        stop = offset_bytes + len(values)
        pieces = cut(offset_bytes, stop, self._sizes[name], self._block_bytes, self._piece_bytes)
        verb = "write" if writes else "read"
        handle = Handle(f"{verb} of {name!r} in {self.path}", self._timeout_s)
        if not pieces:
            return handle
        work = self._write_piece if writes else self._read_piece
        transfer = Transfer(pieces[0].block_start, pieces[-1].block_stop, writes, handle)
        jobs = [partial(self._run, name, work, piece, values, offset_bytes) for piece in pieces]
        while conflicting := self._enter(name, transfer, jobs, urgent):
            for earlier in conflicting:
                earlier.handle.settle()  # its error is for whoever waits for it
        return handle

    def _enter(self, name: str, transfer: Transfer, jobs: list[Callable[[], None]], urgent: bool) -> list[Transfer]:
        """Start a transfer, unless earlier ones that touch the same blocks must end first: those are returned."""
        with self._lock:
            waiting = [other for other in self._in_flight[name] if not other.handle.done()]
            self._in_flight[name] = waiting
            conflicting = [other for other in waiting if transfer.conflicts(other)]
            if not conflicting:
                transfer.handle._futures = [self._pool.submit(job, urgent) for job in jobs]
                waiting.append(transfer)
            return conflicting

    def _run(self, name: str, work: Callable, piece: Piece, values: numpy.ndarray, values_start: int) -> None:
        """On a thread of the pool. `values` are the caller's bytes from `values_start` of the buffer on."""
        if self._delay is not None:
            time.sleep(self._delay())
        wanted = values[piece.start - values_start : piece.stop - values_start]
        bounce = self._ring.get()
        try:
            work(name, piece, wanted, bounce)
        except OSError as error:
            verb = "write" if work == self._write_piece else "read"
            message = f"{verb} of {name!r}, bytes {piece.start} to {piece.stop}, in {self.path}: {error}"
            self._tell(message)
            raise NvmeError(message) from error
        except NvmeError as error:  # a checksum
            self._tell(str(error))
            raise
        finally:
            self._ring.put(bounce)

    def _read_piece(self, name: str, piece: Piece, out: numpy.ndarray, bounce: numpy.ndarray) -> None:
        straight = piece.whole and _is_aligned(out)
        blocks = out if straight else bounce[: piece.block_stop - piece.block_start]
        self._read_blocks(name, piece.block_start, blocks)
        if not straight:
            numpy.copyto(out, blocks[piece.start - piece.block_start :][: len(out)])

    def _write_piece(self, name: str, piece: Piece, source: numpy.ndarray, bounce: numpy.ndarray) -> None:
        blocks = source
        if not (piece.whole and _is_aligned(source)):
            blocks = bounce[: piece.block_stop - piece.block_start]
            size = self._block_bytes
            # The rest of a block that is written in part keeps what it holds; past the buffer's end there is nothing.
            edges = {round_down(piece.start, size)} if piece.start % size else set()
            if piece.stop % size and piece.stop < self._sizes[name]:
                edges.add(round_down(piece.stop, size))
            for edge in edges:
                self._read_blocks(name, edge, blocks[edge - piece.block_start :][:size])
            numpy.copyto(blocks[piece.start - piece.block_start :][: len(source)], source)
        self._file.write(blocks, self._offsets[name] + piece.block_start)
        if self._checksums is not None:
            for start in range(0, len(blocks), self._block_bytes):
                crc = zlib.crc32(blocks[start : start + self._block_bytes])
                self._checksums[name][piece.block_start + start] = crc
        with self._lock:
            self.bytes_written += len(blocks)

    def _read_blocks(self, name: str, start: int, blocks: numpy.ndarray) -> None:
        """Whole blocks of a buffer, from byte `start` on, compared with their checksums."""
        self._file.read(blocks, self._offsets[name] + start)
        with self._lock:
            self.bytes_read += len(blocks)
        if self._checksums is None:
            return
        for at in range(0, len(blocks), self._block_bytes):
            expected = self._checksums[name].get(start + at)  # None: never written
            found = zlib.crc32(blocks[at : at + self._block_bytes])
            if expected is not None and found != expected:
                raise NvmeError(
                    f"{name!r} in {self.path} is corrupt in the {self._block_bytes} bytes from {start + at} on: their "
                    f"checksum is {found:#010x}, and {expected:#010x} was written"
                )

    def _bytes_of(self, name: str, tensor: Tensor, offset_bytes: int) -> numpy.ndarray:
        """The tensor's own memory, uint8 [nbytes]. Raises for what does not fit the buffer."""
        if name not in self._sizes:
            raise KeyError(f"the NVMe store has no buffer {name!r}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name!r}: a transfer needs a contiguous tensor on the CPU, not one on {tensor.device}")
        if offset_bytes < 0 or offset_bytes + tensor.nbytes > self._sizes[name]:
            raise ValueError(
                f"{name!r} has {self._sizes[name]} bytes: {tensor.nbytes} at offset {offset_bytes} are out of it"
            )
        return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _is_aligned(values: numpy.ndarray) -> bool:
    return values.ctypes.data % ALIGNMENT == 0


def _release(pool: ThreadPool, file: DirectFile, job: JobFolder, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the store, whose files are not its own
        pool.shutdown()
        file.close()
        job.remove()
