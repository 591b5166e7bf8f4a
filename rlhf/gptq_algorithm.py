"""GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323): a matrix rounded row by row of its input, the error of
each row made good by those that are still to come.

Everything here is [K, N]: K inputs, N outputs, so that the row that is being rounded lies in one piece. Outputs do not
depend on each other: linears that share their input are quantised as one matrix, side by side.

What is minimised is the objective tr(D H D^T) of each output, D being the error of its K weights and H the mean of
x x^T over the calibration inputs x: the mean squared error of the output, up to a constant factor. This is the search
for the nearest point of a lattice, and GPTQ is its greedy solution (Babai's). Three things go beyond it: scales that
weigh each input by what no later one can make good for, several ways to round a row kept open at a time (`num_beams`),
and coordinate descent in the end (`descent_passes`; Behdin et al. 2023, https://arxiv.org/abs/2309.01885).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import descend_block, round_block
from .gptq_grid import QuantizationError, dequantize, find_grid, find_grids, round_to_grid

# A Hessian that is still not positive definite at the last of these, in float64, holds something that is not finite.
_DAMP_STEPS = (1, 2, 5, 10, 25, 60)


@dataclass(frozen=True)
class GptqOptions:
    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale and a zero-point; -1: all of them."""
    sym: bool = True
    """The zero-point is 2 ** (bits - 1) everywhere."""
    desc_act: bool = True
    """Act-order: inputs are rounded in descending order of their energy, when most others can still make good for
    them."""
    static_groups: bool = True
    """Scales are found before the first rounding, for groups of neighbouring inputs: act-order without its permutation
    at run time. False: as each group is reached, groups being made in the order of rounding."""
    mse: bool = True
    """Search for each group's scale that rounds it with the least error, instead of covering its range. An input's
    error counts by its conditional energy: what is left of it when the inputs after it make good for it."""
    num_beams: int = 8
    """Ways to round that are kept open in each block of rows; 1: GPTQ."""
    descent_passes: int = 4
    """Passes of coordinate descent over the rounded codes, at most; 0: none."""
    damp_percent: float = 0.01
    """Added to the diagonal of H, in means of it; more, where H is not positive definite."""
    min_zero: int = 0
    """Least zero-point of an asymmetric group. Readers of v1 files disagree about 0, so that those are written with
    1."""
    block_rows: int = 128
    """Inputs rounded before the rest of the matrix hears of it; for speed alone."""

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits}; it has to be 2, 3, 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it has to be at least 1, or -1 for one group")
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent is {self.damp_percent}; it has to lie between 0 and 1")
        if not 1 <= self.num_beams <= 64:
            raise ValueError(f"num_beams is {self.num_beams}; it has to lie between 1 and 64")
        if self.descent_passes < 0:
            raise ValueError(f"descent_passes is {self.descent_passes}; it has to be at least 0")


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """W[k, n] is nearly scales[g_idx[k], n] * (codes[k, n] - zeros[g_idx[k], n])."""

    codes: Tensor  # uint8 [K, N]
    scales: Tensor  # float16 [G, N]
    zeros: Tensor  # uint8 [G, N]
    g_idx: Tensor  # int32 [K]
    objective: Tensor  # float32 [N]
    rounded_objective: Tensor  # float32 [N]: of the same weights rounded to the nearest
    damp_percent: float  # what it took

    def columns(self, start: int, stop: int) -> "QuantizedMatrix":
        """The outputs [start, stop)."""
        pick = slice(start, stop)
        return QuantizedMatrix(
            self.codes[:, pick],
            self.scales[:, pick],
            self.zeros[:, pick],
            self.g_idx,
            self.objective[pick],
            self.rounded_objective[pick],
            self.damp_percent,
        )

    def dequantize(self) -> Tensor:
        """float32 [K, N]."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx)


def quantize_matrix(weight: Tensor, hessian: Tensor, options: GptqOptions) -> QuantizedMatrix:
    """Quantise `weight` [K, N] against `hessian` [K, K], on their device, in float32.

    Inputs whose energy (diagonal of H) is 0 are rounded to the nearest; with H = I all are. `damp_percent` is
    escalated, and float64 tried, where H is not positive definite. Raises QuantizationError for what is not finite.
    """
    weight, hessian = weight.float(), hessian.float()
    if not (weight.isfinite().all() and hessian.isfinite().all()):
        raise QuantizationError("the weight or the Hessian holds values that are not finite")
    rows = torch.arange(len(weight), device=weight.device)
    group_size = len(rows) if options.group_size == -1 else min(options.group_size, len(rows))
    regular = rows // group_size  # the group of each row, neighbours together
    scales, zeros = find_grids(weight, group_size, options)
    nearest = dequantize(round_to_grid(weight, scales[regular], zeros[regular], options.bits), scales, zeros, regular)
    rounded_objective = objective(weight - nearest, hessian)
    del nearest

    order = rows
    if options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    group_of = regular[order] if options.static_groups else regular
    damped, factor, damp_percent = damp(hessian[order][:, order], options.damp_percent)
    if options.mse and options.static_groups:
        importance = torch.empty_like(hessian.diagonal())
        importance[order] = factor.diagonal() ** -2
        scales, zeros = find_grids(weight, group_size, options, importance)
    ordered = weight[order]
    ordered_codes = _round_in_order(ordered.clone(), factor, group_of, scales, zeros, options)
    del factor
    _descend(ordered, damped, ordered_codes, group_of, scales, zeros, options)
    codes, g_idx = torch.empty_like(ordered_codes), torch.empty_like(group_of)
    codes[order], g_idx[order] = ordered_codes, group_of
    error = weight - dequantize(codes, scales, zeros, g_idx)
    return QuantizedMatrix(
        codes,
        scales.half(),  # exact: find_grid rounded them
        zeros.to(torch.uint8),
        g_idx.int(),
        objective(error, hessian),
        rounded_objective,
        damp_percent,
    )


def _round_in_order(
    weight: Tensor, factor: Tensor, group_of: Tensor, scales: Tensor, zeros: Tensor, options: GptqOptions
) -> Tensor:
    """Codes uint8 [K, N] of rows that lie in the order in which they are to be rounded; `weight` is used up.

    The grids are those given in `scales` and `zeros` [G, N]; without static groups they are found here, from weights
    that have taken up the error of all rows before the group, and written there.
    """
    importance = factor.diagonal() ** -2 if options.mse else None
    blocks = []
    for block in _blocks(len(weight), options):
        group, within = divmod(block.start, len(weight) if options.group_size == -1 else options.group_size)
        if not options.static_groups and within == 0:
            whole = slice(block.start, None if options.group_size == -1 else block.start + options.group_size)
            scales[group], zeros[group] = find_grid(
                weight[whole], options, None if importance is None else importance[whole]
            )
        groups = group_of[block]
        codes, errors = round_block(
            weight[block], factor[block, block], scales[groups], zeros[groups], 2**options.bits - 1, options.num_beams
        )
        weight[block.stop :] -= factor[block, block.stop :].T @ errors
        blocks.append(codes)
    return torch.cat(blocks)


def _descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    group_of: Tensor,
    scales: Tensor,
    zeros: Tensor,
    options: GptqOptions,
) -> None:
    """Improve `codes` [K, N] in place until no code of any row can be moved alone, or the passes are used up."""
    gradient = hessian @ (weight - dequantize(codes, scales, zeros, group_of))
    for _ in range(options.descent_passes):
        moved = torch.zeros((), dtype=torch.bool, device=weight.device)
        for block in _blocks(len(weight), options):
            change = descend_block(
                gradient[block], hessian[block, block], codes[block], scales[group_of[block]], 2**options.bits - 1
            )
            gradient -= hessian[:, block] @ change
            moved |= change.any()
        if not moved:
            return


def _blocks(rows: int, options: GptqOptions):
    """Slices of `block_rows` rows at most. Where grids are found on the way, none begins within a block."""
    stop = 0
    while stop < rows:
        start, stop = stop, min(stop + options.block_rows, rows)
        if not options.static_groups and options.group_size != -1:
            stop = min(stop, (start // options.group_size + 1) * options.group_size)
        yield slice(start, stop)


def objective(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of each output alone: `error` [K, N] and `hessian` [K, K] to [N]."""
    return ((hessian @ error) * error).sum(0)


def damp(hessian: Tensor, damp_percent: float) -> tuple[Tensor, Tensor, float]:
    """Damped H, H + p mean(diag H) I; the upper Cholesky factor U of its inverse, U^T U; and p, `damp_percent` or the
    first larger one tried that makes it positive definite.

    Row k of U over its diagonal is how the error of input k is best shared among the inputs after it (paper, step 3),
    and U[k, k]^-2 the energy of input k that is left then.
    Inputs of no energy count as independent ones of mean energy. Raises QuantizationError when no p helps.
    """
    mean = hessian.diagonal().mean()
    unseen = (hessian.diagonal() == 0) * torch.where(mean > 0, mean, 1)
    for step in _DAMP_STEPS:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(unseen).add_(step * damp_percent * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if info.item():
                continue
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not info.item() and upper.isfinite().all():
                return damped.float(), upper.float(), step * damp_percent
    raise QuantizationError(
        f"the Hessian is not positive definite, not even with {_DAMP_STEPS[-1] * damp_percent:.3g} of its mean energy "
        f"{mean:.3g} on the diagonal: calibrate with more or other data"
    )
