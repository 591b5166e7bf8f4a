"""Models made on meta: initial weights with the distributions of an ordinary construction, buffers with its values."""

import random

import pytest
import torch
from megalith.engine.materialize import initialize_parameters, rebuild_buffers
from tiny import FAMILIES, make_model
from torch import nn


def made_on_meta(make):
    with torch.device("meta"):
        return make()


def initialized(model, seed=0, dtype=torch.float32, names=None):
    """name -> initial value of every parameter, or of those named, in that order."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    targets = {name: torch.full(shapes[name], 77, dtype=dtype) for name in names or shapes}
    initialize_parameters(model, targets, seed)
    return targets


@pytest.mark.parametrize("family", FAMILIES)
def test_distributions_are_those_of_an_ordinary_construction(family):
    ordinary = dict(make_model(family, pad_token_id=3).named_parameters())
    ours = initialized(made_on_meta(lambda: make_model(family, pad_token_id=3)))
    assert ours.keys() == ordinary.keys()
    for name, theirs in ordinary.items():
        value, theirs = ours[name], theirs.detach()
        assert value.isfinite().all(), name
        if theirs.std() == 0:  # zeros, ones
            assert torch.equal(value, theirs), name
            continue
        constant_rows = (theirs == 0).all(-1)  # padding
        assert torch.equal((value == 0).all(-1), constant_rows), name
        deviations = 6 / theirs.numel() ** 0.5
        assert abs(value.std() / theirs.std() - 1) < deviations, name
        assert abs(value.mean()) < deviations * theirs.std(), name
        assert abs((value / value.std()).pow(4).mean() / (theirs / theirs.std()).pow(4).mean() - 1) < 10 * deviations, (
            name
        )


def test_gpt2_scales_what_it_adds_to_the_residual_stream():
    value = initialized(made_on_meta(lambda: make_model("gpt2", n_layer=8)))
    for name in ("attn", "mlp"):
        scale = value[f"transformer.h.5.{name}.c_proj.weight"].std() / 0.02
        assert abs(scale - (2 * 8) ** -0.5) < 0.03


def test_a_tied_weight_has_the_values_of_its_embedding_under_either_name():
    model = made_on_meta(lambda: make_model("llama_tied", pad_token_id=3))
    by_head = initialized_alias(model, "lm_head.weight")
    by_embedding = initialized_alias(model, "model.embed_tokens.weight")
    assert torch.equal(by_head, by_embedding)
    assert (by_head[3] == 0).all() and (by_head[2] != 0).any()


def initialized_alias(model, name):
    out = torch.full(model.get_parameter(name).shape, torch.nan)
    initialize_parameters(model, {name: out}, 0)
    return out


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llama_tied"])
def test_values_depend_on_seed_and_name_alone(family):
    whole = initialized(made_on_meta(lambda: make_model(family)))
    names = list(whole)
    random.Random(0).shuffle(names)
    torch.manual_seed(17)
    model = made_on_meta(lambda: make_model(family))
    for name in names:  # in another order, one by one, from another random state
        assert torch.equal(initialized(model, names=[name])[name], whole[name]), name
    for name, value in initialized(model, dtype=torch.bfloat16).items():
        assert torch.equal(value, whole[name].bfloat16()), name
    name = next(name for name in names if whole[name].dim() == 2)
    strided = torch.full(whole[name].shape[::-1], torch.nan).T
    initialize_parameters(model, {name: strided}, 0)
    assert torch.equal(strided, whole[name])

    drawn = {name: value for name, value in whole.items() if value.std() > 0}
    other = initialized(model, seed=1)
    values = [value.flatten()[:16] for value in drawn.values()] + [other[name].flatten()[:16] for name in drawn]
    values = torch.stack([value / value.norm() for value in values])
    closeness = (values @ values.T).fill_diagonal_(0).abs()
    assert closeness.max() < 0.95  # no two parameters or seeds have the same numbers


def test_nothing_but_the_targets_changes():
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    random_state = torch.get_rng_state()
    initialized(model, names=["transformer.h.1.mlp.c_proj.weight", "transformer.h.0.ln_1.bias"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_a_released_parameter_is_neither_read_nor_written():
    model = make_model("llama")
    for parameter in model.parameters():
        parameter.data.untyped_storage().resize_(0)  # as the engine releases chunks; touching it would crash
    assert initialized(model)["model.norm.weight"].eq(1).all()


def test_plain_modules_use_reset_parameters():
    def make():
        return nn.Sequential(
            nn.Linear(64, 48), nn.LayerNorm(48), nn.Conv1d(48, 8, 3), nn.MultiheadAttention(48, 4), nn.LSTM(8, 16)
        )

    torch.manual_seed(0)
    ordinary, ours = dict(make().named_parameters()), initialized(made_on_meta(make))
    narrow = initialized(made_on_meta(make), dtype=torch.bfloat16)
    for name, theirs in ordinary.items():
        assert torch.equal(narrow[name], ours[name].bfloat16()), name
        if theirs.std() == 0:
            assert torch.equal(ours[name], theirs), name
        else:
            assert abs(ours[name].std() / theirs.std() - 1) < 6 / theirs.numel() ** 0.5, name
            assert ours[name].abs().max() <= theirs.abs().max() * 1.2, name  # bounds that follow from the sizes


class OwnRules(nn.Module):
    """In the manner of nanoGPT: the root's _init_weights for what it knows, the rest by reset_parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.out = nn.Linear(40, 50)
        self.norm = nn.LayerNorm(40)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.constant_(module.bias, 0.25)
        elif isinstance(module, nn.Embedding):
            module.weight.mul_(3)  # of what reset_parameters gave


def test_a_models_own_rules_come_after_reset_parameters():
    value = initialized(made_on_meta(OwnRules))
    assert abs(value["out.weight"].std() - 0.5) < 0.03
    assert value["out.bias"].eq(0.25).all() and value["norm.weight"].eq(1).all()
    assert abs(value["embed.weight"].std() - 3) < 0.15


class Unruly(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.inner = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(4).float(), persistent=False)


def test_what_has_no_rule_is_an_error_that_names_it():
    model = made_on_meta(lambda: nn.Sequential(Unruly()))
    with pytest.raises(ValueError, match=r"0.gain: no rule initialises it. Give Unruly a reset_parameters\(\)"):
        initialized(model)
    with pytest.raises(ValueError, match=r"^0: no rule rebuilds the buffers \['table'\] of Unruly"):
        rebuild_buffers(model, "cpu")
    assert model[0].table.is_meta and model[0].gain.is_meta
    with pytest.raises(ValueError, match="0.gain is torch.int64 and has no initial value"):
        initialized(model, dtype=torch.int64)


def test_a_rule_that_cannot_run_on_meta_is_an_error_that_names_the_parameter():
    class Reading(nn.Linear):
        def _init_weights(self, module):
            nn.init.ones_(module.weight)
            module.bias.fill_(module.weight.sum().item())

    with pytest.raises(ValueError, match="its initialisation fails on a model made on meta: .*meta"):
        initialized(made_on_meta(lambda: Reading(3, 3)))


ROPE = {
    "default": {},
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "dynamic": dict(factor=4.0),
    "longrope": dict(factor=4.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_buffer_is_rebuilt(family):
    assert_buffers_are_rebuilt(lambda: make_model(family))


@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_rotary_buffers_are_rebuilt(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPE[rope_type]}
    names = assert_buffers_are_rebuilt(lambda: make_model("llama", rope_parameters=rope))
    assert "model.rotary_emb.inv_freq" in names


def test_running_statistics_are_rebuilt():
    assert len(assert_buffers_are_rebuilt(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5)))) == 3


def assert_buffers_are_rebuilt(make):
    ordinary, model = dict(make().named_buffers()), made_on_meta(make)
    weights = list(model.parameters())
    rebuild_buffers(model, "cpu")
    rebuilt = dict(model.named_buffers())
    assert rebuilt.keys() == ordinary.keys()
    for name, buffer in ordinary.items():
        assert torch.equal(rebuilt[name], buffer) and rebuilt[name].dtype == buffer.dtype, name
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    return list(rebuilt)


def test_a_buffer_that_has_a_value_keeps_it():
    model = made_on_meta(lambda: nn.BatchNorm1d(3))
    model.running_mean = torch.tensor([1.0, 2.0, 3.0])
    rebuild_buffers(model, "cpu")
    assert model.running_mean.tolist() == [1, 2, 3] and model.running_var.tolist() == [1, 1, 1]


def test_random_buffers_follow_the_seed():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("directions", torch.empty(8))

        def reset_parameters(self):
            self.directions.normal_()

    def rebuilt(seed):
        model = made_on_meta(Projected)
        rebuild_buffers(model, "cpu", seed)
        return model.directions

    assert torch.equal(rebuilt(0), rebuilt(0)) and not torch.equal(rebuilt(0), rebuilt(1))
    assert rebuilt(0).std() > 0.1
