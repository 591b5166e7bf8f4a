"""Mixed precision to the bit, non-finite gradients, clipping and accumulation."""

import math

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, differing, fit, gathered_weights, initialized, state_of
from megalith.kernels import AdamHyper, fused_adam_, split_master
from test_any_model import Blocks, square
from tiny import batches, make_model, update_error, weights_of

PRECISIONS = ["fp32", "bf16", "fp16"]
PLACEMENTS = ["device", "host"]


def float_loss(model, step):
    return model(torch.ones(3, 16).cumsum(1).sin() * (1 + step)).float().square().mean()


def language_loss(model, step):
    rows = batches(8)[step]
    return model(input_ids=rows, labels=rows).loss


def emulated(build, loss_of, steps, precision, lr, scales, max_grad_norm):
    """Plain PyTorch with a float32 master beside every 16-bit weight, updated from the 16-bit gradients. `scales` are
    the loss scales of the steps."""
    torch.manual_seed(0)
    model = build()
    masters = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    moments = {name: (torch.zeros_like(master), torch.zeros_like(master)) for name, master in masters.items()}

    def low(master):
        return split_master(master.flatten())[0].view(master.shape) if precision == "bf16" else master.half()

    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.data = low(masters[name])
        (loss_of(model, step) * scales[step]).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())) / scales[step]
        factor = min(1.0, max_grad_norm / (norm + 1e-6)) / scales[step]
        for name, master in masters.items():
            hyper = AdamHyper(lr=lr, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.1, decoupled=True, step=step + 1)
            fused_adam_(
                master.view(-1),
                gradients[name].reshape(-1),
                *(moment.view(-1) for moment in moments[name]),
                hyper,
                factor=torch.tensor([factor]),
                found_inf=torch.zeros(1),
            )
        model.zero_grad()
    return masters


def masters_of(model):
    return {name.split()[1]: value for name, value in state_of(model).items() if name.startswith("master ")}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_bf16_masters_have_the_bits_of_an_emulation(placement, max_grad_norm):
    ours, optimizer = initialized(
        lambda: make_model("llama"), placement=placement, precision="bf16", max_grad_norm=max_grad_norm
    )
    initial = masters_of(ours)
    fit(ours, optimizer, language_loss, 4)
    expected = emulated(lambda: make_model("llama"), language_loss, 4, "bf16", 1e-3, [1.0] * 4, max_grad_norm)
    for name, master in masters_of(ours).items():
        assert torch.equal(master, expected[name].flatten()), name
        assert not torch.equal(master, initial[name]), name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fp16_unscales_with_the_scale_that_was_used_also_when_it_grows(placement):
    ours, optimizer = initialized(lambda: make_model("llama"), placement=placement, precision="fp16", loss_scale=2.0**8)
    optimizer.scaler.growth_interval = 2
    scales = []
    for step in range(5):
        scales.append(optimizer.scaler.scale)
        fit(ours, optimizer, language_loss, [step])
    assert scales == [2.0**8, 2.0**8, 2.0**9, 2.0**9, 2.0**10]
    expected = emulated(lambda: make_model("llama"), language_loss, 5, "fp16", 1e-3, scales, 1.0)
    for name, master in masters_of(ours).items():
        assert torch.equal(master, expected[name].flatten()), name


def test_bf16_tracks_fp32():
    outcomes = {}
    for precision in ("fp32", "bf16"):
        model, optimizer = initialized(lambda: make_model("llama"), precision=precision)
        outcomes["initial"] = masters_of(model) if precision == "fp32" else outcomes["initial"]
        fit(model, optimizer, language_loss, 8)
        outcomes[precision] = masters_of(model)
    assert update_error(outcomes["initial"], outcomes["bf16"], outcomes["fp32"]) < 0.1


def test_tiny_updates_reach_the_master_and_at_last_the_weight():
    model, optimizer = initialized(
        lambda: torch.nn.Linear(16, 16, bias=False), lambda m: adamw(m, lr=1e-6, weight_decay=0.0), precision="bf16"
    )
    plain = torch.nn.Linear(16, 16, bias=False).bfloat16()
    plain.load_state_dict(gathered_weights(model))
    plain_optimizer = adamw(plain, lr=1e-6, weight_decay=0.0)
    before, master_before = plain.weight.detach().clone(), masters_of(model)["weight"]
    for _ in range(100):
        for net, each in ((model, optimizer), (plain, plain_optimizer)):
            net(torch.ones(16, dtype=torch.bfloat16)).float().sum().backward()
            each.step()
            each.zero_grad()
    moved = masters_of(model)["weight"] - master_before
    torch.testing.assert_close(moved, torch.full_like(moved, -1e-4), rtol=0.02, atol=0)
    stuck = plain.weight == before
    assert stuck.float().mean() > 0.5, "in plain bf16 most of these updates are rounded away"
    ours_moved = gathered_weights(model)["weight"] != before
    assert (ours_moved & stuck).any()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bf16_state_takes_twelve_bytes_a_parameter_at_rest(placement):
    model, optimizer = initialized(
        lambda: make_model("llama"), placement=placement, precision="bf16", max_chunk_numel=10**6
    )
    fit(model, optimizer, language_loss, 2)
    report = engine.memory_report(model)
    numel = sum(parameter.numel() for parameter in model.parameters())
    payloads = [(name, row["bytes"]) for tier in report.values() for name, row in tier.items() if name != "total"]
    state = sum(nbytes for name, nbytes in payloads if name not in ("gradient", "gathered"))
    assert 12 * numel <= state <= 12 * numel * 1.01
    if placement == "device":
        assert state == sum(nbytes for _, nbytes in payloads), "gradients are transient"


def poison(model, value):
    """The gradient of one weight becomes `value` in one element."""
    return model.layers[2].up.weight.register_hook(
        lambda gradient: gradient.clone().index_fill_(0, torch.tensor([1]), value)
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gradient_that_is_not_finite_skips_the_step_to_the_bit(precision, placement, value):
    model, optimizer = initialized(Blocks, placement=placement, precision=precision)
    fit(model, optimizer, float_loss, 2)
    before, weights, steps = state_of(model), gathered_weights(model), dict(optimizer.steps_taken)
    scale = optimizer.scaler.scale if optimizer.scaler else None
    handle = poison(model, value)
    fit(model, optimizer, float_loss, [2])
    handle.remove()
    assert differing(state_of(model), before) == []
    assert differing(gathered_weights(model), weights) == []
    assert (optimizer.steps_taken, optimizer.skipped_steps) == (steps, 1)
    assert not math.isfinite(optimizer.grad_norm)
    if scale is not None:
        assert optimizer.scaler.scale == scale / 2

    fit(model, optimizer, float_loss, [3])
    assert math.isfinite(optimizer.grad_norm) and optimizer.skipped_steps == 1
    assert differing(state_of(model), before)
    if precision != "fp16":  # there the scale is another one from here on
        other, other_optimizer = initialized(Blocks, placement=placement, precision=precision)
        fit(other, other_optimizer, float_loss, 2)
        fit(other, other_optimizer, float_loss, [3])
        assert differing(state_of(model), state_of(other)) == []


def test_a_loss_that_overflows_fp16_backs_off_until_it_fits():
    model, optimizer = initialized(Blocks, precision="fp16", loss_scale=2.0**40)
    fit(model, optimizer, float_loss, 40)
    assert optimizer.skipped_steps > 0 and optimizer.scaler.scale == 2.0 ** (40 - optimizer.skipped_steps)
    assert set(optimizer.steps_taken.values()) == {40 - optimizer.skipped_steps}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_boundary_of_clipping(precision, placement):
    def first_step(limit):
        model, optimizer = initialized(Blocks, placement=placement, precision=precision, max_grad_norm=limit)
        fit(model, optimizer, float_loss, 1)
        return optimizer.grad_norm, state_of(model)

    norm, free = first_step(None)
    for limit, factor in ((norm * 1.001, 1.0), (norm * 0.999, 0.999), (norm * 0.1, 0.1)):
        clipped_norm, clipped = first_step(limit)
        assert clipped_norm == norm, "the norm is the one before clipping"
        if factor == 1.0:
            assert differing(clipped, free) == []
        for name in free:
            if name.startswith("exp_avg "):
                torch.testing.assert_close(clipped[name], free[name] * factor, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-6), ("bf16", 0.1), ("fp16", 0.02)])
def test_accumulation_of_small_batches_equals_one_large_batch(precision, bound, placement):
    def train(micro_batches):
        model, optimizer = initialized(lambda: make_model("llama"), placement=placement, precision=precision)
        initial, norms = masters_of(model), []
        for rows in batches(3, rows=8):
            for part in rows.chunk(micro_batches):
                optimizer.backward(model(input_ids=part, labels=part).loss / micro_batches)
            optimizer.step()
            norms.append(optimizer.grad_norm)
            optimizer.zero_grad()
        return initial, masters_of(model), norms

    initial, whole, norms = train(1)
    for count in (2, 4):
        _, parts, part_norms = train(count)
        assert update_error(initial, parts, whole) < bound
        assert part_norms == pytest.approx(norms, rel=max(bound, 1e-5))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_zero_grad_drops_what_has_landed(placement):
    def train(wastes):
        model, optimizer = initialized(Blocks, placement=placement)
        for step in range(2):
            if wastes:
                square(model, 5).backward()
                optimizer.zero_grad()
            fit(model, optimizer, square, [step])
        return gathered_weights(model)

    assert differing(train(True), train(False)) == []


def test_fp32_weights_are_their_own_masters():
    model, _ = initialized(Blocks)
    weights = weights_of(model)
    assert all(torch.equal(master, weights[name].flatten()) for name, master in masters_of(model).items())
    assert "master" not in engine.memory_report(model)["device"]
