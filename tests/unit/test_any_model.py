"""Models of every kind against plain PyTorch, by the relative error of the update.

On the host the weights are released between uses even at one rank, so every hook is needed.
"""

import gc
import threading
from collections import namedtuple
from dataclasses import dataclass

import megalith.engine as engine
import pytest
import torch
import torch.nn.functional as F
from against_torch import adamw, error_against_torch, fit, gathered_weights, initialized
from tiny import batches, make_model, update_error, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

D = 16
X = torch.randn(8, D, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(3))
Pair = namedtuple("Pair", "hidden extra")


@dataclass
class Output:
    hidden: torch.Tensor


def square(model, step):
    return model(X * (1 + step)).square().mean()


def on_ids(model, step):
    return model(IDS).square().mean()


class Block(nn.Module):
    """The nonlinearity comes first, so that the backward pass needs the weights."""

    def __init__(self, width=D):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(torch.tanh(x))))


class Blocks(nn.Module):
    """Four blocks between two linear layers; the variants below change how a block is called."""

    def __init__(self, make_block=Block):
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.layers = nn.ModuleList([make_block() for _ in range(4)])
        self.leave = nn.Linear(D, D)

    def call(self, layer, x):
        return layer(x)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = x + self.call(layer, x)
        return self.leave(x)


class Nested(Blocks):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])

    def call(self, layer, x):
        return layer[1](layer[0](x))


class Piecewise(Blocks):
    def call(self, layer, x):
        return layer.down(torch.tanh(layer.up(torch.tanh(x))))


class Twice(Blocks):
    def call(self, layer, x):
        return layer(layer(x))


class Dropout(Blocks):
    def call(self, layer, x):
        return F.dropout(layer(x), 0.3)


class InPlace(Blocks):
    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            y = x.clone()
            x = x + layer(y.mul_(1.5))
            x.add_(0.1)
        return self.leave(x)


class Checkpointed(Blocks):
    reentrant = False

    def call(self, layer, x):
        return checkpoint(layer, x, use_reentrant=self.reentrant)


class ReentrantTwice(Blocks):
    def call(self, layer, x):
        return checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)


class Outputs(Blocks):
    """Blocks that return a dict, a tuple, a namedtuple and a dataclass."""

    def __init__(self):
        super().__init__(Wrapping)
        for layer, kind in zip(
            self.layers, [lambda x: {"hidden": x}, lambda x: (x, 1), Pair._make, Output], strict=True
        ):
            layer.wrap = (lambda x: Pair(x, None)) if kind == Pair._make else kind

    def call(self, layer, x):
        out = layer(x)
        if isinstance(out, dict):
            return out["hidden"]
        return out.hidden if isinstance(out, Output | Pair) else out[0]


class Wrapping(Block):
    def forward(self, x):
        return self.wrap(super().forward(x))


class SideLoss(nn.Module):
    """Each block leaves a loss of its own behind, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        losses = []
        for layer in self.layers:
            layer.side = torch.tanh(layer.up(torch.tanh(x))).square().mean()
            losses.append(layer.side)
            x = layer(x)
        return torch.stack([x.square().mean(), *losses])


class Unused(Blocks):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(D, D)
        self.layers[1].idle = nn.Linear(D, D)


class Skipping(Blocks):
    """Step k leaves out block k modulo 4, and every second step the last layer."""

    def forward(self, x, step):
        x = self.enter(x)
        for index, layer in enumerate(self.layers):
            if index != step % 4:
                x = x + layer(x)
        return self.leave(x) if step % 2 else x


class SharedWeights(Blocks):
    """One module in two places, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.layers[2] = self.layers[0]
        self.layers[3].up.weight = self.layers[1].up.weight


class RootParameter(Blocks):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.scale.tanh() * self.scalar + self.nothing.sum()


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x, depth=2):
        x = torch.tanh(self.first(x)) + self.bias
        return self.last(torch.tanh(self.forward(x, depth - 1) if depth else x))


class ListInBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(D, D) / 4 for _ in range(2)])

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x) @ weight
        return x


class Attention(nn.Module):
    """Uses out_proj.weight without calling out_proj."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(D, 2, bias=False, batch_first=True)

    def forward(self, x):
        return self.attend(torch.tanh(x)[None], x[None], x[None])[0][0]


class EncoderDecoder(nn.Module):
    """Every decoder block takes the encoder's output, which requires grad."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([Block() for _ in range(2)])
        self.decoder = nn.ModuleList([nn.Bilinear(D, D, D) for _ in range(3)])

    def forward(self, x):
        memory = x
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = torch.tanh(layer(x, memory))
        return x


def frozen_half():
    model = Blocks()
    model.enter.requires_grad_(False)
    model.layers[:2].requires_grad_(False)
    return model


def masked():
    model = Blocks()
    model.enter.weight.register_hook(lambda gradient: gradient.tril())
    return model


def mlp():
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Tanh(), nn.Linear(D, D))])


def reentrant():
    model = Checkpointed()
    model.reentrant = True
    return model


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(56, 3)
    )


def parametrized():
    normed = torch.nn.utils.parametrizations
    return nn.Sequential(normed.weight_norm(nn.Linear(D, D)), nn.Tanh(), normed.spectral_norm(nn.Linear(D, 4)))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def bert():
    return BertForMaskedLM(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def starving_mixtral():
    """Sixteen experts and few tokens, so that some get none, with the router's loss."""
    return make_model("mixtral", num_local_experts=16, output_router_logits=True, router_aux_loss_coef=0.1)


def language_loss(model, step):
    rows = batches(4, rows=2, length=3)[step]
    return model(input_ids=rows, labels=rows).loss


MODELS = {
    "sequential": (mlp, square),
    "blocks": (Blocks, square),
    "nested lists": (Nested, square),
    "children called piecewise": (Piecewise, square),
    "block called twice": (Twice, square),
    "two forwards, one backward": (Blocks, lambda m, step: square(m, step) + square(m, step + 1)),
    "dropout": (Dropout, square),
    "in place": (InPlace, square),
    "checkpoint": (Checkpointed, square),
    "reentrant checkpoint": (reentrant, square),
    "reentrant checkpoint, twice": (ReentrantTwice, square),
    "outputs": (Outputs, square),
    "side losses": (SideLoss, lambda m, step: m(X).sum()),
    "side losses alone": (SideLoss, lambda m, step: m(X)[1:].sum()),
    "unused": (Unused, square),
    "skipping": (Skipping, lambda m, step: m(X, step).square().mean()),
    "shared weights": (SharedWeights, square),
    "parameters of the root": (RootParameter, square),
    "recursive": (Recursive, square),
    "parameter list in a block": (lambda: Blocks(ListInBlock), square),
    "multi-head attention": (lambda: Blocks(Attention), square),
    "encoder-decoder": (EncoderDecoder, square),
    "frozen half": (frozen_half, square),
    "hook on a parameter": (masked, square),
    "inputs that require grad": (Blocks, lambda m, step: m(X.clone().requires_grad_()).square().mean()),
    "batch norm": (convolution, square),
    "parametrizations": (parametrized, square),
    "lstm": (lambda: nn.LSTM(D, 8, 2, batch_first=True), lambda m, step: m(X[None])[0].square().mean()),
    "t5": (t5, lambda m, step: m(input_ids=IDS, labels=IDS.flip(0)).loss),
    "bert": (bert, lambda m, step: m(input_ids=IDS, labels=IDS).loss),
    "mixtral with idle experts": (starving_mixtral, language_loss),
}


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("name", MODELS)
def test_matches_plain_pytorch(name, placement):
    build, loss_of = MODELS[name]
    assert error_against_torch(build, loss_of, placement=placement) < 2e-6


def test_unused_parameters_stay_to_the_bit():
    model, optimizer = initialized(Unused, placement="host")
    before = gathered_weights(model)
    fit(model, optimizer, square, 3)
    after = gathered_weights(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("idle" in name), name


@pytest.mark.parametrize("placement", ["device", "host"])
def test_two_losses_with_two_backward_passes(placement):
    plain, (model, optimizer) = Blocks(), initialized(Blocks, placement=placement)
    plain.load_state_dict(initial := gathered_weights(model))
    reference = adamw(plain)
    for step in range(3):
        for net in (plain, model):
            hidden = net(X + step)
            hidden.square().mean().backward(retain_graph=True)
            hidden.tanh().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for each in (reference, optimizer):
            each.step()
            each.zero_grad()
    assert update_error(initial, gathered_weights(model), weights_of(plain)) < 2e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps_changes_no_bit(mode):
    def train(evaluates):
        model, optimizer = initialized(Blocks, placement="host", prefetch=2)
        for step in range(4):
            fit(model, optimizer, square, [step])
            if evaluates:
                with mode():
                    model(X)
                    model.layers[step](X)
        return gathered_weights(model)

    ours, expected = train(True), train(False)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_two_engines_in_one_process():
    def train(steps, both):
        actor, actor_optimizer = initialized(Blocks, placement="host")
        critic, critic_optimizer = initialized(mlp, placement="host", precision="bf16")
        for step in steps:
            fit(actor, actor_optimizer, square, [step])
            if both:
                critic_optimizer.backward(critic(actor(X).detach()).float().square().mean())
                critic_optimizer.step()
                critic_optimizer.zero_grad()
        return gathered_weights(actor)

    alone, beside = train(range(3), False), train(range(3), True)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_clean_retry_after_a_backward_pass_that_raised(placement, precision):
    def train(fails):
        model, optimizer = initialized(Blocks, placement=placement, precision=precision)
        if fails:
            handle = model.layers[1].up.weight.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.backward(square(model, 0).float())
            handle.remove()
            optimizer.zero_grad()
        fit(model, optimizer, lambda m, step: square(m, step).float(), 3)
        return gathered_weights(model)

    failed, clean = train(True), train(False)
    assert all(torch.equal(failed[name], clean[name]) for name in clean)


def test_a_forward_pass_that_raised_leaves_nothing_behind():
    model, optimizer = initialized(Blocks, placement="host")
    handle = model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    handle.remove()
    fit(model, optimizer, square, 1)


def test_lora_of_peft_matches_plain_pytorch():
    peft = pytest.importorskip("peft")

    def build():
        return peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    for placement in ("device", "host"):
        assert error_against_torch(build, language_loss, placement=placement) < 2e-6
    model, _ = initialized(build, placement="host")
    report = engine.memory_report(model)["host"]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert report["exp_avg"]["bytes"] < 4 * trainable + 64 * 4 * len(list(model.parameters()))
    assert report["weight"]["bytes"] > 10 * report["exp_avg"]["bytes"]


def test_reentrant_checkpointing_with_a_frozen_head_is_one_backward_pass_in_fp16():
    def build():
        model = reentrant()
        model.leave.requires_grad_(False)
        return model

    model, optimizer = initialized(build, precision="fp16")
    fit(model, optimizer, lambda m, step: square(m, step).float(), 2)


def test_nested_gathered_keeps_the_weights_of_the_outer_one():
    model, _ = initialized(Blocks, placement="host")
    assert not engine.is_gathered(model)
    with engine.gathered(model):
        assert engine.is_gathered(model)
        with engine.gathered(model):
            pass
        assert all(parameter.untyped_storage().nbytes() > 0 for parameter in model.parameters())


def test_what_waits_for_the_processor_alone_has_no_threads():
    before = set(threading.enumerate())
    fit(*initialized(Blocks, placement="host"), square, 1)
    assert set(threading.enumerate()) == before


def test_the_threads_of_an_engine_end_with_its_model():
    before = set(threading.enumerate())
    for _ in range(3):
        model, optimizer = initialized(Blocks, placement="host", lane_delay=float)
        fit(model, optimizer, square, 1)
        assert set(threading.enumerate()) - before
        del model, optimizer
        for _ in range(10):  # autograd's nodes own hooks that hold nodes: each pass frees the last of them
            gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
