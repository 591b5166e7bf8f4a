"""The two sequential loops of GPTQ, over one block of rows: rounding with feedback, and coordinate descent.

Every output (column) goes its own way; rows depend on those before them. On a CPU each is one pass in C++, elsewhere
and without a compiler the plain-PyTorch oracle, row by row; both have the same bits.
"""

from torch import Tensor

from . import native
from .rounding_reference import descend_block_reference, round_block_reference


def round_block(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, max_code: int, num_beams: int
) -> tuple[Tensor, Tensor]:
    """Round the rows of `weight` [R, N] one after the other, the rows after each making good for its error.

    `factor` [R, R] is the upper triangular Cholesky factor U of the inverse Hessian: the error e of row i over U[i, i]
    takes e * U[i, j] from each later row j. `scales` and `zeros` are [R, N], codes whole numbers from 0 to `max_code`,
    and all is float32. Each column keeps its `num_beams` best ways to round the rows so far, by the sum of e^2, a row
    being rounded to either neighbour; 1 is GPTQ (Frantar et al. 2023), more is the K-best lattice decoder (Guo and
    Nilsson 2006). Returns codes uint8 [R, N] and the errors e [R, N] of the best way.
    """
    arguments = (weight.contiguous(), factor.contiguous(), scales.contiguous(), zeros.contiguous())
    if weight.device.type == "cpu" and native.best_isa() != "torch":
        return native.round_block(*arguments, max_code, num_beams, native.best_isa())
    return round_block_reference(*arguments, max_code, num_beams)


def descend_block(gradient: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, max_code: int) -> Tensor:
    """Move each row's codes in turn to where the objective tr(D H D^T) is least with all other rows as they are.

    `gradient` [R, N] holds these rows of H D, D being weight less rounded weight, `hessian` [R, R] their part of H and
    `codes` uint8 [R, N] is changed in place. Returns by how much the rounded weight grew: float32 [R, N].
    """
    arguments = (gradient.contiguous(), hessian.contiguous(), codes, scales.contiguous())
    if gradient.device.type == "cpu" and native.best_isa() != "torch":
        return native.descend_block(*arguments, max_code, native.best_isa())
    return descend_block_reference(*arguments, max_code)
