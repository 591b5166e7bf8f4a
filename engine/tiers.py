"""Tiers of memory, the ledger of what is stored on each and of what is moved, and the host's slabs."""

import ctypes
import mmap
import threading
import weakref
from collections import Counter
from enum import Enum

import torch

from .disk_tensor import DiskTensor
from .nvme import NvmeStore

_libc = ctypes.CDLL(None)


class Tier(Enum):
    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"

    __hash__ = object.__hash__  # Enum's is written in Python, and the ledger looks members up with every gradient


class Payload(Enum):
    """What a chunk has one of per kind."""

    WEIGHT = "weight"
    """The compute weight at rest: this rank's shard in stage 3, else the whole."""
    GATHERED = "gathered"
    """The whole weights of an unsharded chunk, freed when it is resharded."""
    GRADIENT = "gradient"
    """Transient: from the backward pass to the step."""
    MASTER = "master"
    """bf16: the master's low 16 bits. fp16: the float32 master. fp32: nothing, the weight is the master."""
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    SCALES = "scales"
    """Of moments in 8 bits: two float32 for every 256 elements."""
    ACTIVATION = "activation"
    """Saved inputs of checkpointed blocks on the host, between the forward and the backward pass."""
    STAGING = "staging"
    """Buffers that something goes through: on the host what is on a drive, on the device what it updates of the host's
    state."""

    __hash__ = object.__hash__


class Work(Enum):
    """What takes time beside the model's own computation: moves in bytes, Adam in parameters."""

    LINK_IN = "link in"
    """From the host to the device."""
    LINK_OUT = "link out"
    DISK_READ = "disk read"
    DISK_WRITE = "disk write"
    COLLECTIVE = "collective"
    """What this rank receives."""
    NORM = "norm"
    """Of gradients, which are read for it."""
    HOST_ADAM = "host Adam"
    DEVICE_ADAM = "device Adam"

    __hash__ = object.__hash__


class OutOfBudgetError(MemoryError):
    """A tier's budget does not hold what must be stored on it; the message has both byte counts."""


class Ledger:
    """Bytes stored by tier and payload, now and at most. Counts what the engine allocates, to the byte. Lanes enter
    what they free, and the work that they did."""

    def __init__(self, of_all: "Ledger | None" = None) -> None:
        """`of_all`: one in which everything is entered too."""
        self._of_all = of_all
        self._lock = threading.Lock()
        self._now: Counter[tuple[Tier, Payload]] = Counter()
        self._peak: Counter[tuple[Tier, Payload]] = Counter()
        self._recent: Counter[tuple[Tier, Payload]] = Counter()  # the most since somebody asked
        self._tier_now: Counter[Tier] = Counter()
        self._tier_peak: Counter[Tier] = Counter()
        self.work: Counter[Work] = Counter()
        """All that was done so far."""

    def did(self, work: Work, amount: int) -> None:
        with self._lock:
            self.work[work] += amount
        if self._of_all is not None:
            self._of_all.did(work, amount)

    def add(self, tier: Tier, payload: Payload, nbytes: int) -> None:
        """`nbytes` is negative when storage is freed. Raises RuntimeError when more is freed than was stored."""
        key = (tier, payload)
        with self._lock:
            now = self._now[key] = self._now[key] + nbytes
            if now < 0:
                raise RuntimeError(f"ledger: {-now} bytes more of {payload.value} freed than stored on {tier.value}")
            tier_now = self._tier_now[tier] = self._tier_now[tier] + nbytes
            if now > self._peak[key]:
                self._peak[key] = now
            if now > self._recent[key]:
                self._recent[key] = now
            if tier_now > self._tier_peak[tier]:
                self._tier_peak[tier] = tier_now
        if self._of_all is not None:
            self._of_all.add(tier, payload, nbytes)

    def clear(self) -> None:
        """All is freed: the engine is gone."""
        for (tier, payload), nbytes in list(self._now.items()):
            self.add(tier, payload, -nbytes)

    def bytes(self, tier: Tier, payload: Payload) -> int:
        return self._now[tier, payload]

    def tier_bytes(self, tier: Tier) -> int:
        return self._tier_now[tier]

    def device_bytes_at_rest(self) -> int:
        """Without gathered weights and gradients, which come and go."""
        passing = self.bytes(Tier.DEVICE, Payload.GATHERED) + self.bytes(Tier.DEVICE, Payload.GRADIENT)
        return self.tier_bytes(Tier.DEVICE) - passing

    def take_recent_peak(self, tier: Tier, payload: Payload) -> int:
        """The most that was stored since the last call."""
        key = (tier, payload)
        with self._lock:
            recent, self._recent[key] = self._recent[key], self._now[key]
        return recent

    def report(self) -> dict[str, dict[str, dict[str, int]]]:
        """{tier: {payload: {"bytes", "peak_bytes"}}} of what was ever stored, and each tier's "total"."""
        result: dict[str, dict[str, dict[str, int]]] = {}
        for tier in Tier:
            rows = {
                payload.value: {"bytes": self._now[tier, payload], "peak_bytes": self._peak[tier, payload]}
                for payload in Payload
                if self._peak[tier, payload]
            }
            if rows:
                rows["total"] = {"bytes": self.tier_bytes(tier), "peak_bytes": self._tier_peak[tier]}
                result[tier.value] = rows
        return result


def advise_huge_pages(memory: torch.Tensor) -> None:
    """Ask the system for pages of 2 MB under what was allocated just now on a CPU: of those of 4 KB, each takes a fault
    when it is first written, and is a miss when it is read. Nothing where the system has no such pages."""
    if memory.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)


class HostSlab:
    """One exact allocation that pieces are cut from, page-locked when the engine's device is a GPU, and without any
    memory when that is meta.

    Exact, because torch's pinned allocator rounds every block up to a power of two; one, because page-locking costs
    milliseconds a call. The pages are anonymous memory that the system zeroes.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._taken_bytes = 0
        if device.type == "meta":
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
            return
        # Private: a child that is forked must not write into our weights. mmap's default shares.
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        advise_huge_pages(self._bytes)  # a step reads all of it, too
        if device.type == "cuda":
            cudart = torch.cuda.cudart()
            pointer = self._bytes.data_ptr()
            error = cudart.cudaHostRegister(pointer, nbytes, 0)
            if int(error) != 0:
                raise MemoryError(
                    f"cannot page-lock {nbytes} bytes of host memory (CUDA error {int(error)}): "
                    "raise the limit of locked memory (ulimit -l) or offload less"
                )
            # Of the pages, which what was taken keeps alive: torch lets go of the tensor here before that.
            weakref.finalize(pages, cudart.cudaHostUnregister, pointer)

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The next `numel` zeros. Raises OutOfBudgetError past the end."""
        start, stop = self._taken_bytes, self._taken_bytes + numel * dtype.itemsize
        if stop > self.nbytes:
            raise OutOfBudgetError(
                f"a host slab of {self.nbytes} bytes has no room for {stop - start} more than {start}"
            )
        self._taken_bytes = stop
        return self._bytes[start:stop].view(dtype)


class PieceBuffers:
    """Memory for one piece of a chunk."""

    def __init__(self, by_payload: dict[str, torch.Tensor]) -> None:
        """uint8 [bytes] each: a gradient may be a sum in another dtype."""
        self._by_payload = by_payload

    def view(self, payload: str, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop), 1D."""
        return self._by_payload[payload][start * dtype.itemsize : stop * dtype.itemsize].view(dtype)


class Storage:
    """Allocates payloads on tiers and enters them in the ledger. What goes to the host is reserved first, so that it
    can be taken as one slab of exact size; so is what goes to a drive, by the store that is given."""

    def __init__(self, device: torch.device, ledger: Ledger, store: NvmeStore | None = None) -> None:
        self.device = device
        self.ledger = ledger
        self._store = store
        self._slab: HostSlab | None = None

    def reserve_host(self, nbytes: int) -> None:
        """Called once, before the first host payload is taken."""
        if nbytes:
            self._slab = HostSlab(nbytes, self.device)

    def zeros(self, tier: Tier, payload: Payload, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D payload that lives as long as the engine."""
        if tier is Tier.DEVICE:
            tensor = self.device_zeros(numel, dtype)
        elif tier is Tier.HOST and self._slab is not None:
            tensor = self._slab.take(numel, dtype)
        else:
            raise RuntimeError(f"nothing was reserved on tier {tier.value}")
        self.ledger.add(tier, payload, tensor.nbytes)
        return tensor

    def device_zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """What stays on the device for long; the caller enters it in the ledger."""
        if self.device.type == "cpu":
            # Pages of their own: blocks that stay, among malloc's short-lived ones, would leave holes between them.
            return HostSlab(numel * dtype.itemsize, self.device).take(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def on_disk(self, payload: Payload, name: str, numel: int, dtype: torch.dtype) -> DiskTensor:
        """Zeros in the buffer `name` of the store."""
        self.ledger.add(Tier.NVME, payload, numel * dtype.itemsize)
        return DiskTensor(self._store, name, dtype, 0, numel)


class BufferPool:
    """Transient device buffers, handed round by (numel, dtype).

    On a CPU a buffer goes back to the pool and not to the system, which would zero its pages again at the next use. On
    a GPU the caching allocator does this already.
    """

    def __init__(self, storage: Storage, payload: Payload) -> None:
        self._storage = storage
        self._payload = payload
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised 1-D buffer."""
        self._storage.ledger.add(Tier.DEVICE, self._payload, numel * dtype.itemsize)
        free = self._free.get((numel, dtype))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self._storage.device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The caller has waited for whatever used the buffer."""
        self._storage.ledger.add(Tier.DEVICE, self._payload, -buffer.nbytes)
        if self._storage.device.type == "cpu":
            self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)
