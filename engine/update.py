"""One step's update of one chunk: what `step()` has fixed, and its execution, now or later.

Everything that an update depends on, the clipping factor, the learning rates, betas and step numbers of that moment, is
in it. So it gives the same bits whenever it is executed: those of chunks on the device at once, those of offloaded
chunks on a lane, in the order in which the next forward pass needs the weights, while earlier blocks compute.
"""

from dataclasses import dataclass

import torch

from ..kernels import AdamHyper, fused_adam_
from .chunk import Chunk


@dataclass(frozen=True)
class Run:
    """Owned elements [start, stop) of a chunk that one kernel launch updates."""

    start: int
    stop: int
    gradient: torch.Tensor  # 1D [stop - start], not yet multiplied by the factor
    hyper: AdamHyper


@dataclass(frozen=True)
class ChunkUpdate:
    chunk: Chunk
    runs: list[Run]
    factor: float
    """Averages over ranks, unscales and clips."""


@torch.no_grad()
def execute(update: ChunkUpdate) -> None:
    chunk = update.chunk
    device = chunk.exp_avg.device
    weight = chunk.weight.data.to(device)  # the same tensor where weight and state are on one device
    values = torch.tensor([update.factor, 0.0], dtype=torch.float32, device=device)
    with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
        for run in update.runs:
            owned = slice(run.start, run.stop)
            fused_adam_(
                weight[owned],
                run.gradient,
                chunk.exp_avg[owned],
                chunk.exp_avg_sq[owned],
                run.hyper,
                factor=values[:1],
                found_inf=values[1:],
                remainder=None if chunk.remainder is None else chunk.remainder[owned],
                master=None if chunk.master is None else chunk.master[owned],
            )
    if weight.data_ptr() != chunk.weight.data_ptr():
        chunk.weight.data.copy_(weight)
