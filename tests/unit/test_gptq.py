"""GPTQ weights on the CPU against numbers computed apart; the custom operators; bad input."""

import dataclasses
import itertools

import pytest
import torch
from gptq_cases import CASES, LIMITS, expected_product, make_weight, mean_relative_error
from megalith.kernels import (
    gptq_dequantize,
    gptq_matmul,
    join_gptq_weights,
    native,
    pack_codes,
    prepare_gptq_weight,
)
from megalith.kernels.cpu_gptq import PACKED_ROWS

DTYPES = list(LIMITS)


def operands(weight):
    return (
        weight.qweight,
        weight.scales,
        weight.zeros,
        weight.perm,
        weight.bias,
        weight.bits,
        weight.group_size,
        weight.in_features,
    )


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dequantized_weights_are_exact(case, scale_dtype):
    weight, dense = make_weight(case, scale_dtype=scale_dtype)
    for dtype in DTYPES:
        assert torch.equal(gptq_dequantize(weight, dtype), dense.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_float32(case, dtype):
    weight, dense = make_weight(case)
    for rows in (1, 2, 5, 16, 17, 70, PACKED_ROWS[dtype] + 1):
        x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = gptq_matmul(x, weight)
        assert y.dtype == dtype and y.shape == (rows, weight.out_features)
        error = mean_relative_error(y, expected_product(x, weight, dense))
        assert error < LIMITS[dtype], (rows, error)


@pytest.mark.parametrize("isa", [*native.ISAS, "torch"])
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_gives_the_same_product(case, isa, monkeypatch):
    if isa != "torch" and (native.library() is None or native.ISAS.index(isa) > native.ISAS.index(native.best_isa())):
        pytest.skip(f"no {isa} here")
    monkeypatch.setattr(native, "best_isa", lambda: isa)
    weight, dense = make_weight(case)
    assert torch.equal(gptq_dequantize(weight, torch.float16), dense.half())
    for rows, dtype in itertools.product((1, 2, 3, 7), DTYPES):
        x = torch.randn(rows, weight.in_features).to(dtype) + 3  # a mean that zero-points have to take off again
        error = mean_relative_error(gptq_matmul(x, weight), expected_product(x, weight, dense))
        assert error < LIMITS[dtype], (rows, dtype, error)


@pytest.mark.parametrize("case", ["wide", "asymmetric", "one_group"])
def test_the_number_of_threads_changes_no_bit(case):
    weight, _ = make_weight(case)
    x = torch.randn(3, weight.in_features)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gptq_matmul(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_runs_have_the_same_bits(dtype):
    weight, _ = make_weight("act_order")
    for rows in (1, 30):
        x = torch.randn(rows, weight.in_features).to(dtype)
        assert len({gptq_matmul(x, weight).float().numpy().tobytes() for _ in range(10)}) == 1


def test_any_leading_dimensions():
    weight, _ = make_weight("act_order")
    x = torch.randn(2, 3, weight.in_features)
    flat = gptq_matmul(x.view(6, -1), weight)
    assert torch.equal(gptq_matmul(x, weight), flat.view(2, 3, -1))
    assert torch.equal(gptq_matmul(x.transpose(0, 1), weight), flat.view(2, 3, -1).transpose(0, 1))
    assert gptq_matmul(x[:, :0], weight).shape == (2, 0, weight.out_features)
    assert torch.equal(gptq_matmul(x[0, 0], weight), gptq_matmul(x[:1, 0], weight)[0])


def test_gradients_flow_to_x():
    weight, dense = make_weight("act_order")
    x = torch.randn(5, weight.in_features, requires_grad=True)
    grad = torch.randn(5, weight.out_features)
    gptq_matmul(x, weight).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense.T)


@pytest.mark.parametrize("case", ["plain", "act_order", "3_bits"])
def test_the_custom_operators_keep_the_rules(case):
    weight, _ = make_weight(case)
    qweight, scales, zeros, perm, bias, *numbers = operands(weight)
    for x in (torch.randn(3, weight.in_features), torch.randn(2, 2, weight.in_features, requires_grad=True)):
        torch.library.opcheck(torch.ops.megalith.gptq_matmul.default, (x, *operands(weight)))
    torch.library.opcheck(
        torch.ops.megalith.gptq_dequantize.default, (qweight, scales, zeros, perm, *numbers, torch.bfloat16)
    )


def test_torch_compile_takes_it_in_one_graph():
    weight, _ = make_weight("act_order")
    x = torch.randn(3, weight.in_features)
    compiled = torch.compile(lambda x: gptq_matmul(x, weight) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), gptq_matmul(x, weight) * 2)


def test_a_joined_weight_gives_the_columns_of_all():
    parts = [make_weight("asymmetric", seed=seed)[0] for seed in range(3)]
    parts[1] = dataclasses.replace(parts[1], zeros=None)
    parts[2] = dataclasses.replace(parts[2], scales=parts[2].scales.float())
    x = torch.randn(4, parts[0].in_features)
    joined = join_gptq_weights(parts)
    torch.testing.assert_close(gptq_matmul(x, joined), torch.cat([gptq_matmul(x, part) for part in parts], dim=-1))
    act_order = [make_weight("act_order", seed=seed)[0] for seed in range(2)]
    for wrong, message in (
        (act_order, "permute their input differently"),
        ([parts[0], dataclasses.replace(parts[0], bias=None)], "some weights have a bias"),
        ([parts[0], act_order[0]], "group_size is 64 and 128"),
    ):
        with pytest.raises(ValueError, match=message):
            join_gptq_weights(wrong)


def test_negative_groups_count_from_the_last():
    weight, dense = make_weight("plain")
    g_idx = torch.arange(256) // 128 - 2
    again = prepare_gptq_weight(
        weight.qweight, weight.scales, None, bits=4, group_size=128, in_features=256, g_idx=g_idx
    )
    assert again.perm is None and torch.equal(gptq_dequantize(again, torch.float32), dense)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"qweight": torch.zeros(8, 8)}, "qweight is torch.float32"),
        ({"qweight": torch.zeros(7, 8, dtype=torch.int32)}, "qweight has shape \\[7, 8\\], but \\[8, 8\\]"),
        ({"scales": torch.ones(1, 8)}, "scales has shape \\[1, 8\\], but \\[2, 8\\]"),
        ({"scales": torch.ones(2, 8, dtype=torch.float64)}, "scales is torch.float64"),
        ({"zeros": torch.ones(2, 8)}, "zeros is torch.float32"),
        ({"bias": torch.ones(9)}, "bias has shape \\[9\\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx is torch.int32 of shape \\[63\\]"),
        ({"g_idx": torch.arange(64) // 16}, "g_idx reaches from 0 to 3, but there are 2 groups"),
        ({"g_idx": torch.arange(64) - 3}, "g_idx reaches from -3"),
        ({"g_idx": torch.zeros(64, dtype=torch.int64)}, "g_idx gives 64 rows to group 0"),
    ],
)
def test_bad_tensors_are_named(changes, message):
    good = {
        "qweight": pack_codes(torch.zeros(64, 8, dtype=torch.int32), 4),
        "scales": torch.ones(2, 8),
        "zeros": None,
        "bits": 4,
        "group_size": 32,
        "in_features": 64,
    }
    with pytest.raises(ValueError, match=message):
        prepare_gptq_weight(**{**good, **changes})


def test_bad_activations_are_named():
    weight, _ = make_weight("plain")
    with pytest.raises(ValueError, match="x is torch.float64"):
        gptq_matmul(torch.zeros(1, 256, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="takes 256 input features"):
        gptq_matmul(torch.zeros(1, 255), weight)
    with pytest.raises(ValueError, match="x is on meta"):
        gptq_matmul(torch.zeros(1, 256, device="meta"), weight)
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        gptq_dequantize(weight, torch.int8)
