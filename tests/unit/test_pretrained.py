"""Folders in Hugging Face layout: what we load has the logits of from_pretrained, and so has what it loads of ours."""

import copy
import json
import os
import shutil
import weakref

import pytest
import safetensors.torch
import torch
from megalith.engine.export import save_pretrained
from megalith.engine.materialize import rebuild_buffers
from megalith.engine.pretrained import PretrainedFolder
from megalith.engine.safetensors_io import SafetensorsFileError
from tiny import FAMILIES, batches, config_of
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

ROPE = {
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "dynamic": dict(factor=4.0),
    "linear": dict(factor=2.0),
}


def random_model(config, auto=AutoModelForCausalLM, dtype=torch.float32):
    """No weight is 0 or 1 any more, so that none can be mistaken for another or for its initial value."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def on_meta(config, auto=AutoModelForCausalLM, dtype=torch.float32):
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype).eval()


def load(folder, model):
    """What the engine does, without chunks: real parameters in the place of those on meta, filled; buffers rebuilt."""
    weights = PretrainedFolder(folder, model)
    real = {id(p): nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype)) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({name: real[id(p)] for name, p in module._parameters.items() if p is not None})
    for name, parameter in model.named_parameters():
        weights.fill({name: parameter.detach()})
    weights.fill_buffers(model, "cpu")
    rebuild_buffers(model, "cpu")
    return model


def logits(model, length=24):
    with torch.no_grad():
        return model(batches(1, rows=2, length=length)[0])[0]


def tensors_of(model):
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def edit(folder, change):
    """Rewrite the single weights file of `folder`."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000], ids=["one file", "shards"])
def test_loading_and_saving_agree_with_transformers(tmp_path, family, dtype, shard_bytes):
    config = config_of(family)
    random_model(config, dtype=dtype).save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))
    model = load(tmp_path / "theirs", on_meta(config, dtype=dtype))
    assert theirs.dtype == dtype and torch.equal(logits(model), theirs)

    backwards = reversed(list(tensors_of(model)))
    save_pretrained(tmp_path / "ours", model, backwards, dtype=dtype, max_shard_bytes=shard_bytes)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(reloaded), theirs)
    assert type(reloaded) is type(model) and reloaded.dtype == dtype
    tied = getattr(config, "tie_word_embeddings", False)
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
    assert stored_names(tmp_path / "ours") == stored_names(tmp_path / "theirs")
    shards = [name for name in os.listdir(tmp_path / "ours") if name.startswith("model-")]
    assert len(shards) >= 2 if shard_bytes == 20_000 else not shards
    assert all(os.path.getsize(tmp_path / "ours" / name) < 30_000 for name in shards)
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0] == configs[1]


def stored_names(folder):
    files = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return {name for file in files for name in safetensors.torch.load_file(folder / file)}


@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_rotary_embeddings_are_rebuilt(tmp_path, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPE[rope_type]}
    config = config_of("llama", rope_parameters=rope, max_position_embeddings=32)
    random_model(config).save_pretrained(tmp_path)
    for length in (24, 48):  # within and beyond the trained length
        theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path), length)
        assert torch.equal(logits(load(tmp_path, on_meta(config)), length), theirs)


def test_values_are_cast_to_the_dtype_of_the_targets(tmp_path):
    for family in ("llama", "mixtral"):
        random_model(config_of(family)).save_pretrained(tmp_path / family)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        model = load(tmp_path / family, on_meta(config_of(family), dtype=torch.bfloat16))
        assert torch.equal(logits(model), logits(theirs))


def test_a_base_model_loads_into_one_with_a_head_and_the_reverse(tmp_path):
    for family in ("llama_tied", "gpt2", "opt", "bloom", "llama"):
        config = config_of(family)
        random_model(config).save_pretrained(tmp_path / "whole")
        loaded = load(tmp_path / "whole", on_meta(config, AutoModel))  # of "llama", the separate head is left unread
        assert torch.equal(logits(loaded), logits(AutoModel.from_pretrained(tmp_path / "whole")))
        random_model(config, AutoModel).save_pretrained(tmp_path / "base")
        if family != "llama":
            loaded = load(tmp_path / "base", on_meta(config))
            assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[97, 32\]$"):
        load(tmp_path / "base", on_meta(config))


def test_a_name_that_a_renaming_would_take_is_kept_where_the_model_has_it(tmp_path):
    def extended(model, fill):
        model.extra = nn.ParameterDict({"weight_g": torch.full((3,), fill, device=model.device)})  # a legacy name
        return model

    extended(random_model(config_of("llama")), 1.5).save_pretrained(tmp_path)
    out = torch.empty(3)
    PretrainedFolder(tmp_path, extended(on_meta(config_of("llama")), 0.0)).fill({"extra.weight_g": out})
    assert out.eq(1.5).all()


def test_a_new_head_is_missing_only_where_that_is_allowed(tmp_path):
    random_model(config_of("llama")).save_pretrained(tmp_path)
    scorer = on_meta(config_of("llama", num_labels=1), AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"missing: score.weight \[1, 32\]$"):
        PretrainedFolder(tmp_path, scorer)
    weights = PretrainedFolder(tmp_path, scorer, allow_missing=["score.*"])
    assert weights.missing == {"score.weight"}
    assert "score.weight" not in weights and "model.norm.weight" in weights
    with pytest.raises(ValueError, match="holds no score.weight"):
        weights.fill({"score.weight": torch.empty(1, 32)})


def test_a_tied_weight_is_found_under_either_name(tmp_path):
    config = config_of("llama_tied")
    reference = random_model(config)
    reference.save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: {n.replace("model.embed_tokens", "lm_head"): w for n, w in weights.items()})
    assert "lm_head.weight" in stored_names(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        out = torch.empty(reference.lm_head.weight.shape)
        PretrainedFolder(tmp_path, on_meta(config)).fill({name: out})
        assert torch.equal(out, reference.lm_head.weight)


def test_a_tied_weight_stored_twice_must_agree(tmp_path):
    config = config_of("llama_tied")
    random_model(config).save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    load(tmp_path, on_meta(config))
    edit(tmp_path, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="stores lm_head.weight and model.embed_tokens.weight with different values"):
        load(tmp_path, on_meta(config))


def test_old_names_and_buffers_are_skipped_as_in_transformers(tmp_path):
    config = config_of("gpt2")
    reference = random_model(config)
    reference.save_pretrained(tmp_path)

    def like_the_first_gpt2(weights):
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        return {**weights, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    edit(tmp_path, like_the_first_gpt2)
    assert torch.equal(logits(load(tmp_path, on_meta(config))), logits(reference))


def test_all_that_does_not_fit_is_one_error_before_any_value_is_read(tmp_path):
    random_model(config_of("llama")).save_pretrained(tmp_path)

    def spoil(weights):
        del weights["model.norm.weight"]
        weights["model.surprise"] = torch.zeros(3)
        weights["lm_head.weight"] = torch.zeros(2, 5)
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(torch.int8)
        return weights

    edit(tmp_path, spoil)
    with pytest.raises(ValueError) as raised:
        PretrainedFolder(tmp_path, on_meta(config_of("llama")))
    for part in [
        "is not a checkpoint of this LlamaForCausalLM",
        "missing: model.norm.weight [32]\n",
        "unexpected: model.surprise [3]\n",
        "lm_head.weight [2, 5], the model has [97, 32]",
        "model.embed_tokens.weight torch.int8, quantised",
    ]:
        assert part in str(raised.value)


def test_a_missing_expert_is_named(tmp_path):
    random_model(config_of("mixtral")).save_pretrained(tmp_path)
    gone = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit(tmp_path, lambda weights: {name: w for name, w in weights.items() if name != gone})
    with pytest.raises(ValueError, match="model.layers.1.mlp.experts.gate_up_proj cannot be made of .*experts.0.w1"):
        PretrainedFolder(tmp_path, on_meta(config_of("mixtral")))


def test_a_broken_folder_is_an_error_that_names_the_file(tmp_path):
    model = on_meta(config_of("llama"))
    with pytest.raises(SafetensorsFileError, match="neither model.safetensors nor .* no folder"):
        PretrainedFolder(tmp_path / "absent", model)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(SafetensorsFileError, match="pytorch_model.bin.*Pickled weights are not read"):
        PretrainedFolder(tmp_path / "pickled", model)

    random_model(config_of("llama")).save_pretrained(tmp_path / "good", max_shard_size=20_000)
    shard = sorted(path.name for path in (tmp_path / "good").glob("model-*"))[1]
    held = next(iter(safetensors.torch.load_file(tmp_path / "good" / shard)))

    def truncate(folder):
        os.truncate(folder / shard, 5000)

    def remove(folder):
        (folder / shard).unlink()

    def lie(folder):
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(f'"{held}"', '"model.nowhere"'))

    def garble(folder):
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')

    for spoil, message in [
        (truncate, f"{shard} is truncated or corrupt"),
        (remove, f"{shard}: No such file"),
        (lie, f"says that {shard} holds model.nowhere"),
        (garble, "index.json is corrupt"),
    ]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        spoil(tmp_path / "bad")
        with pytest.raises(SafetensorsFileError, match=message):
            PretrainedFolder(tmp_path / "bad", model)


class Plain(nn.Module):
    """No transformers model: tied weights and persistent buffers of several dtypes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return (self.head(self.norm(self.embed(ids.flatten()))),)


def test_a_plain_module_goes_there_and_back_with_its_buffers(tmp_path):
    model = Plain()
    for _ in range(3):
        model(torch.randint(0, 11, (4, 5)))  # moves the running statistics
    model.eval()
    save_pretrained(tmp_path, model, tensors_of(model), dtype=torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]
    fresh = Plain()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))  # strict: both tied names
    with torch.device("meta"):
        meta = Plain()
    ids = torch.randint(0, 11, (2, 3))
    for loaded in (fresh.eval(), load(tmp_path, meta).eval()):
        assert torch.equal(loaded(ids)[0], model(ids)[0])
        assert loaded.norm.num_batches_tracked == 3


def test_tensors_are_given_and_written_one_at_a_time(tmp_path):
    model = random_model(config_of("mixtral"))
    alive = []

    def tensors():
        for name, parameter in model.named_parameters():
            assert not alive, "the tensor before is still in memory"
            array = parameter.detach().numpy().copy()  # which every tensor of this memory keeps alive
            alive.append(name)
            weakref.finalize(array, alive.remove, name)
            tensor = torch.from_numpy(array)
            del array
            yield name, tensor
            del tensor

    save_pretrained(tmp_path, model, tensors(), dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_every_rank_exhausts_the_tensors_and_meets_at_the_barrier(tmp_path):
    model = random_model(config_of("llama"))
    names = [name for name, _ in model.named_parameters()]
    met = []

    def run(tensors, **options):
        given = []
        save_pretrained(tmp_path, model, noting(tensors, given), dtype=torch.float32, barrier=met.append, **options)
        return given

    def noting(tensors, given):
        for name, tensor in tensors:
            given.append(name)
            yield name, tensor

    assert run(tensors_of(model), write=False) == names
    assert os.listdir(tmp_path) == [] and met == [None]
    wrong = [(name, tensor[:1] if name == names[2] else tensor) for name, tensor in tensors_of(model)]
    assert run(wrong) == names  # to the end, though the third could not be written
    assert isinstance(met.pop(), ValueError) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda given: given[1:], r"were not given: \['model.embed_tokens.weight'\]"),
        (lambda given: [*given, given[0]], "model.embed_tokens.weight was given twice"),
        (lambda given: [("stranger", given[0][1]), *given], "stranger was given twice or is no parameter"),
        (lambda given: [(given[0][0], given[0][1][1:]), *given[1:]], r"given as \[96, 32\]; the model has \[97, 32\]"),
    ],
)
def test_wrong_tensors_are_an_error_and_leave_the_last_export(tmp_path, change, message):
    model = random_model(config_of("llama_tied"))
    save_pretrained(tmp_path, model, tensors_of(model), dtype=torch.float32)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path, model, change(list(tensors_of(model))), dtype=torch.bfloat16)
    assert sorted(os.listdir(tmp_path)) == before
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_export_replaces_the_one_before_and_keeps_other_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "left-by-a-kill").touch()
    first, second = random_model(config_of("llama")), random_model(config_of("llama", hidden_size=16))
    for model, shard_bytes in [(first, 20_000), (second, 5 * 10**9), (first, 30_000), (second, 5_000)]:
        save_pretrained(tmp_path, model, tensors_of(model), dtype=torch.float32, max_shard_bytes=shard_bytes)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
        assert torch.equal(logits(load(tmp_path, on_meta(model.config))), logits(model))
        names = set(os.listdir(tmp_path)) - {"config.json", "generation_config.json", "tokenizer.json"}
        assert names == {"model.safetensors"} or names == {
            "model.safetensors.index.json",
            *json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values(),
        }
    assert (tmp_path / "tokenizer.json").exists()


def test_an_export_says_its_dtype_and_leaves_the_model_as_it_was(tmp_path):
    model = random_model(config_of("llama"))
    before = copy.deepcopy(model.config.to_dict())
    save_pretrained(tmp_path, model, tensors_of(model), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert model.config.to_dict() == before and model.dtype == torch.float32
