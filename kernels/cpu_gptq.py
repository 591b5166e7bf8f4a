"""GPTQ weights on the CPU."""

import torch
from torch import Tensor

from .gptq_reference import dequantize_reference
from .gptq_weight import GptqWeight

SCRATCH_BYTES = 64 << 20  # of dequantised weight at a time


def dequantize_(weight: GptqWeight, out: Tensor, columns: slice) -> None:
    """Write these columns of the weight, rows as stored, to `out` [K, n]."""
    out.copy_(dequantize_reference(weight, columns))


def matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """x [M, K], contiguous and in the order of the stored rows, times the weight, plus its bias: [M, N]."""
    # float16 products are several times slower than float32 ones on CPUs without AMX.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    x_wide = x.to(dtype)
    y = torch.empty(len(x), weight.out_features, dtype=dtype)
    width = max(1, SCRATCH_BYTES // (4 * weight.in_features))
    for start in range(0, weight.out_features, width):
        columns = slice(start, min(start + width, weight.out_features))
        scratch = torch.empty(weight.in_features, columns.stop - columns.start, dtype=dtype)
        dequantize_(weight, scratch, columns)
        y[:, columns] = x_wide @ scratch
    if weight.bias is not None:
        y += weight.bias
    return y.to(x.dtype)
