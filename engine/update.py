"""One step's update of one chunk: what `step()` has fixed, and its execution, now or later.

Everything that an update depends on, the clipping factor, the learning rates, betas and step numbers of that moment, is
in it. So it gives the same bits whenever it is executed: those of chunks on the device at once, those of offloaded
chunks on a lane, in the order in which the next forward pass needs the weights, while earlier blocks compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels import AdamHyper, fused_adam_
from .chunk import Chunk
from .disk_tensor import DiskTensor

PAYLOADS = ("weight", "remainder", "master", "exp_avg", "exp_avg_sq")
"""Of a chunk, what an update reads and writes."""


@dataclass(frozen=True)
class Run:
    """Owned elements [start, stop) of a chunk that one kernel launch updates."""

    start: int
    stop: int
    gradient: torch.Tensor | DiskTensor | tuple[torch.Tensor, ...]
    """1D [stop - start], not yet multiplied by the factor; several tensors where they stayed as autograd made them."""
    hyper: AdamHyper

    def cut(self, start: int, stop: int) -> "Run":
        """What of it lies in [start, stop), where the gradient is one."""
        start, stop = max(start, self.start), min(stop, self.stop)
        return Run(start, stop, self.gradient[start - self.start : stop - self.start], self.hyper)


@dataclass(frozen=True)
class ChunkUpdate:
    chunk: Chunk
    runs: list[Run]
    factor: float
    """Averages over ranks, unscales and clips."""

    @property
    def is_streamed(self) -> bool:
        """Something of it is on a drive."""
        payloads = [getattr(self.chunk, payload) for payload in PAYLOADS]
        return any(isinstance(values, DiskTensor) for values in [*payloads, *(run.gradient for run in self.runs)])


@torch.no_grad()
def execute(update: ChunkUpdate) -> None:
    """Of a chunk that is in memory."""
    chunk = update.chunk
    weight = chunk.weight.data.to(chunk.exp_avg.device)  # the same tensor where weight and state are on one device
    tensors = {payload: getattr(chunk, payload) for payload in PAYLOADS} | {"weight": weight}
    with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
        adam_runs(tensors, 0, update.runs, update.factor)
    if weight.data_ptr() != chunk.weight.data_ptr():
        chunk.weight.data.copy_(weight)


def adam_runs(tensors: Mapping[str, torch.Tensor | None], offset: int, runs: list[Run], factor: float) -> None:
    """Update `tensors`, by payload, which hold the owned elements from `offset` on, all on one device."""
    values = torch.tensor([factor, 0.0], dtype=torch.float32, device=tensors["exp_avg"].device)
    for run in runs:
        part = {
            payload: None if tensor is None else tensor[run.start - offset : run.stop - offset]
            for payload, tensor in tensors.items()
        }
        fused_adam_(
            part.pop("weight"),
            run.gradient,
            part.pop("exp_avg"),
            part.pop("exp_avg_sq"),
            run.hyper,
            factor=values[:1],
            found_inf=values[1:],
            **part,
        )
