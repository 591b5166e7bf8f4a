"""How large the buffers are through which updates are streamed: on the host those of chunks on a drive, and of what
lives on the device where the host updates it; on the device those of what it updates for the host. Pure."""

from dataclasses import dataclass

from .config import Precision, StatePrecision
from .layout import round_up
from .tiers import OutOfBudgetError

SLOTS = 6
"""Pieces in memory: one that is updated, some that are read, some that are written."""

PIECE_MULTIPLE = 4096
"""Elements: pieces of every dtype then begin on a page of the buffer and of the file."""

DEVICE_SLOTS = 3
"""Pieces on the device: one that comes in, one that is updated, one that goes out."""

DEVICE_PIECE_NUMEL = 2**20
"""At most: a fifth of a millisecond of a link, and 48 MB for the ring in bf16; PPO has two of them."""

DEVICE_RING_SHARE = 16
"""The ring takes no more than one in so many bytes of a device's budget."""

HOST_PIECE_NUMEL = 2**22
"""At most, of what the host updates for the device: 24 MB in bf16."""


def slot_itemsizes(
    precision: Precision, state_precision: StatePrecision = StatePrecision.EXACT, at_hand: bool = False
) -> dict[str, int]:
    """Bytes of an element of each payload in a slot; the gradient may be a float32 sum. Scales are 8 bytes for 256
    elements; with room for one byte an element, every buffer begins on a page. `at_hand`: gradient and weight are in
    host memory already when they are needed."""
    if state_precision is StatePrecision.EXACT:
        sizes = {"exp_avg": 4, "exp_avg_sq": 4}
    else:
        sizes = {"exp_avg": 1, "exp_avg_sq": 1, "scales": 1}
    if not at_hand:
        sizes |= {"gradient": 4, "weight": precision.dtype.itemsize}
    if precision is Precision.BF16:
        sizes["remainder"] = 2
    if precision is Precision.FP16:
        sizes["master"] = 4
    return sizes


def piece_numel_of(ring_bytes: int, largest_numel: int, itemsizes: dict[str, int]) -> int:
    """How many elements of a chunk a slot holds. Raises OutOfBudgetError for a ring that is too small."""
    element_bytes = SLOTS * sum(itemsizes.values())
    most = ring_bytes // element_bytes // PIECE_MULTIPLE * PIECE_MULTIPLE
    if most == 0:
        least = element_bytes * PIECE_MULTIPLE
        raise OutOfBudgetError(f"nvme_ring is {ring_bytes} bytes, and the smallest ring takes {least}: raise it")
    return min(most, round_up(max(largest_numel, 1), PIECE_MULTIPLE))


def ring_bytes_of(piece_numel: int, itemsizes: dict[str, int]) -> int:
    return SLOTS * piece_numel * sum(itemsizes.values())


@dataclass(frozen=True)
class Ring:
    """Memory of one tier that pieces of what lies on the other go through."""

    slots: int
    piece_numel: int
    """Elements that a slot holds."""
    itemsizes: dict[str, int]
    """Bytes of an element of each payload in a slot."""

    @property
    def nbytes(self) -> int:
        return self.slots * self.piece_numel * sum(self.itemsizes.values())


NO_RING = Ring(0, 0, {})
"""Nothing is updated away from where it lies."""


def host_ring_of(largest_numel: int, itemsizes: dict[str, int]) -> Ring:
    """One slot: a copy over the link is short beside the host's Adam."""
    return Ring(1, round_up(min(HOST_PIECE_NUMEL, largest_numel), PIECE_MULTIPLE), itemsizes)


def device_ring_of(largest_numel: int, itemsizes: dict[str, int], budget: int | None) -> Ring:
    """`budget`: bytes of the device's, if it has one."""
    piece_numel = round_up(max(min(DEVICE_PIECE_NUMEL, largest_numel), 1), PIECE_MULTIPLE)
    if budget is not None:
        most = budget // DEVICE_RING_SHARE // (DEVICE_SLOTS * sum(itemsizes.values()))
        piece_numel = min(piece_numel, most // PIECE_MULTIPLE * PIECE_MULTIPLE)
    return Ring(DEVICE_SLOTS, piece_numel, itemsizes) if piece_numel else NO_RING
