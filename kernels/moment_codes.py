"""Adam's moments in 8 bits: blocks of 256 elements that share one float32 scale for each moment.

The scale is the largest magnitude in the block, and a code is a power of the fraction of it (blockwise quantisation,
Dettmers et al. 2022, arXiv 2110.02861, with powers in place of its table, so that a few exactly rounded operations
give the same bits everywhere):

    exp_avg     int8    |code| = round(127 * (|m| / scale) ** (1/2)), with the sign of m
    exp_avg_sq  uint8    code  = round(255 * (v / scale) ** (1/4)), at least 1 where v > 0

The root of exp_avg_sq divides the step, and the fourth root spends its codes evenly on that root's square root: they
reach from the block's largest down to 1/65,025 of it, and no small element loses its denominator to a rounding to zero.
Encoding what was decoded gives the same codes. A NaN spreads over its block.

`scales` holds two float32 a block: that of exp_avg, then that of exp_avg_sq. Blocks count from the first element of the
tensors, so a shard may be cut at multiples of 256 and nowhere else.
"""

import torch
from torch import Tensor

CODE_BLOCK_NUMEL = 256
CODE_DTYPES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
_LEVELS = {"exp_avg": 127, "exp_avg_sq": 255}


def scales_numel(numel: int) -> int:
    """How many float32 the scales of `numel` elements are."""
    return 2 * -(-numel // CODE_BLOCK_NUMEL)


@torch.no_grad()
def encode_moment(values: Tensor, moment: str, codes: Tensor, scales: Tensor) -> None:
    """Write float32 `values` [numel] of "exp_avg" or "exp_avg_sq" to `codes` [numel] and every other one of `scales`
    [scales_numel(numel)]."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % CODE_BLOCK_NUMEL)).view(-1, CODE_BLOCK_NUMEL)
    # By bits, which order magnitudes, infinities and NaN alike on every device.
    scale = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True).view(torch.float32)
    fraction = blocks.abs() / torch.where(scale == 0, 1.0, scale)
    fraction = torch.where(fraction <= 1, fraction, 1.0)
    root = _square_root(fraction) if moment == "exp_avg" else _square_root(_square_root(fraction))
    code = (root * _LEVELS[moment] + 0.5).int()
    if moment == "exp_avg":
        code = torch.where(blocks < 0, -code, code)
    else:
        code = torch.where(blocks > 0, code.clamp(min=1), code)
    codes.copy_(code.view(-1)[: values.numel()])
    _own(scales, moment).copy_(scale[:, 0])


@torch.no_grad()
def decode_moment(codes: Tensor, moment: str, scales: Tensor) -> Tensor:
    """Undo `encode_moment`: float32 [numel]."""
    blocks = torch.nn.functional.pad(codes.float(), (0, -codes.numel() % CODE_BLOCK_NUMEL)).view(-1, CODE_BLOCK_NUMEL)
    power = blocks.abs() * _inverse(_LEVELS[moment])
    power = power * power
    if moment == "exp_avg_sq":
        power = power * power
    values = power * _own(scales, moment)[:, None]
    return torch.where(blocks < 0, -values, values).view(-1)[: codes.numel()]


def _own(scales: Tensor, moment: str) -> Tensor:
    return scales[0 if moment == "exp_avg" else 1 :: 2]


def _inverse(levels: int) -> Tensor:
    return torch.tensor(1.0 / levels, dtype=torch.float32)  # times `levels` this is 1


def _square_root(values: Tensor) -> Tensor:
    return values.double().sqrt_().float()  # reference.py says why
