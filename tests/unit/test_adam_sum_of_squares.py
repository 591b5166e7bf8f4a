"""The sum of squares: exact to float64, the same bits from every implementation, and no trace of how x was cut."""

import math

import pytest
import torch
from adam_cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.kernels import native, sum_of_squares
from megalith.kernels.reference import SUM_BLOCK_NUMEL, SUM_LANES, sum_of_squares_reference

SIZES = (1, 3, SUM_LANES - 1, SUM_LANES + 1, SUM_BLOCK_NUMEL, SUM_BLOCK_NUMEL + 1, 100_003, 70 * SUM_BLOCK_NUMEL + 5)
needs_library = pytest.mark.skipif(native.best_isa() == "torch", reason="the compiled CPU kernels are absent")


def random(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_sum_of_the_squares(dtype):
    for numel in SIZES:
        x = random(numel, dtype)
        exact = math.fsum(value * value for value in x.tolist())
        total = sum_of_squares(x)
        assert total.shape == (1,) and total.dtype == torch.float64
        assert abs(total.item() - exact) <= 1e-14 * exact, numel


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_has_the_same_bits(dtype):
    for numel in SIZES:
        x = random(numel, dtype)
        expected = sum_of_squares_reference(x)
        assert torch.equal(sum_of_squares(x), expected), numel
        assert torch.equal(native.sum_of_squares([x], "baseline"), expected), numel


def test_more_than_one_level_of_block_sums_has_the_same_bits():
    x = random(1, torch.bfloat16).repeat(SUM_BLOCK_NUMEL * (SUM_BLOCK_NUMEL // 64) + 1)
    assert torch.equal(sum_of_squares(x), sum_of_squares_reference(x))


def test_the_number_of_threads_changes_no_bit(threads):
    x = random(1_000_003, torch.float32)
    totals = []
    for count in (1, 2, 3):
        threads(count)
        totals.append(sum_of_squares(x))
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 1000), st.lists(st.integers(0, 60_000), max_size=8))
def test_the_float32_norm_does_not_show_where_a_tensor_was_cut(dtype, seed, cuts):
    x = random(60_000, dtype, seed)
    borders = [0, *sorted(cuts), 60_000]
    pieces = [sum_of_squares(x[start:stop]) for start, stop in zip(borders, borders[1:], strict=False)]
    norms = [total.sqrt().float() for total in (sum_of_squares(x), torch.stack(pieces).sum(0))]
    assert torch.equal(*norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_one_value_that_is_not_finite_shows(dtype, value):
    for at in (0, 20_000, 99_999):
        x = random(100_000, dtype)
        x[at] = value
        assert not sum_of_squares(x).isfinite().item()


def test_the_largest_and_the_smallest_values_neither_overflow_nor_vanish():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    smallest = torch.full((1000,), 1e-45)
    assert sum_of_squares(largest).item() == pytest.approx(1000 * largest[0].item() ** 2, rel=1e-14)
    assert sum_of_squares(smallest).item() == pytest.approx(1000 * smallest[0].item() ** 2, rel=1e-14)


def test_no_elements_sum_to_zero():
    assert torch.equal(sum_of_squares(torch.zeros(0)), torch.zeros(1, dtype=torch.float64))


def test_several_tensors_have_the_sums_that_each_has_alone():
    tensors = [torch.randn(100_000), torch.zeros(0), torch.randn(7).bfloat16(), torch.randn(33_000).half()]
    assert torch.equal(sum_of_squares(*tensors), torch.cat([sum_of_squares(x) for x in tensors]))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, dtype=torch.int32), "x is torch.int32"),
        (torch.zeros(3, 2), r"x has shape \[3, 2\]"),
        (torch.zeros(6)[::2], "contiguous"),
    ],
)
def test_a_wrong_tensor_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        sum_of_squares(x)


def test_tensors_on_meta_have_no_values():
    assert sum_of_squares(torch.empty(3, device="meta"), torch.empty(5, device="meta")).tolist() == [0, 0]
    with pytest.raises(ValueError, match="x is on meta"):
        sum_of_squares(torch.zeros(3), torch.zeros(3, device="meta"))
