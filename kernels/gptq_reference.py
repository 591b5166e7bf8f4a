"""Plain-PyTorch oracles of the GPTQ kernels, in float32. They run on any device and check nothing."""

from torch import Tensor

from .gptq_packing import unpack_codes
from .gptq_weight import GptqWeight


def dequantize_reference(weight: GptqWeight, columns: slice = slice(None)) -> Tensor:
    """The rows in the order in which they are stored, and these columns of them: float32 [K, n]."""
    codes = unpack_codes(weight.qweight[:, columns], weight.bits, weight.in_features)
    middle = 1 << weight.bits - 1
    zeros = middle if weight.zeros is None else rows(weight.zeros[:, columns], weight)
    # Exact: codes and zero-points are small integers.
    return (codes.float() - zeros) * rows(weight.scales[:, columns].float(), weight)


def matmul_reference(x: Tensor, weight: GptqWeight) -> Tensor:
    """`gptq_matmul` (see there) with float32 inside; the result is rounded to x's dtype once."""
    x_sorted = x.float() if weight.perm is None else x.float()[..., weight.perm.long()]
    y = x_sorted @ dequantize_reference(weight)
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)


def rows(per_group: Tensor, weight: GptqWeight) -> Tensor:
    """Values of each group [G, n], repeated for each row: [K, n]."""
    return per_group.repeat_interleave(weight.group_size, dim=0)[: weight.in_features]
