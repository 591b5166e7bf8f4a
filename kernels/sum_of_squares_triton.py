"""The sum of squares in Triton: one launch sums every block, and one more, or two, the sums of the blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SUM_BLOCK_NUMEL, SUM_LANES

# Fusion changes nothing here: the square of a float32 is exact in float64.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def block_sums_kernel(x_ptr, sums_ptr, numel, SQUARE: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)  # int64, because a tensor may have more than 2 ** 31 elements
    offsets = block * (ROWS * LANES) + tl.arange(0, LANES)
    lanes = tl.zeros((LANES,), tl.float64)
    for row in tl.static_range(ROWS):
        at = offsets + row * LANES
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float64)
        lanes += x * x if SQUARE else x
    # Fold the upper half of the lanes into the lower one until a single one is left.
    for level in tl.static_range(LANES.bit_length() - 1):
        lanes = tl.sum(tl.reshape(lanes, (2, LANES >> (level + 1))), axis=0)
    tl.store(sums_ptr + block + tl.arange(0, 1), lanes)


def triton_sum_of_squares(x: Tensor) -> Tensor:
    """`sum_of_squares` (see there) for a checked tensor with elements, on the current stream of its device."""
    with torch.cuda.device_of(x):
        sums = _block_sums(x, square=True)
        while sums.numel() > 1:
            sums = _block_sums(sums, square=False)
    return sums


def _block_sums(x: Tensor, square: bool) -> Tensor:
    sums = torch.empty(triton.cdiv(x.numel(), SUM_BLOCK_NUMEL), dtype=torch.float64, device=x.device)
    block_sums_kernel[(sums.numel(),)](
        x, sums, x.numel(), SQUARE=square, LANES=SUM_LANES, ROWS=SUM_BLOCK_NUMEL // SUM_LANES, **LAUNCH_OPTIONS
    )
    return sums
