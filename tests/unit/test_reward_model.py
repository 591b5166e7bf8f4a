"""Reward models: every token scored, padding without effect, the head's own start, statistics, files."""

import json

import pytest
import torch
from megalith import engine
from megalith.rlhf import reward_model
from megalith.rlhf.errors import InputError
from megalith.rlhf.models import PRESETS, Source, build_on_meta
from megalith.rlhf.reward_model import (
    build_reward_model,
    last_token_scores,
    normalization,
    normalized,
    set_normalization,
)
from megalith.rlhf.tokenizer import byte_tokenizer
from transformers import AutoModelForSequenceClassification

FAMILIES = ["llama-tiny", "gpt2-tiny", "opt-tiny", "bloom-tiny"]


def tiny_source(preset, folder=None):
    config = PRESETS[preset]()
    config.pad_token_id = 257
    return Source(config, byte_tokenizer(), folder)


def initialized(model, **options):
    model.requires_grad_(False)
    return engine.initialize(model, None, device="cpu", **options)[0].eval()


@pytest.mark.parametrize("preset", FAMILIES)
def test_padding_of_either_side_with_any_token_changes_no_score(preset):  # R1
    model = initialized(build_reward_model(tiny_source(preset)))
    ids = torch.randint(0, 256, (1, 7), generator=torch.Generator().manual_seed(0))
    alone = model(ids)
    for pad in (0, 256, 257):
        padding = torch.full((1, 5), pad)
        mask = torch.tensor([[False] * 5 + [True] * 7])
        left = model(torch.cat([padding, ids], 1), mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
        right = model(torch.cat([ids, padding], 1))
        torch.testing.assert_close(left[:, 5:], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(right[:, :7], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(last_token_scores(left, mask), alone[:, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(last_token_scores(right, mask.flip(1)), alone[:, -1], atol=1e-5, rtol=0)


def test_the_last_real_token_is_found_from_the_mask():
    scores = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    assert last_token_scores(scores, mask).tolist() == [1, 7, 10]


@pytest.mark.parametrize("folder_given", [False, True])
def test_the_head_starts_by_its_own_rule(folder_given, tmp_path):  # R2
    source = tiny_source("llama-tiny")
    if folder_given:
        engine.save_pretrained(tmp_path, initialized(build_on_meta(source)))
    options = {"pretrained": tmp_path, "allow_missing": reward_model.NEW_PARAMETERS} if folder_given else {}
    model = initialized(build_reward_model(source), **options)
    width = source.config.hidden_size
    assert model.score.weight.std() * (width + 1) ** 0.5 == pytest.approx(1, abs=0.25)
    if folder_given:
        base = initialized(build_on_meta(source), pretrained=tmp_path)
        torch.testing.assert_close(model.model.norm.weight, base.model.norm.weight, rtol=0, atol=0)
        torch.testing.assert_close(model.model.embed_tokens.weight, base.model.embed_tokens.weight, rtol=0, atol=0)


def test_a_folder_without_a_head_is_an_error_unless_it_was_said_so(tmp_path):
    source = tiny_source("llama-tiny")
    engine.save_pretrained(tmp_path, initialized(build_on_meta(source)))
    with pytest.raises(ValueError, match=r"missing: score.weight"):
        initialized(build_reward_model(source), pretrained=tmp_path)


@pytest.mark.parametrize("preset", FAMILIES)
def test_transformers_reads_what_is_saved_and_scores_the_same(preset, tmp_path):
    model = initialized(build_reward_model(tiny_source(preset)))
    set_normalization(model.config, 0.25, 2.0)
    engine.save_pretrained(tmp_path, model)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.full((2, 3), 257)], 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(padded).logits[:, 0], model(ids)[:, -1], atol=1e-5, rtol=0)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["mean"], saved["std"]) == (0.25, 2.0)
    assert normalized(torch.tensor([2.25]), normalization(loaded.config)).item() == 1


def test_statistics_that_are_missing_are_an_error():  # R7
    with pytest.raises(InputError, match="no 'mean' and 'std'"):
        normalization(PRESETS["llama-tiny"]())


def test_dropout_is_off_even_in_training():  # P15
    for preset, options in (
        ("gpt2-tiny", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("opt-tiny", {"dropout": 0.3, "attention_dropout": 0.3}),
        ("bloom-tiny", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    ):
        source = tiny_source(preset)
        source.config.update(options)
        model = initialized(build_reward_model(source)).train()
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids), model(ids)), preset
