"""How large the ring is through which updates of chunks on a drive are streamed. Pure."""

from .config import Precision, StatePrecision
from .layout import round_up
from .tiers import OutOfBudgetError

SLOTS = 6
"""Pieces in memory: one that is updated, some that are read, some that are written."""

PIECE_MULTIPLE = 4096
"""Elements: pieces of every dtype then begin on a page of the buffer and of the file."""


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
