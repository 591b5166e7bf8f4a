"""Plain-PyTorch oracle of the GPTQ kernels, in float32. It runs on any device and checks nothing."""

import torch
from torch import Tensor

from .gptq_packing import unpack_codes
from .gptq_weight import GptqWeight


def dequantize_reference(weight: GptqWeight, columns: slice = slice(None)) -> Tensor:
    """These columns of the weight, its rows in the order of the input: float32 [K, n]."""
    codes = unpack_codes(weight.qweight[:, columns], weight.bits, weight.in_features)
    middle = 1 << weight.bits - 1
    zeros = middle if weight.zeros is None else rows(weight.zeros[:, columns], weight)
    # Exact: codes and zero-points are small integers.
    dense = (codes.float() - zeros) * rows(weight.scales[:, columns].float(), weight)
    return dense if weight.perm is None else torch.empty_like(dense).index_copy_(0, weight.perm.long(), dense)


def rows(per_group: Tensor, weight: GptqWeight) -> Tensor:
    """Values of each group [G, n], repeated for each row: [K, n]."""
    return per_group.repeat_interleave(weight.group_size, dim=0)[: weight.in_features]
