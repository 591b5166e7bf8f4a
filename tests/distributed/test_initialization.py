"""Where weights come from: folders, a model's own rules, rank 0; and folders that save_pretrained leaves."""

import os

import megalith.engine as engine
import pytest
import torch
from launch import run_ranks
from tiny import FAMILIES, batches, config_of, make_model, rank_rows, weights_of
from torch import nn
from transformers import AutoModelForCausalLM

LAYOUTS = [{"zero_stage": 0}, {"zero_stage": 3}, {"zero_stage": 3, "placement": "host", "max_chunk_numel": 2000}]


def _on_meta(family, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(family, **changes))


def _logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batches(1)[0]).logits


def _start(model, **options):
    return engine.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), timeout_s=30, **options)


def _step(model, optimizer, rank, world_size):
    model.train()
    rows = rank_rows(batches(1, seed=7)[0], rank, world_size)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()


# Folders


def _load_and_save(rank, world_size, folder):
    """Logits after loading `folder`, and after a step, a save and one more step; by family and layout."""
    results = {}
    for family in FAMILIES:
        for index, layout in enumerate(LAYOUTS):
            model, optimizer = _start(_on_meta(family), pretrained=folder / family, **layout)
            with engine.gathered(model):
                loaded = _logits(model)
            _step(model, optimizer, rank, world_size)
            place = folder / f"{family}-{world_size}-{index}"
            engine.save_pretrained(place, model, max_shard_bytes=20_000 if index else 5 * 10**9)
            with engine.gathered(model):
                saved = _logits(model)
            _step(model, optimizer, rank, world_size)  # the export left the engine as it was
            with engine.gathered(model):
                results[family, index] = loaded, saved, place, _logits(model)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_folders_go_in_and_out_with_the_logits_of_transformers(tmp_path, world_size):
    for family in FAMILIES:
        make_model(family, seed=3).save_pretrained(tmp_path / family, max_shard_size=20_000)
    results = _load_and_save(0, 1, tmp_path) if world_size == 1 else run_ranks(2, _load_and_save, tmp_path)[1]
    for (family, index), (loaded, saved, place, after) in results.items():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert torch.equal(loaded, _logits(theirs)), (family, index)
        assert torch.equal(saved, _logits(AutoModelForCausalLM.from_pretrained(place))), (family, index)
        assert not torch.equal(saved, loaded) and not torch.equal(after, saved), (family, index)
        assert ("model.safetensors.index.json" in os.listdir(place)) == (index > 0), (family, index)


def _error_of(call, *args, **keywords):
    try:
        call(*args, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _fail_to_start(rank, world_size, folder):
    """The error of each wrong start. Ranks differ where a pair is given."""
    other = ("zero_stage", (3, 2)), ("prefetch", (1, 2)), ("seed", (0, 1)), ("device_budget", ("1GB", "2GB"))
    errors = {f"option {name}": _error_of(_start, make_model(), **{name: pair[rank]}) for name, pair in other}
    errors["family"] = _error_of(_start, make_model(("llama", "qwen2")[rank]))
    errors["depth"] = _error_of(_start, make_model("llama", num_hidden_layers=2 + rank))
    errors["one rank on meta"] = _error_of(_start, make_model() if rank == 0 else _on_meta("llama"))
    errors["one folder"] = _error_of(_start, _on_meta("llama"), pretrained=folder / "good" if rank == 0 else None)
    for own in (0, 1):
        stage = 7 if rank == own else 3
        errors[f"bad option on rank {own}"] = _error_of(_start, make_model(), zero_stage=stage)
        path = folder / ("absent" if rank == own else "good")
        errors[f"no folder on rank {own}"] = _error_of(_start, _on_meta("llama"), pretrained=path)
    for name in ("absent", "empty", "cut", "garbled", "other"):
        errors[name] = _error_of(_start, _on_meta("llama"), pretrained=folder / name)
    errors["small budget"] = _error_of(_start, make_model(), device_budget=1000)
    _start(_on_meta("llama"), pretrained=folder / "good")  # none of this left anything behind
    return errors


def test_a_wrong_start_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("good", "cut", "garbled"):
        make_model("llama").save_pretrained(tmp_path / name)
    make_model("gpt2").save_pretrained(tmp_path / "other")
    os.truncate(tmp_path / "cut" / "model.safetensors", 5000)
    (tmp_path / "garbled" / "model.safetensors").write_bytes(b"\xff" * 4096)
    named = {
        "absent": "absent",
        "empty": "neither model.safetensors",
        "cut": "truncated or corrupt",
        "garbled": "truncated or corrupt",
        "other": "is not a checkpoint of this LlamaForCausalLM",
        "small budget": "device_budget",
    }
    for rank, errors in enumerate(run_ranks(2, _fail_to_start, tmp_path)):
        for name, error in errors.items():
            assert error is not None, (name, rank)
            assert named.get(name, "") in error, (name, rank, error)
            if name.endswith(("rank 0", "rank 1")) and not name.endswith(str(rank)):
                assert f"rank {1 - rank} failed" in error, (name, rank, error)


# Models without weights


def _initialise(rank, world_size):
    results = []
    for options in ({"zero_stage": 0}, {"zero_stage": 3}, {"max_chunk_numel": 500}, {"placement": "host"}):
        for family in ("llama_tied", "gpt2", "mixtral"):
            model, _ = _start(_on_meta(family), seed=11, **options)
            with engine.gathered(model):
                results.append((family, weights_of(model), _logits(model)))
    return results


def test_a_model_on_meta_gets_the_same_weights_at_every_world_size_and_chunk_size():
    by_world = [_initialise(0, 1), *(run_ranks(world_size, _initialise)[-1] for world_size in (2, 4))]
    expected = {family: (weights, logits) for family, weights, logits in by_world[0]}
    for outcomes in by_world:
        for family, weights, logits in outcomes:
            assert torch.equal(logits, expected[family][1]), family
            for name, weight in weights.items():
                assert torch.equal(weight, expected[family][0][name]), (family, name)
    for family, (weights, _) in expected.items():
        theirs = weights_of(make_model(family))
        for name, weight in weights.items():
            # Same distribution as transformers' own: constants equal, random ones with the same spread.
            assert weight.mean().item() == pytest.approx(theirs[name].mean().item(), abs=5e-3), (family, name)
            assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=0.25), (family, name)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.rand(4, 6).t() > 0.5)  # not contiguous
        self.register_buffer("scratch", torch.rand(3), persistent=False)

    def forward(self, x):
        return self.norm(self.linear(x))


def _own_weights(rank, world_size):
    results = []
    for options in ({"zero_stage": 1}, {"zero_stage": 3}, {"placement": "host"}):
        torch.manual_seed(rank)
        model = Buffered()
        before = {**weights_of(model), **{name: buffer.clone() for name, buffer in model.named_buffers()}}
        model, _ = _start(model, **options)
        with engine.gathered(model):
            results.append((before, {**weights_of(model), **dict(model.named_buffers())}))
    return results


def test_the_weights_and_buffers_of_rank_0_count():
    first, second = run_ranks(2, _own_weights)
    for (before, ours), (other, theirs) in zip(first, second, strict=True):
        assert not torch.equal(before["linear.weight"], other["linear.weight"])
        for name in before:
            assert torch.equal(ours[name], before[name]) and torch.equal(theirs[name], before[name]), name
