"""What once crashed, or trained wrongly without a word: each is now right, or an error that names it."""

import tempfile
from dataclasses import dataclass

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, error_against_torch, fit, gathered_weights, initialized
from test_any_model import IDS, Block, Blocks, X, on_ids, square
from torch import nn


class ScaledEmbedding(nn.Embedding):
    """Its backward pass needs a weight, which that of a plain embedding does not."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(sizes[1]))

    def forward(self, ids):
        return super().forward(ids) * self.gain


class AfterEmbedding(Blocks):
    def __init__(self):
        super().__init__()
        self.enter = ScaledEmbedding(20, 16)


class ListInRoot(Blocks):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(16, 16)
        self.tail = nn.ParameterList([torch.randn(16, 16) / 4 for _ in range(2)])

    def forward(self, x):
        x = super().forward(x)
        for weight in self.tail:
            x = torch.tanh(x) @ weight
        return x


@dataclass(slots=True)
class Slotted:
    hidden: torch.Tensor


class SlottedBlock(Block):
    def forward(self, x):
        return Slotted(super().forward(x))


class SlottedOutputs(Blocks):
    def __init__(self):
        super().__init__(SlottedBlock)

    def call(self, layer, x):
        return layer(x).hidden


@pytest.mark.parametrize(
    ("build", "loss_of"), [(AfterEmbedding, on_ids), (ListInRoot, square), (SlottedOutputs, square)]
)
def test_released_weights_are_back_when_they_are_needed(build, loss_of):
    assert error_against_torch(build, loss_of, placement="host") < 2e-6


def test_an_embedding_that_writes_its_weight_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        initialized(lambda: nn.Sequential(nn.Embedding(20, 16, max_norm=1.0), nn.Linear(16, 4)), placement="host")


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_of_inputs_leave_the_training_as_it_was(precision, placement):
    def train(looks):
        model, optimizer = initialized(Blocks, placement=placement, precision=precision)
        x = X.clone().requires_grad_()
        for step in range(3):
            if looks:
                (gradient,) = torch.autograd.grad(model(x).float().sum(), x)
                assert gradient.abs().sum() > 0
            fit(model, optimizer, lambda m, step: square(m, step).float(), [step])
        assert len(x._backward_hooks or {}) == 0, "a leaf outlives the pass, and would collect hooks"
        return gathered_weights(model)

    looked, alone = train(True), train(False)
    assert all(torch.equal(looked[name], alone[name]) for name in alone)


def replace_data(model):
    model.enter.weight.data = model.enter.weight.data.clone()


def replace_parameter(model):
    model.enter.weight = nn.Parameter(torch.zeros(16, 16))


@pytest.mark.parametrize("replace", [replace_data, replace_parameter])
def test_a_parameter_that_was_replaced_is_an_error_that_names_it(replace):
    model, optimizer = initialized(Blocks)
    fit(model, optimizer, square, 1)
    replace(model)
    with pytest.raises(RuntimeError, match="enter.weight"):
        fit(model, optimizer, square, 1)


def test_state_of_a_part_of_a_sharded_model_is_refused():
    model, _ = initialized(Blocks, placement="host")
    with pytest.raises(RuntimeError, match="gathered"):
        model.layers[0].state_dict()
    with pytest.raises(RuntimeError, match="load_checkpoint"):
        model.layers[0].load_state_dict({})


@pytest.mark.parametrize("placement", ["device", "host"])
def test_models_that_overlap_are_refused(placement):
    model, _ = initialized(Blocks, placement=placement)
    for overlapping in (model.layers, nn.Sequential(model.layers[0], nn.Linear(16, 1)), nn.Sequential(model)):
        with pytest.raises(ValueError, match="initialize"):
            engine.initialize(overlapping, adamw(overlapping))


def test_real_weights_beside_weights_on_meta_are_kept():
    real = nn.Linear(16, 16)
    with torch.device("meta"):
        made = nn.Linear(16, 16)
    expected = real.weight.detach().clone()
    model = nn.Sequential(real, made)
    model, _ = engine.initialize(model, adamw(model))
    assert torch.equal(model[0].weight, expected)
    assert 0 < model[1].weight.abs().max() < 1


def test_training_goes_on_after_an_interrupt():
    model, optimizer = initialized(Blocks, placement="host")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[1].up.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    fit(model, optimizer, square, 2)


def test_an_optimizer_with_a_step_of_its_own_is_refused():
    class Noisy(torch.optim.Adam):
        def step(self, closure=None):
            return None

    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Noisy"):
        engine.initialize(model, Noisy(model.parameters()))


def test_a_complex_parameter_is_refused_by_name():
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises((ValueError, TypeError), match="phase"):
        engine.initialize(model, adamw(model))


def test_saving_inside_gathered_keeps_the_weights_gathered():
    model, optimizer = initialized(Blocks, placement="host")
    before = gathered_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        with engine.gathered(model):
            engine.save_pretrained(f"{folder}/weights", model)
            engine.save_checkpoint(f"{folder}/checkpoint", model, optimizer)
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        fit(model, optimizer, square, 1)


@pytest.mark.parametrize("end", ["gathered", "step"])
def test_a_failed_backward_pass_can_be_followed_by_anything(end):
    model, optimizer = initialized(Blocks, placement="host")
    before = gathered_weights(model)
    handle = model.layers[1].up.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        square(model, 0).backward()
    handle.remove()
    if end == "step":
        optimizer.zero_grad()
        optimizer.step()
    after = gathered_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_no_gradient_is_stored_between_steps(placement):
    model, optimizer = initialized(Blocks, placement=placement)
    fit(model, optimizer, square, 2)
    device = engine.memory_report(model)["device"]
    assert device["gradient"]["bytes"] == 0 < device["gradient"]["peak_bytes"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_batch_norm_runs_in_half_precision(precision):
    model, optimizer = initialized(
        lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)), precision=precision
    )
    fit(model, optimizer, lambda m, step: m(X).float().square().mean(), 2)


def test_ignored_options_are_refused():
    with pytest.raises(ValueError, match="loss_scale"):
        initialized(Blocks, loss_scale=8.0)
    _, optimizer = initialized(Blocks)
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=False)


def test_a_weight_used_without_calling_its_module_is_an_error_of_torch():
    class Functional(Blocks):
        def forward(self, ids):
            return super().forward(ids) @ self.enter.weight.T

        def __init__(self):
            super().__init__()
            self.enter = nn.Embedding(20, 16)

    assert error_against_torch(Functional, on_ids, placement="device") < 2e-6
    model, _ = initialized(Functional, placement="host")
    with pytest.raises(RuntimeError, match="storage|allocated"):
        model(IDS)
