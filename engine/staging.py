"""The page-locked buffers through which tensors go between a GPU and a drive."""

import ctypes
from collections.abc import Iterator

import torch

from .disk_tensor import DiskTensor
from .nvme import Handle
from .tiers import HostSlab


class Staging:
    """Moves tensors between a device and a drive: on a CPU straight, on a GPU through two page-locked buffers, one of
    which the drive has while the other is copied. Belongs to one lane. A move has ended on the host when it returns."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.nbytes = nbytes if device.type == "cuda" else 0
        self._piece_bytes = nbytes // 2
        self._buffers: list[torch.Tensor] = []
        if self.nbytes:
            slab = HostSlab(nbytes, device)
            self._buffers = [slab.take(self._piece_bytes, torch.uint8) for _ in range(2)]

    def read(self, source: DiskTensor, out: torch.Tensor) -> None:
        if not self._buffers:
            source.begin_read(alias(out), urgent=True).wait()
            return
        for part, buffer, before in self._pieces(source):
            source[part].begin_read(buffer, urgent=True).wait()
            out[part].copy_(buffer, non_blocking=True)
            before.record()
        torch.cuda.current_stream().synchronize()

    def write(self, values: torch.Tensor, target: DiskTensor) -> None:
        if not self._buffers:
            target.begin_write(values).wait()
            return
        writes: list[Handle] = []
        for part, buffer, _ in self._pieces(target):
            if len(writes) >= len(self._buffers):
                writes[-len(self._buffers)].wait()
            buffer.copy_(values[part])
            writes.append(target[part].begin_write(buffer))
        for write in writes[-len(self._buffers) :]:
            write.wait()

    def _pieces(self, tensor: DiskTensor) -> Iterator[tuple[slice, torch.Tensor, torch.cuda.Event]]:
        """(part, its buffer, an event to record after the last asynchronous use of the buffer)."""
        piece_numel = self._piece_bytes // tensor.dtype.itemsize
        used = [torch.cuda.Event() for _ in self._buffers]
        for number, start in enumerate(range(0, tensor.numel(), piece_numel)):
            part = slice(start, min(start + piece_numel, tensor.numel()))
            which = number % len(self._buffers)
            used[which].synchronize()
            yield part, self._buffers[which].view(tensor.dtype)[: part.stop - part.start], used[which]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of its own: numpy, through which the drive writes, would forbid for good to
    resize that of a chunk."""
    if tensor.is_meta:
        return tensor
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype)
