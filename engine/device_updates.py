"""Updates by the device of chunks whose state is on the host: piece by piece through a ring of device buffers.

While one piece is updated, the next one comes in and the one before goes out, each on a lane of its own, so that the
link is busy in both directions. What of a chunk lives on the device, its weights or its gradient, is used where it is.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch

from .chunk import payload_part
from .lanes import Event, Lane
from .streaming_sizes import Ring
from .tiers import Payload, PieceBuffers, Storage, Tier, Work
from .update import PAYLOADS, ChunkUpdate, Run, adam_runs, pieces_of


@dataclass
class DeviceSlot:
    """Device memory for one piece."""

    buffers: PieceBuffers
    sent: Event | None = None
    """When what the last piece was has gone out, and the next one may come in."""


@dataclass
class DevicePiece:
    """Owned elements [start, stop) of a chunk, on the device or on their way there."""

    start: int
    stop: int
    slot: DeviceSlot
    tensors: dict[str, torch.Tensor | None]
    """By payload."""
    at_rest: dict[str, torch.Tensor]
    """Where on the host those are that came in, by payload."""
    runs: list[Run]
    arrived: Event


class DeviceUpdates:
    """Belongs to the lane of the device's updates."""

    def __init__(self, ring: Ring, storage: Storage, inwards: Lane, outwards: Lane) -> None:
        self._piece_numel = ring.piece_numel
        self._device = storage.device
        self._inwards = inwards
        self._outwards = outwards

        def buffer(itemsize: int) -> torch.Tensor:
            return storage.zeros(Tier.DEVICE, Payload.STAGING, itemsize * ring.piece_numel, torch.uint8)

        self._slots = deque(
            DeviceSlot(PieceBuffers({payload: buffer(itemsize) for payload, itemsize in ring.itemsizes.items()}))
            for _ in range(ring.slots)
        )  # the longest unused first

    @torch.no_grad()
    def execute(self, update: ChunkUpdate) -> Event:
        """Update a chunk. The gradient has been read when this returns; the event is of the last copy to the host."""
        wanted = deque(pieces_of(update.chunk, update.runs, self._piece_numel))
        coming = deque([self._bring(update, *wanted.popleft())])
        while coming:
            if wanted:
                coming.append(self._bring(update, *wanted.popleft()))
            piece = coming.popleft()
            piece.arrived.wait()
            update.chunk.did(Work.DEVICE_ADAM, sum(run.stop - run.start for run in piece.runs))
            with torch.profiler.record_function(f"megalith::adam {update.chunk.name}"):
                adam_runs(piece.tensors, piece.start, piece.runs, update)
            last = piece.slot.sent = self._send(update, piece)
        if self._device.type == "cuda":  # who releases the gradient's memory does not know of this stream
            torch.cuda.current_stream(self._device).synchronize()
        return last

    def _bring(self, update: ChunkUpdate, start: int, stop: int, runs: list[Run]) -> DevicePiece:
        """Start to copy a piece into the next slot."""
        chunk, slot = update.chunk, self._slots[0]
        self._slots.rotate(-1)
        tensors: dict[str, torch.Tensor | None] = {}
        at_rest: dict[str, torch.Tensor] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (from the host, to the slot)
        for payload in PAYLOADS:
            values, part = getattr(chunk, payload), payload_part(payload, start, stop)
            if values is None or (payload == "weight" and chunk.placement.weight_tier is Tier.DEVICE):
                tensors[payload] = None if values is None else values.data[part]
                continue
            at_rest[payload] = values[part]
            tensors[payload] = slot.buffers.view(payload, values.dtype, 0, at_rest[payload].numel())
            copies.append((at_rest[payload], tensors[payload]))
        if chunk.placement.gradient_tier is not Tier.DEVICE:
            for number, run in enumerate(runs):
                target = slot.buffers.view("gradient", run.gradient.dtype, run.start - start, run.stop - start)
                copies.append((run.gradient, target))
                runs[number] = replace(run, gradient=target)
        free = slot.sent

        def copy() -> None:
            if free is not None:
                free.wait()
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            chunk.did(Work.LINK_IN, sum(target.nbytes for _, target in copies))

        arrived = self._inwards.submit(copy, f"state of {chunk.name}")
        return DevicePiece(start, stop, slot, tensors, at_rest, runs, arrived)

    def _send(self, update: ChunkUpdate, piece: DevicePiece) -> Event:
        """Start to copy an updated piece to where it is at rest."""
        chunk = update.chunk

        def copy() -> None:
            for payload, target in piece.at_rest.items():
                target.copy_(piece.tensors[payload], non_blocking=True)
            chunk.did(Work.LINK_OUT, sum(target.nbytes for target in piece.at_rest.values()))

        return self._outwards.submit(copy, f"state of {chunk.name}")
