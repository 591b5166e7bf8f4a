"""Host memory for what comes and goes in a step: page-locked for a GPU, taken from the system once, and used again."""

from collections import deque
from dataclasses import dataclass, field

import torch

from .tiers import HostSlab, Ledger, Payload, Tier

ALIGNMENT_BYTES = 256
SLAB_BYTES = 2**26
"""Room is taken from the system for eight like the first that found none, up to this many bytes or one."""


@dataclass(eq=False)
class Place:
    """Bytes [start, stop) of a slab, as a tensor."""

    bytes: torch.Tensor
    stop: int
    is_free: bool = False


@dataclass(eq=False)
class _Slab:
    bytes: torch.Tensor
    places: list[Place] = field(default_factory=list)

    @property
    def top(self) -> int:
        return self.places[-1].stop if self.places else 0

    def take(self, nbytes: int) -> Place | None:
        start = -(-self.top // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if start + nbytes > self.bytes.numel():
            return None
        self.places.append(Place(self.bytes[start : start + nbytes], start + nbytes))
        return self.places[-1]

    def pop_free(self) -> None:
        while self.places and self.places[-1].is_free:
            self.places.pop()


class HostArena:
    """Stacks of places: what was taken last comes back first, as activations do, so that sizes may change from step to
    step and nothing fragments. Memory is kept until the engine goes, and the ledger counts all of it.

    A place that came back is given out again at once: whoever still reads or writes it must be ordered before what the
    next owner does, as work on one lane is.
    """

    def __init__(self, device: torch.device, ledger: Ledger, payload: Payload) -> None:
        self._device = device
        self._ledger = ledger
        self._payload = payload
        self._slabs: list[_Slab] = []
        self._returned: deque[Place] = deque()

    @property
    def used_bytes(self) -> int:
        """In places that have not come back."""
        self._take_back()
        return sum(place.bytes.numel() for slab in self._slabs for place in slab.places if not place.is_free)

    def take(self, nbytes: int) -> Place:
        self._take_back()
        for slab in self._slabs:
            place = slab.take(nbytes)
            if place is not None:
                return place
        slab_bytes = max(nbytes, min(SLAB_BYTES, 8 * -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES))
        self._ledger.add(Tier.HOST, self._payload, slab_bytes)
        self._slabs.append(_Slab(HostSlab(slab_bytes, self._device).take(slab_bytes, torch.uint8)))
        return self._slabs[-1].take(nbytes)

    def give_back(self, place: Place) -> None:
        """From any thread, and from the garbage collector in the middle of anything: nothing is locked here."""
        self._returned.append(place)

    def _take_back(self) -> None:
        while self._returned:
            self._returned.popleft().is_free = True
        for slab in self._slabs:
            slab.pop_free()
