"""GPTQ weights on the CPU: the compiled kernels, or the oracle where they are absent.

torch has an int4 kernel for CPUs too, but only its bfloat16 form is vectorised, with scales rounded to bfloat16, and
it is slower than the one here from four rows on, by half at four (bench/results/kernels-cpu.json).
"""

import torch
from torch import Tensor

from . import native
from .gptq_reference import dequantize_reference
from .gptq_weight import GptqWeight

SCRATCH_BYTES = 8 << 20  # of dequantised weight at a time: no more than the last cache holds
# Rows of x up to which the product of packed weights is faster than that of dequantised ones.
PACKED_ROWS = {torch.float32: 512, torch.float16: 256, torch.bfloat16: 192}


def dequantize_(weight: GptqWeight, out: Tensor, first_column: int) -> None:
    """Write the columns from `first_column` on to `out` [K, n], its rows in the order of the input."""
    if native.best_isa() == "torch":
        out.copy_(dequantize_reference(weight, slice(first_column, first_column + out.shape[1])))
    else:
        native.gptq_dequantize_(weight, out, first_column, native.best_isa())


def matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """x [M, K], contiguous, in the order of the input, times the weight, plus its bias: [M, N]."""
    whole_words = weight.bits != 3 and weight.group_size % (32 // weight.bits) == 0
    one_group = weight.bits != 3 and weight.group_size == weight.in_features
    few = len(x) <= PACKED_ROWS[x.dtype]
    if few and (whole_words or one_group) and native.best_isa() != "torch":
        x_stored = x if weight.perm is None else x.index_select(1, weight.perm)
        y = native.gptq_matmul(x_stored.float(), x.dtype, weight, native.best_isa())
    else:
        y = dense_matmul(x, weight)
    if weight.bias is not None:
        y += weight.bias
    return y.to(x.dtype)


def dense_matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """The same without the bias, by way of dequantised columns."""
    # float16 products are several times slower than float32 ones on CPUs that have no instructions for them.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    x = x.to(dtype)
    width = max(1, SCRATCH_BYTES // (dtype.itemsize * weight.in_features))
    y = torch.empty(len(x), weight.out_features, dtype=dtype)
    scratch = torch.empty(width * weight.in_features, dtype=dtype)
    for first in range(0, weight.out_features, width):
        columns = y[:, first : first + width]
        dense = scratch[: weight.in_features * columns.shape[1]].view(weight.in_features, -1)
        dequantize_(weight, dense, first)
        columns.copy_(x @ dense)
    return y
