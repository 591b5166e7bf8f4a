"""A flat tensor on a drive."""

from dataclasses import dataclass

import torch

from .nvme import Handle, NvmeStore


@dataclass(frozen=True)
class DiskTensor:
    """Elements [start, stop) of a buffer of an `NvmeStore`. Has what a chunk needs of a 1-D tensor: slices, reads and
    writes, none of which keeps anything in memory."""

    store: NvmeStore
    name: str
    dtype: torch.dtype
    start: int
    stop: int

    def numel(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "DiskTensor":
        first, last, _ = part.indices(self.numel())
        return DiskTensor(self.store, self.name, self.dtype, self.start + first, self.start + max(first, last))

    def of(self, dtype: torch.dtype) -> "DiskTensor":
        """As many elements of another dtype, which is no wider, in the same buffer from its beginning on."""
        return DiskTensor(self.store, self.name, dtype, 0, self.numel())

    def begin_read(self, out: torch.Tensor, urgent: bool = False) -> Handle:
        """`out` (on the CPU, of this dtype) is not to be touched before the handle was waited for. `urgent`: somebody
        waits for it already."""
        return self.store.read(self.name, out, self.start * self.dtype.itemsize, urgent)

    def begin_write(self, values: torch.Tensor) -> Handle:
        """`values` (on the CPU, of this dtype) are not to be changed before the handle was waited for."""
        return self.store.write(self.name, values, self.start * self.dtype.itemsize)

    def read(self) -> torch.Tensor:
        out = torch.empty(self.numel(), dtype=self.dtype)
        self.begin_read(out, urgent=True).wait()
        return out

    def copy_(self, values: torch.Tensor) -> None:
        """Write `values`, of any device and dtype, and wait."""
        self.begin_write(values.detach().to("cpu", self.dtype).contiguous()).wait()


def in_memory(values: "torch.Tensor | DiskTensor") -> torch.Tensor:
    return values.read() if isinstance(values, DiskTensor) else values
