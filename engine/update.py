"""One step's update of one chunk: what `step()` has fixed, and its execution where the state lies, now or later.

Everything that an update depends on, the clipping factor, the learning rates, betas and step numbers of that moment, is
in it. So it gives the same bits whenever it is executed: those of chunks on the device at once, those of offloaded
chunks on a lane, in the order in which the next forward pass needs the weights, while earlier blocks compute.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..kernels import AdamHyper, fused_adam_
from .chunk import STATE_PAYLOADS, Chunk, payload_part
from .disk_tensor import DiskTensor
from .tiers import Tier, Work

PAYLOADS = ("weight", *STATE_PAYLOADS)
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
        """What of it lies in [start, stop)."""
        start, stop = max(start, self.start), min(stop, self.stop)
        first, last = start - self.start, stop - self.start
        if isinstance(self.gradient, tuple):
            return Run(start, stop, tuple(cut_parts(self.gradient, first, last)), self.hyper)
        return Run(start, stop, self.gradient[first:last], self.hyper)


@dataclass(frozen=True)
class ChunkUpdate:
    chunk: Chunk
    runs: list[Run]
    factor: float
    """Averages over ranks, unscales and clips."""
    weight: torch.Tensor | None = None
    """The owned part of the weights, where it is in memory although it is at rest on a drive. It is updated too."""
    squares: torch.Tensor | float = 0.0
    """The sum of the gradient's squares, if it has not been looked at before: nothing is updated where that is not
    finite."""

    @property
    def is_streamed(self) -> bool:
        """Something of it is on a drive."""
        payloads = [getattr(self.chunk, payload) for payload in PAYLOADS]
        return any(isinstance(values, DiskTensor) for values in [*payloads, *(run.gradient for run in self.runs)])


def pieces_of(chunk: Chunk, runs: list[Run] | None, piece_numel: int) -> Iterator[tuple[int, int, list[Run]]]:
    """(start, stop, runs) of the pieces of a chunk's owned elements in which something is updated. `runs`: None where
    they are not known yet, and any piece may be updated."""
    numel = chunk.placement.owned_numel
    for start in range(0, numel, piece_numel):
        stop = min(start + piece_numel, numel)
        own = [run.cut(start, stop) for run in runs or () if run.start < stop and start < run.stop]
        if own or runs is None:
            yield start, stop, own


def cut_parts(tensors: tuple[torch.Tensor, ...], start: int, stop: int) -> Iterator[torch.Tensor]:
    """Elements [start, stop) of tensors [numel] that follow each other."""
    offset = 0
    for tensor in tensors:
        if offset < stop and start < offset + tensor.numel():
            yield tensor[max(start - offset, 0) : stop - offset]
        offset += tensor.numel()


def stored_tensors(chunk: Chunk) -> dict[str, torch.Tensor | None]:
    """The owned elements of a chunk that is in memory, by payload; None for what it has not."""
    return {payload: getattr(chunk, payload) for payload in PAYLOADS} | {"weight": chunk.weight.data}


def cut_tensors(tensors: Mapping[str, torch.Tensor | None], start: int, stop: int) -> dict[str, torch.Tensor | None]:
    """Elements [start, stop) of each."""
    return {
        payload: None if tensor is None else tensor[payload_part(payload, start, stop)]
        for payload, tensor in tensors.items()
    }


@torch.no_grad()
def execute(update: ChunkUpdate) -> None:
    """Of a chunk that is in memory, by the processor of the tier on which its state is, which reaches all of it."""
    chunk = update.chunk
    tensors = stored_tensors(chunk)
    on_device = chunk.placement.optimizer_tier is Tier.DEVICE
    chunk.did(Work.DEVICE_ADAM if on_device else Work.HOST_ADAM, sum(run.stop - run.start for run in update.runs))
    if not on_device and chunk.placement.weight_tier is Tier.DEVICE:
        chunk.did(Work.LINK_OUT, chunk.weight.nbytes)
        chunk.did(Work.LINK_IN, chunk.weight.nbytes)
    with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
        adam_runs(tensors, 0, update.runs, update)


def adam_runs(tensors: Mapping[str, torch.Tensor | None], offset: int, runs: list[Run], update: ChunkUpdate) -> None:
    """Update `tensors`, by payload, which hold the owned elements from `offset` on, by `runs` of `update`, all on one
    device."""
    device = tensors["exp_avg"].device
    factor = torch.full((1,), update.factor, dtype=torch.float32, device=device)  # filled there: the host need not wait
    found_inf = torch.zeros(1, dtype=torch.float32, device=device)
    if isinstance(update.squares, torch.Tensor):
        found_inf.copy_(update.squares.isfinite().logical_not())
    elif not math.isfinite(update.squares):
        return
    for run in runs:
        part = cut_tensors(tensors, run.start - offset, run.stop - offset)
        fused_adam_(
            part.pop("weight"),
            run.gradient,
            part.pop("exp_avg"),
            part.pop("exp_avg_sq"),
            run.hyper,
            factor=factor,
            found_inf=found_inf,
            **part,
        )
