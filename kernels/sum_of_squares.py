"""The sum of squares of flat tensors, for the global norm of the gradients."""

import torch
from torch import Tensor

from . import native
from .reference import sum_of_squares_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sum_of_squares(*tensors: Tensor) -> Tensor:
    """Sum of the squares of each of `tensors` (float32, bfloat16 or float16, [numel], contiguous, on one device):
    float64 [len(tensors)] there.

    Added in float64 in an order that depends on nothing but numel, so the result has the same bits on every device and
    with any number of threads. The sum over the pieces of a tensor differs from the sum over the whole by some 1e-16 of
    it, which a norm rounded to float32 does not show. It is finite exactly if every element is. On CUDA nothing waits
    for the host. Tensors on meta, which have no values, give zeros on the CPU. Raises ValueError for another dtype,
    shape, device or layout.
    """
    for x in tensors:
        _check(x, tensors[0].device)
    if tensors[0].is_meta:
        return torch.zeros(len(tensors), dtype=torch.float64)
    if tensors[0].device.type == "cpu" and native.best_isa() != "torch":
        return native.sum_of_squares(tensors, native.best_isa())
    return torch.cat([_one(x) for x in tensors])


def _check(x: Tensor, device: torch.device) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, but sum_of_squares takes float32, bfloat16 or float16")
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"x has shape {list(x.shape)} and strides {x.stride()}, but has to be 1-D and contiguous")
    if x.device != device or device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"x is on {x.device}, but sum_of_squares runs on one cpu or cuda device")


def _one(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros(1, dtype=torch.float64)
    if x.device.type == "cpu":
        return sum_of_squares_reference(x)
    # Here, because a machine without CUDA need not load Triton.
    from .sum_of_squares_triton import triton_sum_of_squares

    return triton_sum_of_squares(x)
