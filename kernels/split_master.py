"""A float32 master weight kept as a bfloat16, which is the compute weight, and 16 bits of remainder: 4 bytes, not 6.

    high = (bits + 0x8000) >> 16            low = bits & 0xffff, read as int16            bits = (high << 16) + low

The high half rounds half away from zero. Rounding half to even, as a cast does, could not be undone: an even bfloat16
owns 65,537 float32 patterns, one more than 16 bits tell apart. The two differ on exact ties only. A NaN becomes the
quiet NaN with no remainder, since the sum above would carry some of them into infinity or zero. A finite float32 beyond
the range of bfloat16 has an infinite high half, as a cast gives, and its remainder brings it back.
"""

import torch
from torch import Tensor

_BLOCK_NUMEL = 1 << 20  # bounds the temporaries, whatever the size of the tensors


@torch.no_grad()
def split_master(master: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Split float32 `master` [numel] into (bfloat16 weight [numel], int16 remainder [numel]).

    `out` receives the halves instead of new tensors. Raises ValueError for a tensor of another dtype, shape or device.
    """
    _check("master", master, torch.float32, master)
    weight, remainder = out or (master.new_empty(master.shape, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    _check("weight", weight, torch.bfloat16, master)
    _check("remainder", remainder, torch.int16, master)
    for start in range(0, master.numel(), _BLOCK_NUMEL):
        block = slice(start, start + _BLOCK_NUMEL)
        bits = master[block].view(torch.int32)
        is_nan = master[block].isnan()
        weight[block].view(torch.int16).copy_((bits + 0x8000 >> 16).masked_fill_(is_nan, 0x7FC0))
        remainder[block].copy_((bits << 16 >> 16).masked_fill_(is_nan, 0))
    return weight, remainder


@torch.no_grad()
def join_master(weight: Tensor, remainder: Tensor, out: Tensor | None = None) -> Tensor:
    """Undo `split_master`: bfloat16 `weight` [numel] and int16 `remainder` [numel] to float32 [numel].

    `out` receives the master instead of a new tensor. Raises ValueError for a tensor of another dtype, shape or device.
    """
    _check("weight", weight, torch.bfloat16, weight)
    _check("remainder", remainder, torch.int16, weight)
    master = torch.empty_like(weight, dtype=torch.float32) if out is None else out
    _check("master", master, torch.float32, weight)
    for start in range(0, weight.numel(), _BLOCK_NUMEL):
        block = slice(start, start + _BLOCK_NUMEL)
        high = weight[block].view(torch.int16).to(torch.int32)
        torch.add(high << 16, remainder[block], out=master[block].view(torch.int32))
    return master


def _check(name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} has to be {dtype} of shape {list(like.shape)}, one-dimensional, on {like.device}, "
            f"but is {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
        )
