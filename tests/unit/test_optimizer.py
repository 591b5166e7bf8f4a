"""The optimizer that initialize returns, beside torch's own: groups, schedulers, closures, step counts."""

import pytest
import torch
from against_torch import adamw, error_against_torch, fit, gathered_weights, initialized
from test_any_model import Blocks, Skipping, X, square
from tiny import update_error, weights_of
from torch.optim import lr_scheduler

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 5e-3, total_steps=8),  # changes the betas too
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


def two_groups(model, kind=torch.optim.AdamW):
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return kind(
        [{"params": biases, "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}, {"params": weights, "eps": 1e-4}],
        lr=1e-3,
        eps=1e-5,
        weight_decay=0.2,
    )


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_every_group_keeps_its_own_values(kind, placement):
    assert error_against_torch(Blocks, square, 4, lambda m: two_groups(m, kind), placement=placement) < 2e-6


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch(name, made_before):
    torch.manual_seed(0)
    plain = Blocks()
    initial, optimizer = weights_of(plain), two_groups(plain)
    scheduler = SCHEDULERS[name](optimizer)
    early = {}

    def make_optimizer(model):
        user = two_groups(model)
        if made_before:
            early["scheduler"] = SCHEDULERS[name](user)
        return user

    model, ours = initialized(Blocks, make_optimizer, placement="host")
    ours_scheduler = early["scheduler"] if made_before else SCHEDULERS[name](ours)
    for step in range(6):
        for net, each, schedule in ((plain, optimizer, scheduler), (model, ours, ours_scheduler)):
            fit(net, each, square, [step])
            schedule.step(1.0) if name == "plateau" else schedule.step()
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert update_error(initial, gathered_weights(model), weights_of(plain)) < 2e-6


def test_a_closure_is_called_with_gradients_enabled():
    def train(closes):
        model, optimizer = initialized(Blocks)
        for step in range(3):

            def closure(step=step):
                optimizer.zero_grad()
                loss = square(model, step)
                loss.backward()
                return loss.item()

            if closes:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        return gathered_weights(model)

    one, other = train(True), train(False)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_learning_rate_set_by_hand_and_one_in_a_tensor():
    def train(lr):
        model, optimizer = initialized(Blocks, lambda m: adamw(m, lr=1.0))
        optimizer.param_groups[0]["lr"] = lr
        fit(model, optimizer, square, 2)
        return gathered_weights(model)

    one, other = train(0.25), train(torch.tensor(0.25))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_counted_for_each_parameter():
    model, optimizer = initialized(Skipping)
    fit(model, optimizer, lambda m, step: m(X, step).square().mean(), 5)
    assert optimizer.steps_taken["enter.weight"] == 5
    assert [optimizer.steps_taken[f"layers.{i}.up.weight"] for i in range(4)] == [3, 4, 4, 4]
    assert optimizer.steps_taken["leave.weight"] == 2


def test_a_step_without_gradients_changes_nothing():
    model, optimizer = initialized(Blocks, placement="host")
    before = gathered_weights(model)
    optimizer.step()
    after = gathered_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(optimizer.steps_taken.values()) and optimizer.skipped_steps == 0
