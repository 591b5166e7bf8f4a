"""Updates by the host of chunks whose state it has, while their weights or gradients live on the device: piece by piece
through page-locked memory. A copy to memory that is not would go through a small buffer of the driver's, to pages that
nobody has touched yet, at a fraction of the link's rate.

A piece is copied, updated and copied back in turn: the copies are short beside the host's Adam.
"""

from dataclasses import replace

import torch

from .streaming_sizes import Ring
from .tiers import Payload, PieceBuffers, Storage, Tier, Work
from .update import ChunkUpdate, Run, adam_runs, cut_tensors, pieces_of, stored_tensors


class HostUpdates:
    """Belongs to the lane of the host's updates."""

    def __init__(self, ring: Ring, storage: Storage) -> None:
        self._piece_numel = ring.piece_numel
        self._device = storage.device
        self._buffers = PieceBuffers(
            {
                payload: storage.zeros(Tier.HOST, Payload.STAGING, itemsize * ring.piece_numel, torch.uint8)
                for payload, itemsize in ring.itemsizes.items()
            }
        )

    @torch.no_grad()
    def execute(self, update: ChunkUpdate) -> None:
        """Update a chunk. The gradient has been read when this returns; the last weights may be on their way."""
        chunk = update.chunk
        fetches_weight = chunk.placement.weight_tier is Tier.DEVICE
        fetches_gradient = chunk.placement.gradient_tier is Tier.DEVICE
        for start, stop, runs in pieces_of(chunk, update.runs, self._piece_numel):
            tensors = cut_tensors(stored_tensors(chunk), start, stop)
            at_rest = tensors["weight"]
            if fetches_weight:
                tensors["weight"] = self._fetch("weight", 0, at_rest)
                chunk.did(Work.LINK_OUT, at_rest.nbytes)
            if fetches_gradient:
                runs = [replace(run, gradient=self._fetch_gradient(run, start)) for run in runs]
                chunk.did(Work.LINK_OUT, sum(run.gradient.nbytes for run in runs))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            chunk.did(Work.HOST_ADAM, sum(run.stop - run.start for run in runs))
            with torch.profiler.record_function(f"megalith::adam {chunk.name}"):
                adam_runs(tensors, start, runs, update)
            if fetches_weight:  # the next piece's copy into the buffer is behind this one, on the lane's stream
                at_rest.copy_(tensors["weight"], non_blocking=True)
                chunk.did(Work.LINK_IN, at_rest.nbytes)

    def _fetch_gradient(self, run: Run, start: int) -> torch.Tensor:
        parts = run.gradient if isinstance(run.gradient, tuple) else (run.gradient,)
        offset, dtype = run.start - start, parts[0].dtype
        for part in parts:
            self._fetch("gradient", offset, part)
            offset += part.numel()
        return self._buffers.view("gradient", dtype, run.start - start, run.stop - start)

    def _fetch(self, payload: str, offset: int, values: torch.Tensor) -> torch.Tensor:
        """Start to copy `values` [numel] of the device to elements from `offset` on of a buffer."""
        copy = self._buffers.view(payload, values.dtype, offset, offset + values.numel())
        return copy.copy_(values, non_blocking=True)
