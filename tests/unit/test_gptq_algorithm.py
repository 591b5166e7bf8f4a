"""GPTQ against rounding to the nearest, brute force and itself."""

import itertools

import pytest
import torch
from megalith.rlhf.gptq_algorithm import GptqOptions, QuantizationError, damp, find_grid, quantize_matrix


def correlated(inputs, outputs=24, rank=24, seed=0):
    """A weight [K, N], and the Hessian [K, K] of inputs with few strong directions, as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(inputs, rank, generator=generator) * torch.logspace(0, -1, rank)
    energy = 0.5 + torch.rand(inputs, 1, generator=generator)
    x = energy.T * (torch.randn(2048, rank, generator=generator) @ directions.T)
    x += 0.3 * torch.randn(2048, inputs, generator=generator)
    return 0.05 * torch.randn(inputs, outputs, generator=generator), 2 / len(x) * x.T @ x


def ratio(result):
    return (result.objective.sum() / result.rounded_objective.sum()).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_objectives_are_those_of_the_dequantised_weight(bits, sym):
    weight, hessian = correlated(96)
    for changes in ({}, {"static_groups": False}, {"desc_act": False}, {"group_size": -1}, {"group_size": 40}):
        options = GptqOptions(**{"bits": bits, "sym": sym, "group_size": 32, **changes})
        result = quantize_matrix(weight, hessian, options)
        error = weight - result.dequantize()
        expected = torch.stack([column @ hessian @ column for column in error.T])
        torch.testing.assert_close(result.objective, expected, rtol=1e-3, atol=1e-7)
        assert int(result.codes.max()) < 2**bits and len(result.g_idx) == 96
        groups = 1 if options.group_size == -1 else -(-96 // options.group_size)
        assert result.scales.shape == (groups, 24)
        order_kept = torch.equal(result.g_idx, torch.arange(96, dtype=torch.int32) // min(options.group_size % 97, 96))
        assert order_kept == (options.static_groups or not options.desc_act or groups == 1)


def test_bars_of_the_objective():
    """At most 0.25 of rounding to the nearest without act-order, 0.15 with it, by GPTQ alone."""
    weight, hessian = correlated(256)
    gptq = {"mse": False, "num_beams": 1, "descent_passes": 0}
    plain = ratio(quantize_matrix(weight, hessian, GptqOptions(desc_act=False, **gptq)))
    ordered = [ratio(quantize_matrix(weight, hessian, GptqOptions(static_groups=s, **gptq))) for s in (True, False)]
    assert plain <= 0.25
    assert max(ordered) <= 0.15
    assert max(ordered) < plain


@pytest.mark.parametrize("given", [{}, {"desc_act": False}, {"static_groups": False}, {"bits": 3, "sym": False}])
def test_each_step_beyond_gptq_pays(given):
    """On a Hessian without strong directions, where GPTQ alone misses its bars."""
    weight, hessian = correlated(256, rank=192)
    steps = {"mse": True, "num_beams": 8, "descent_passes": 4}
    none = {"mse": False, "num_beams": 1, "descent_passes": 0}
    found = []
    for count in range(4):
        options = GptqOptions(**given, **none | dict(list(steps.items())[:count]))
        found.append(ratio(quantize_matrix(weight, hessian, options)))
    assert found == sorted(found, reverse=True) and found[-1] < 0.85 * found[0]


@pytest.mark.parametrize("options", [{}, {"desc_act": False}, {"static_groups": False}, {"sym": False}])
@pytest.mark.parametrize("mse", [False, True])
def test_independent_inputs_are_rounded_to_the_nearest(options, mse):
    """On the grid that covers the weights, or on one of less error."""
    weight, _ = correlated(64)
    result = quantize_matrix(weight, torch.eye(64), GptqOptions(group_size=16, mse=mse, **options))
    if mse:
        assert (result.objective <= result.rounded_objective).all()
        assert result.objective.sum() < 0.98 * result.rounded_objective.sum()
    else:
        assert torch.equal(result.objective, result.rounded_objective)
    step = result.scales.float()[result.g_idx.long()]
    inside = (result.codes > 0) & (result.codes < 15)
    assert ((weight - result.dequantize()).abs() <= 0.5001 * step)[inside].all()


def test_block_rows_do_not_matter():
    weight, hessian = correlated(100)
    results = [
        quantize_matrix(weight, hessian, GptqOptions(group_size=-1, block_rows=rows, num_beams=1, descent_passes=0))
        for rows in (1, 32, 128, 100)
    ]
    for other in results[1:]:
        assert (other.codes != results[0].codes).float().mean() < 0.01  # ties
        assert ratio(other) == pytest.approx(ratio(results[0]), rel=0.02)


def test_no_better_rounding_is_missed_by_much():
    """All 4 ** 5 roundings of five inputs, on the same grid: GPTQ lies between the best and the nearest."""
    weight, hessian = correlated(5, outputs=6, rank=2)
    result = quantize_matrix(weight, hessian, GptqOptions(bits=2, group_size=-1))
    scale = result.scales.float()[0]
    best = torch.full((6,), torch.inf)
    for codes in itertools.product(range(4), repeat=5):
        error = weight - (torch.tensor(codes)[:, None] - 2) * scale
        best = torch.minimum(best, ((hessian @ error) * error).sum(0))
    assert (best <= result.objective * 1.0001).all()
    assert result.objective.sum() <= 3 * best.sum()
    assert result.objective.sum() < result.rounded_objective.sum()


def test_grids():
    positive = torch.tensor([[0.2], [1.0], [0.5]])
    scale, zero = find_grid(positive, GptqOptions())
    # A grid from 0 on with the zero-point in the middle would end at 0.467.
    assert (15 - zero.item()) * scale.item() > 0.9
    scale, zero = find_grid(positive, GptqOptions(sym=False))
    assert zero.item() == 0 and scale.item() * 15 == pytest.approx(1, rel=1e-3)
    scale, zero = find_grid(positive, GptqOptions(sym=False, min_zero=1))
    assert zero.item() == 1 and scale.item() * 14 == pytest.approx(1, rel=1e-3)
    for sym in (True, False):
        scale, zero = find_grid(torch.zeros(4, 1), GptqOptions(sym=sym))
        assert scale.item() > 0
        scale, zero = find_grid(1e-12 * positive, GptqOptions(sym=sym))
        assert scale.half().item() > 0
        with pytest.raises(QuantizationError, match="float16"):
            find_grid(1e7 * positive, GptqOptions(sym=sym))


def test_mse_finds_grids_of_less_error():
    generator = torch.Generator().manual_seed(0)
    weights, importance = torch.randn(128, 50, generator=generator), torch.rand(128, generator=generator)

    def error(options, *given):
        scale, zero = find_grid(weights, options, *given)
        codes = (weights / scale + zero).round().clamp(0, 7)
        return importance @ ((codes - zero) * scale - weights).square()

    for sym in (True, False):
        options = GptqOptions(bits=3, sym=sym)
        searched, covering = error(options, importance), error(options)
        assert (searched <= error(options, torch.ones(128)) * 1.0001).all()
        assert (searched <= covering).all() and searched.sum() < 0.95 * covering.sum()


def test_unseen_inputs_and_damping():
    weight, hessian = correlated(48)
    hessian[3], hessian[:, 3] = 0, 0
    result = quantize_matrix(weight, hessian, GptqOptions(group_size=16))
    assert (weight[3] - result.dequantize()[3]).abs().max() <= 0.51 * result.scales[0].max()
    assert result.damp_percent == 0.01
    indefinite = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(48)
    result = quantize_matrix(weight, indefinite, GptqOptions(group_size=16))
    assert 0.01 < result.damp_percent <= 0.6
    with pytest.raises(QuantizationError, match="not positive definite"):
        damp(-hessian, 0.01)
    with pytest.raises(QuantizationError, match="not finite"):
        quantize_matrix(weight, hessian * torch.nan, GptqOptions())


def test_columns_are_independent():
    """Linears with the same input are quantised side by side."""
    weight, hessian = correlated(64)
    whole = quantize_matrix(weight, hessian, GptqOptions(group_size=32))
    alone = quantize_matrix(weight[:, 8:20], hessian, GptqOptions(group_size=32))
    part = whole.columns(8, 20)
    assert (part.codes != alone.codes).float().mean() < 0.01
    assert torch.equal(part.scales, alone.scales) and torch.equal(part.g_idx, alone.g_idx)


@pytest.mark.parametrize("changes", [{"bits": 5}, {"group_size": 0}, {"group_size": -2}, {"damp_percent": 0.0}])
def test_wrong_options(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GptqOptions(**changes)
