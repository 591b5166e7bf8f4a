"""Scales and zero-points of groups of weights: the grids that GPTQ rounds to.

Weights are [K, N], K inputs by N outputs; a grid is float32 [N] for one group, or [G, N] for several.
"""

import torch
from torch import Tensor

_SHRINKS = [1 - 0.02 * step for step in range(26)]
_SMALLEST_SCALE = 2.0**-24  # the least positive float16


class QuantizationError(ValueError):
    """A matrix that cannot be quantised: a Hessian or a weight that is not finite, or too large for float16."""


def find_grid(weights: Tensor, options, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero-point for one group of weights [g, N]: float32 [N] each, the scale exactly a float16. `options`
    are GptqOptions.

    Without `importance` the grid covers the weights. With it, positive [g], it is the part of that range which rounds
    them to the nearest with the least sum of squares, each input counting as much as its importance. Symmetric: from
    -max|w| to max|w|, also where no weight of the group is negative (a grid from 0 on would have its zero-point in the
    middle all the same and clip half of the range). The scale is rounded to float16 here and not when it is stored, so
    that this error too is made good by later rows. Raises QuantizationError where float16 ends.
    """
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    if options.sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    if importance is None:
        return _grid_over(low, high, options)
    least, scale, zero = None, None, None
    for shrink in _SHRINKS:
        grid = _grid_over(low * shrink, high * shrink, options)
        rounded = (round_to_grid(weights, *grid, options.bits) - grid[1]) * grid[0]
        error = importance @ (rounded - weights).square_()
        if least is None:
            least, (scale, zero) = error, grid
        better = error < least
        least, scale, zero = (
            torch.where(better, new, old) for new, old in ((error, least), (grid[0], scale), (grid[1], zero))
        )
    return scale, zero


def find_grids(weight: Tensor, group_size: int, options, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for every `group_size` rows of `weight` [K, N]: [G, N] each."""
    parts = [None] * -(-len(weight) // group_size) if importance is None else importance.split(group_size)
    grids = [find_grid(w, options, part) for w, part in zip(weight.split(group_size), parts, strict=True)]
    scales, zeros = zip(*grids, strict=True)
    return torch.stack(scales), torch.stack(zeros)


def _grid_over(low: Tensor, high: Tensor, options) -> tuple[Tensor, Tensor]:
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
