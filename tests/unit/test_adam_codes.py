"""Adam with 8-bit moments: the codes, every implementation bit-identical to the oracle, and that it trains."""

import pytest
import torch
from adam_cases import ADAMW, FORMS, HYPERS, copy_of, differing, make_special_tensors, make_tensors, with_codes
from megalith.kernels import CODE_DTYPES, AdamHyper, decode_moment, encode_moment, fused_adam_, scales_numel
from megalith.kernels.adam_step import AdamTensors
from megalith.kernels.reference import adam_reference_
from test_adam import IMPLEMENTATIONS, ONE, ZERO, public

SIZES = (1, 255, 257, 4097, 100_003)


def encoded(values, moment):
    codes = torch.zeros(values.numel(), dtype=CODE_DTYPES[moment])
    scales = torch.zeros(scales_numel(values.numel()))
    encode_moment(values, moment, codes, scales)
    return codes, scales


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_bits_of_the_oracle(form, kind, step):
    factor = torch.tensor([0.37])
    for numel in SIZES:
        tensors = with_codes(make_tensors(form, torch.bfloat16, numel))
        expected = copy_of(tensors)
        for _ in range(2):
            step(tensors, HYPERS[kind], factor, ZERO)
            adam_reference_(expected, HYPERS[kind], factor, ZERO)
        assert differing(tensors, expected) == [], numel


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_special_values_have_the_bits_of_the_oracle(form, step):
    tensors = with_codes(make_special_tensors(form, torch.float32))
    expected = copy_of(tensors)
    step(tensors, ADAMW, ONE, ZERO)
    adam_reference_(expected, ADAMW, ONE, ZERO)
    assert differing(tensors, expected) == []


def test_cutting_at_blocks_changes_no_bit():
    whole, cut = (with_codes(make_tensors("split", torch.bfloat16, 70_000)) for _ in range(2))
    public(whole, ADAMW, ONE, ZERO)
    for start, stop in ((0, 256), (256, 41_216), (41_216, 70_000)):
        public(cut.block(start, stop), ADAMW, ONE, ZERO)
    assert differing(cut, whole) == []


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_a_gradient_in_several_tensors_changes_no_bit(step):
    whole, cut = (with_codes(make_tensors("split", torch.bfloat16, 70_000)) for _ in range(2))
    step(whole, ADAMW, ONE, ZERO)
    grads = tuple(part.clone() for part in cut.grad.split([256, 40_960, 28_784]))
    step(cut._replace(grad=grads), ADAMW, ONE, ZERO)
    assert differing(cut, whole) == []
    with pytest.raises(ValueError, match="grad is cut within a block of 256"):
        public(cut._replace(grad=tuple(cut.grad.split([255, 69_745]))), ADAMW, ONE, ZERO)


def test_found_inf_leaves_every_tensor_as_it_was():
    tensors = with_codes(make_tensors("split", torch.float16, 4097))
    before = copy_of(tensors)
    public(tensors, ADAMW, ONE, ONE)
    assert differing(tensors, before) == []


@pytest.mark.parametrize("moment", CODE_DTYPES)
def test_codes_keep_what_they_hold_and_encode_it_again_to_themselves(moment):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 5000)
    values = values if moment == "exp_avg" else values.square()
    codes, scales = encoded(values, moment)
    decoded = decode_moment(codes, moment, scales)
    again = encoded(decoded, moment)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    blocks = torch.nn.functional.pad(values, (0, -5000 % 256)).view(-1, 256)
    scale = blocks.abs().amax(dim=1, keepdim=True).expand_as(blocks).reshape(-1)[:5000].double()
    power, levels = (2, 127) if moment == "exp_avg" else (4, 255)
    roots = [(x.abs().double() / scale).pow(1 / power) * levels for x in (values, decoded)]
    # Half a step of the root; a second moment that is not zero never becomes zero.
    assert (roots[0] - roots[1]).abs().max() < (0.501 if moment == "exp_avg" else 1.001)
    assert (decoded * values >= 0).all() and (moment == "exp_avg" or (decoded > 0).all())


def test_the_denominator_is_exact_to_a_percent_over_a_quarter_of_its_range():
    root = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 0.75 + 0.25
    codes, scales = encoded(root.square(), "exp_avg_sq")
    assert (decode_moment(codes, "exp_avg_sq", scales).sqrt() / root - 1).abs().max() < 0.01


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_it_trains_as_exact_adam_does(beta2):
    """The loss curve of a small network, step by step beside exact Adam's."""
    curves = []
    for coded in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
        inputs = torch.randn(512, 20)
        labels = (inputs @ torch.randn(20, 10)).argmax(dim=1)
        flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        tensors = AdamTensors(flat, torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat))
        tensors = with_codes(tensors) if coded else tensors
        offset = 0
        for parameter in model.parameters():
            parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        curves.append([])
        for step in range(1, 201):
            rows = torch.randint(0, 512, (64,))
            loss = torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            tensors.grad.copy_(torch.cat([grad.flatten() for grad in grads]))
            hyper = AdamHyper(lr=5e-3, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.01, decoupled=True, step=step)
            public(tensors, hyper, ONE, ZERO)
            curves[-1].append(loss.item())
    exact, coded = (torch.tensor(curve) for curve in curves)
    assert exact[-20:].mean() < 0.5 < 2.0 < exact[0]
    assert (coded[-20:].mean() / exact[-20:].mean() - 1).abs() < 0.03
    assert ((coded - exact).abs() / exact).mean() < 0.03


def test_a_wrong_tensor_is_named():
    tensors = with_codes(make_tensors("split", torch.float32, 300))._asdict()
    for name, wrong, message in (
        ("scales", torch.zeros(3), "scales has shape \\[3\\], but \\[4\\]"),
        ("scales", torch.zeros(4, dtype=torch.float64), "scales is torch.float64"),
        ("exp_avg", torch.zeros(300), "exp_avg is torch.float32"),
        ("exp_avg_sq", torch.zeros(300, dtype=torch.int8), "exp_avg_sq is torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_adam_(**{**tensors, name: wrong}, hyper=ADAMW, factor=ONE, found_inf=ZERO)
