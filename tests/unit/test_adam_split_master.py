"""The split master weight: nothing is lost, and the high half is the bfloat16 that a cast would give, ties apart."""

import pytest
import torch
from megalith.kernels import join_master, split_master

# The lows at which something happens: both ends, both sides of the tie, and a few between.
LOWS = [0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xABCD, 0xFFFE, 0xFFFF]


@pytest.fixture(scope="module")
def patterns():
    """Every upper half of a float32 with each of LOWS, then a million random patterns: int32 [1786432]."""
    grid = (torch.arange(1 << 16).unsqueeze(1) << 16) + torch.tensor(LOWS)
    random = torch.randint(1 << 32, (1_000_000,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([grid.flatten(), random])
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)


def test_every_pattern_comes_back_and_nan_stays_nan(patterns):
    master = patterns.view(torch.float32)
    weight, remainder = split_master(master)
    joined = join_master(weight, remainder)
    nan = master.isnan()
    assert nan.sum() > 100 and master.isinf().sum() >= 2
    assert torch.equal(joined.view(torch.int32)[~nan], patterns[~nan])
    assert joined[nan].isnan().all() and weight[nan].isnan().all() and not remainder[nan].any()


def test_the_high_half_is_the_nearest_bfloat16_and_ties_go_away_from_zero(patterns):
    master = patterns.view(torch.float32)
    weight, _ = split_master(master)
    tie = (patterns & 0xFFFF) == 0x8000
    normal = ~tie & ~master.isnan()
    assert torch.equal(weight[normal], master[normal].to(torch.bfloat16))
    ties = tie & master.isfinite()
    assert (weight[ties].double().abs() > master[ties].double().abs()).all()


def test_a_finite_master_beyond_bfloat16_comes_back_from_an_infinite_weight():
    master = torch.tensor([torch.finfo(torch.float32).max])
    weight, remainder = split_master(master)
    assert weight.isinf().all() and torch.equal(join_master(weight, remainder), master)


def test_given_tensors_are_filled(patterns):
    master = patterns[:1_500_000].view(torch.float32)
    halves = (torch.empty(master.shape, dtype=torch.bfloat16), torch.empty(master.shape, dtype=torch.int16))
    back = torch.empty_like(master)
    assert all(a is b for a, b in zip(split_master(master, out=halves), halves, strict=True))
    assert join_master(*halves, out=back) is back
    assert torch.equal(back.nan_to_num(), master.nan_to_num())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: split_master(torch.zeros(3, dtype=torch.float64)), "master has to be torch.float32"),
        (lambda: split_master(torch.zeros(3, 1)), "one-dimensional"),
        (lambda: split_master(torch.zeros(3), out=(torch.zeros(3), torch.zeros(3))), "weight has to be torch.bfloat16"),
        (lambda: join_master(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)), "remainder has to be torch.int16"),
        (lambda: join_master(*split_master(torch.zeros(3)), out=torch.zeros(4)), r"master has to be .* of shape \[3\]"),
    ],
)
def test_a_wrong_tensor_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
