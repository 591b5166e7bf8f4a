"""GPTQ's sequential loops: the compiled ones against the oracle, and the oracle against its own definition."""

import itertools

import pytest
import torch
from megalith.kernels import descend_block, native, round_block
from megalith.kernels.rounding_reference import descend_block_reference, round_block_reference

ISAS = native.ISAS[: native.ISAS.index(native.best_isa()) + 1] if native.best_isa() != "torch" else ()


def problem(rows, columns, bits=4, seed=0):
    """A weight [R, N], a Hessian [R, R], its factor, and a grid that clips some weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * rows, rows, generator=generator) @ torch.randn(rows, rows, generator=generator)
    hessian = x.T @ x / len(x) + torch.eye(rows)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float().contiguous()
    weight = torch.randn(rows, columns, generator=generator)
    scales = (4.5 / 2**bits * (1 + torch.rand(rows, columns, generator=generator))).half().float()
    zeros = torch.randint(1, 2**bits - 1, (1, columns), generator=generator).float().expand(rows, columns)
    return weight, hessian, factor, scales, zeros.contiguous(), 2**bits - 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "columns", "bits"), [(1, 1, 4), (37, 19, 4), (128, 40, 2), (20, 33, 8)])
def test_compiled_and_plain_have_the_same_bits(isa, rows, columns, bits):
    weight, hessian, factor, scales, zeros, max_code = problem(rows, columns, bits)
    for beams in (1, 3, 8):
        expected = round_block_reference(weight, factor, scales, zeros, max_code, beams)
        found = native.round_block(weight, factor, scales, zeros, max_code, beams, isa)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    codes = native.round_block(weight, torch.eye(rows), scales, zeros, max_code, 1, isa)[0]
    gradient = hessian @ (weight - (codes.float() - zeros) * scales)
    codes_of = [codes.clone(), codes.clone()]
    expected = descend_block_reference(gradient, hessian, codes_of[0], scales, max_code)
    found = native.descend_block(gradient, hessian, codes_of[1], scales, max_code, isa)
    assert torch.equal(found, expected) and torch.equal(*codes_of)
    assert rows == 1 or bool((codes_of[0] != codes).any())


@pytest.mark.skipif(not ISAS, reason="the compiled CPU kernels are absent")
def test_threads_change_no_bit():
    weight, _, factor, scales, zeros, max_code = problem(48, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(round_block(weight, factor, scales, zeros, max_code, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def objective(weight, codes, scales, zeros, hessian):
    error = weight - (codes.float() - zeros) * scales
    return ((hessian @ error) * error).sum(0)


def test_errors_are_the_objective_and_more_beams_find_less_of_it():
    weight, hessian, factor, scales, zeros, max_code = problem(32, 50)
    found = []
    for beams in (1, 4, 16, 64):
        codes, errors = round_block(weight, factor, scales, zeros, max_code, beams)
        own = objective(weight, codes, scales, zeros, hessian)
        torch.testing.assert_close(errors.square().sum(0), own, rtol=1e-3, atol=1e-4)
        found.append(own.sum().item())
    assert found == sorted(found, reverse=True) and found[-1] < 0.8 * found[0]


def test_all_beams_find_the_best():
    """With a beam for every way to round four rows to either neighbour, none of 2 ** 4 is missed."""
    weight, hessian, factor, scales, zeros, max_code = problem(4, 30, bits=3)
    best = torch.full((30,), torch.inf)
    for codes in itertools.product(range(8), repeat=4):
        codes = torch.tensor(codes)[:, None].expand(4, 30)
        best = torch.minimum(best, objective(weight, codes, scales, zeros, hessian))
    codes, _ = round_block(weight, factor, scales, zeros, max_code, 64)
    found = objective(weight, codes, scales, zeros, hessian)
    assert (found >= best * 0.9999).all()
    assert (found <= best * 1.0001).float().mean() >= 0.8  # where two neighbours are enough


def test_descent_never_rises_and_ends_where_no_single_code_can_move():
    weight, hessian, _, scales, zeros, max_code = problem(24, 40)
    codes = (weight / scales + zeros).round().clamp(0, max_code).to(torch.uint8)
    before = objective(weight, codes, scales, zeros, hessian)
    gradient = hessian @ (weight - (codes.float() - zeros) * scales)
    for _ in range(50):
        change = descend_block(gradient, hessian, codes, scales, max_code)
        gradient -= hessian @ change
        after = objective(weight, codes, scales, zeros, hessian)
        assert (after <= before * 1.0001).all()
        before = after
    assert not change.any()
    for row, step in itertools.product(range(24), (-1, 1)):
        other = codes.clone()
        other[row] = (codes[row].int() + step).clamp(0, max_code).to(torch.uint8)
        assert (objective(weight, other, scales, zeros, hessian) >= after * 0.999).all()
