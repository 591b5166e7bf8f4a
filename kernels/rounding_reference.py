"""Plain-PyTorch oracle of GPTQ's sequential loops. It runs on any device and checks nothing."""

import torch
from torch import Tensor

# A step of the descent has to be worth more than its own rounding error, or it would go to and fro.
LEAST_STEP = 0.5 + 2.0**-12


def round_block_reference(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, max_code: int, num_beams: int
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    left = weight.unsqueeze(1).repeat(1, num_beams, 1)  # [R, B, N]
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    parents = torch.zeros(left.shape, dtype=torch.int64, device=weight.device)
    cost = torch.full(left.shape[1:], torch.inf, device=weight.device)
    cost[0] = 0  # one way to begin with
    for row in range(rows):
        exact = left[row] / scales[row] + zeros[row]
        code = exact.round().clamp_(0, max_code)
        other = torch.where(exact > code, code + 1, code - 1)
        other = torch.where((other < 0) | (other > max_code), 2 * code - other, other)
        both = torch.stack([code, other])
        error = (left[row] - (both - zeros[row]) * scales[row]) / factor[row, row]
        cost, chosen = (cost + error * error).flatten(0, 1).topk(num_beams, dim=0, largest=False)
        parents[row] = chosen % num_beams
        codes[row] = both.flatten(0, 1).gather(0, chosen)
        errors[row] = error.flatten(0, 1).gather(0, chosen)
        left[row + 1 :] = left[row + 1 :].gather(1, parents[row].expand(rows - row - 1, num_beams, columns))
        left[row + 1 :] -= factor[row, row + 1 :, None, None] * errors[row]
    beam = cost.argmin(0, keepdim=True)
    best_codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    best_errors = torch.empty_like(weight)
    for row in reversed(range(rows)):
        best_codes[row], best_errors[row] = codes[row].gather(0, beam)[0], errors[row].gather(0, beam)[0]
        beam = parents[row].gather(0, beam)
    return best_codes, best_errors


def descend_block_reference(gradient: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, max_code: int) -> Tensor:
    left = gradient.clone()
    change = torch.empty_like(gradient)
    for row in range(len(gradient)):
        code = codes[row].float()
        step = left[row] / (hessian[row, row] * scales[row])
        better = torch.where(step.abs() > LEAST_STEP, (code + step.round()).clamp_(0, max_code), code)
        change[row] = (better - code) * scales[row]
        codes[row] = better
        left -= torch.outer(hessian[row], change[row])
    return change
