"""GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323): a matrix rounded row by row of its input, the error of
each row made good by those that are still to come.

Everything here is [K, N]: K inputs, N outputs, so that the row that is being rounded lies in one piece. Outputs do not
depend on each other: linears that share their input are quantised as one matrix, side by side.

What is minimised is the objective tr(D H D^T) of each output, D being the error of its K weights and H the mean of
x x^T over the calibration inputs x: the mean squared error of the output, up to a constant factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A Hessian that is still not positive definite at the last of these, in float64, holds something that is not finite.
_DAMP_STEPS = (1, 2, 5, 10, 25, 60)
_MSE_SHRINKS = [1 - 0.01 * step for step in range(80)]
_MSE_NORM = 2.4
_SMALLEST_SCALE = 2.0**-24  # the least positive float16


class QuantizationError(ValueError):
    """A matrix that cannot be quantised: a Hessian or a weight that is not finite, or too large for float16."""


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
    mse: bool = False
    """Search for each group's scale that rounds it with the least error, instead of covering its range."""
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
    scales, zeros = (
        torch.stack(parts) for parts in zip(*(find_grid(g, options) for g in weight.split(group_size)), strict=True)
    )
    nearest = dequantize(round_to_grid(weight, scales[regular], zeros[regular], options.bits), scales, zeros, regular)
    rounded_objective = objective(weight - nearest, hessian)
    del nearest

    order = rows
    if options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    group_of = regular[order] if options.static_groups else regular
    factor, damp_percent = inverse_factor(hessian[order][:, order], options.damp_percent)
    ordered_codes = _round_in_order(weight[order], factor, group_of, scales, zeros, options)
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
    """Codes [K, N] of rows that lie in the order in which they are to be rounded; `weight` is used up.

    The grids are those given in `scales` and `zeros` [G, N]; without static groups they are found here, from weights
    that have taken up the error of all finished blocks, and written there.
    """
    k = len(weight)
    group_size = k if options.group_size == -1 else options.group_size
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    groups = group_of.tolist()
    for start in range(0, k, options.block_rows):
        stop = min(start + options.block_rows, k)
        block = weight[start:stop]
        errors = torch.empty_like(block)
        for row in range(start, stop):
            group = groups[row]
            if not options.static_groups and row % group_size == 0:
                scales[group], zeros[group] = find_grid(weight[row : row + group_size], options)
            code = round_to_grid(block[row - start], scales[group], zeros[group], options.bits)
            error = block[row - start] - (code - zeros[group]) * scales[group]
            error /= factor[row, row]
            block[row - start + 1 :] -= torch.outer(factor[row, row + 1 : stop], error)
            codes[row], errors[row - start] = code, error
        weight[stop:] -= factor[start:stop, stop:].T @ errors
    return codes


def find_grid(weights: Tensor, options: GptqOptions) -> tuple[Tensor, Tensor]:
    """Scale and zero-point for one group of weights [g, N]: float32 [N] each, the scale exactly a float16.

    Symmetric: from -max|w| to max|w|, also where no weight of the group is negative (a grid from 0 on would have its
    zero-point in the middle all the same and clip half of the range). The scale is rounded to float16 here and not when
    it is stored, so that this error too is made good by later rows. Raises QuantizationError where float16 ends.
    """
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    if options.sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    if not options.mse:
        return _grid_over(low, high, options)
    least, scale, zero = None, None, None
    for shrink in _MSE_SHRINKS:
        grid = _grid_over(low * shrink, high * shrink, options)
        rounded = (round_to_grid(weights, *grid, options.bits) - grid[1]) * grid[0]
        error = (rounded - weights).abs_().pow_(_MSE_NORM).sum(0)
        if least is None:
            least, (scale, zero) = error, grid
        better = error < least
        least, scale, zero = (
            torch.where(better, new, old) for new, old in ((error, least), (grid[0], scale), (grid[1], zero))
        )
    return scale, zero


def _grid_over(low: Tensor, high: Tensor, options: GptqOptions) -> tuple[Tensor, Tensor]:
    max_code = 2**options.bits - 1
    scale = (high - low) / max_code
    if options.sym:
        zero = torch.full_like(scale, 2 ** (options.bits - 1))
    else:
        zero = torch.round(-low / scale)
        scale = torch.where(zero < options.min_zero, high / (max_code - options.min_zero), scale)
        zero = zero.clamp_(min=options.min_zero)
    scale = scale.clamp(min=_SMALLEST_SCALE).half().float()
    if not scale.isfinite().all():
        raise QuantizationError(f"weights reach from {low.min():.3g} to {high.max():.3g}, too far for float16 scales")
    return scale, zero


def round_to_grid(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, as float32 of the shape of `weights`; `scale` and `zero` broadcast to it."""
    return torch.round(weights / scale).add_(zero).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """Codes [K, N] to float32 [K, N]; `scales` and `zeros` [G, N], `g_idx` [K] of any dtype."""
    groups = g_idx.long()
    return (codes.float() - zeros.float()[groups]) * scales.float()[groups]


def objective(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of each output alone: `error` [K, N] and `hessian` [K, K] to [N]."""
    return ((hessian @ error) * error).sum(0)


def inverse_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor U of the inverse, U^T U = (H + p mean(diag H) I)^-1, and p, `damp_percent` or the first
    larger one tried that makes H positive definite.

    Row k of U over its diagonal is how the error of input k is best shared among the inputs after it (paper, step 3).
    Inputs of no energy count as independent ones of energy 1. Raises QuantizationError when no p helps.
    """
    mean = hessian.diagonal().mean()
    unseen = hessian.diagonal() == 0
    for step in _DAMP_STEPS:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(unseen.to(dtype)).add_(step * damp_percent * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if info.item():
                continue
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not info.item() and upper.isfinite().all():
                return upper.float(), step * damp_percent
    raise QuantizationError(
        f"the Hessian is not positive definite, not even with {_DAMP_STEPS[-1] * damp_percent:.3g} of its mean energy "
        f"{mean:.3g} on the diagonal: calibrate with more or other data"
    )
