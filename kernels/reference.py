"""Plain-PyTorch oracles. Each fixes the operations and their order; the other implementations are bit-identical to it.

The rules: float32 operations that round once each (no fused multiply-add), IEEE division and square root, and constants
that the host has rounded to float32.
"""

import torch
from torch import Tensor

from .adam_step import AdamHyper, AdamTensors
from .moment_codes import CODE_DTYPES, decode_moment, encode_moment
from .split_master import join_master, split_master

# Lane j of a block adds elements j, j + SUM_LANES, j + 2 * SUM_LANES, ... of it.
SUM_LANES = 1024
SUM_BLOCK_NUMEL = 16 * SUM_LANES


@torch.no_grad()
def adam_reference_(tensors: AdamTensors, hyper: AdamHyper, factor: Tensor, found_inf: Tensor) -> None:
    """`fused_adam_` (see there) in torch operations, on any device. It waits for `found_inf`, and checks nothing."""
    weight, grad, exp_avg, exp_avg_sq, remainder, master, scales = tensors
    if found_inf.item() != 0:
        return
    if scales is not None:
        decoded = {name: decode_moment(getattr(tensors, name), name, scales) for name in CODE_DTYPES}
        adam_reference_(tensors._replace(**decoded, scales=None), hyper, factor, found_inf)
        for name, values in decoded.items():
            encode_moment(values, name, getattr(tensors, name), scales)
        return
    if remainder is not None:
        joined = join_master(weight, remainder)
        _update_(joined, grad, exp_avg, exp_avg_sq, hyper, factor)
        split_master(joined, out=(weight, remainder))
    elif master is not None:
        _update_(master, grad, exp_avg, exp_avg_sq, hyper, factor)
        weight.copy_(master)
    else:
        _update_(weight, grad, exp_avg, exp_avg_sq, hyper, factor)


def _update_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: AdamHyper, factor: Tensor
) -> None:
    s = hyper.scalars()
    grad = grad.float() * factor
    if hyper.decoupled:
        master.mul_(s.decay)
    else:
        grad.add_(master * s.decay)
    # Not exp_avg * beta1 + grad * (1 - beta1): rounded to float32 the two would not add up to one.
    exp_avg.sub_(exp_avg * s.one_minus_beta1).add_(grad * s.one_minus_beta1)
    exp_avg_sq.mul_(s.beta2).add_((grad * grad).mul_(s.one_minus_beta2))
    # Through float64, because torch's float32 square root on the CPU is MKL's, which is off by a bit now and then. The
    # square root of a float32 is never so close to the middle of two float32 that the second rounding could go wrong.
    root = exp_avg_sq.double().sqrt_().float()
    denominator = root.mul_(s.inverse_sqrt_bias2).add_(s.eps)
    master.sub_((exp_avg * s.step_size).div_(denominator))


@torch.no_grad()
def sum_of_squares_reference(x: Tensor) -> Tensor:
    """`sum_of_squares` (see there) of a tensor with elements in torch operations, on any device.

    A square of a float32 is exact in float64, so only the order of the additions has to be fixed. Within a block of
    SUM_BLOCK_NUMEL each lane adds its elements in order, then the lanes are folded in halves; the sums of the blocks
    are summed in the same way until one is left.
    """
    group_numel = 64 * SUM_BLOCK_NUMEL  # bounds the temporaries
    sums = torch.cat([_block_sums(group.double().square_()) for group in x.split(group_numel)])
    while sums.numel() > 1:
        sums = _block_sums(sums)
    return sums


def _block_sums(values: Tensor) -> Tensor:
    """The sum of each block of `values` [numel], the last filled up with zeros: [ceil(numel / SUM_BLOCK_NUMEL)]."""
    values = torch.nn.functional.pad(values, (0, -values.numel() % SUM_BLOCK_NUMEL))
    rows = values.view(-1, SUM_BLOCK_NUMEL // SUM_LANES, SUM_LANES)
    lanes = torch.zeros_like(rows[:, 0])
    for row in rows.unbind(1):
        lanes += row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
