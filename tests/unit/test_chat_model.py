"""What can be served: folders, presets, quantised checkpoints, weights beyond the device; each answers as it should."""

import dataclasses

import pytest
import torch
from gptq_files import quantize_in_place, shared_data, write_folder
from megalith.rlhf.batching import Batcher
from megalith.rlhf.chat_model import BatchingArguments, ChatModelArguments, load_chat_model, start
from megalith.rlhf.errors import InputError
from megalith.rlhf.models import PRESETS
from megalith.rlhf.sampling import SamplingOptions
from megalith.rlhf.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

PROMPT = list(range(10, 40))


def lively(preset):
    """A model whose greedy answers wander: the usual initialisation makes one token win for ever."""
    torch.manual_seed(1)
    config = PRESETS[preset]()
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def save(model, folder, stop_id=7):
    model.generation_config = GenerationConfig(eos_token_id=[stop_id])
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(lively("llama-tiny"), tmp_path_factory.mktemp("models") / "stone-1b")


def greedy(args):
    """The ChatModel, and the tokens that its Batcher gives for PROMPT."""
    facts, model = load_chat_model(args)
    batcher = Batcher(model)
    tokens = list(batcher.submit(PROMPT, SamplingOptions(max_new_tokens=24, temperature=0)))
    batcher.close()
    return facts, tokens


def expected(model):
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    return made[0, len(PROMPT) :].tolist()


def test_a_folder(folder):
    facts, tokens = greedy(ChatModelArguments(pretrain=folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokens == expected(model)
    assert len(set(tokens)) > 10
    assert (facts.name, facts.precision, facts.context_length) == ("stone-1b", "fp32", 1024)
    assert facts.stop_ids == (7, byte_tokenizer().eos_token_id)
    assert facts.weight_bytes == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)


def test_precision(folder):
    facts, model = load_chat_model(ChatModelArguments(pretrain=folder, precision="bf16"))
    assert facts.precision == "bf16"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "opt-tiny", "bloom-tiny"])
def test_presets(preset):
    facts, tokens = greedy(ChatModelArguments(pretrain=preset))
    assert len(tokens) == 24
    assert facts.context_length == 4096 if preset == "bloom-tiny" else facts.context_length == 1024


def test_weights_beyond_the_device_give_the_same_answer(folder):
    plain, tokens = greedy(ChatModelArguments(pretrain=folder))
    budget = str(plain.weight_bytes * 9 // 10)
    offloaded, same = greedy(ChatModelArguments(pretrain=folder, device_budget=budget))
    assert same == tokens
    assert offloaded.weight_bytes == plain.weight_bytes
    with pytest.raises(InputError, match="--device_budget 1.5 elephants"):
        load_chat_model(ChatModelArguments(pretrain=folder, device_budget="1.5 elephants"))


def test_a_quantised_folder_declares_itself(tmp_path):
    model = lively("llama-tiny")
    tensors = quantize_in_place(model, group_size=32)
    write_folder(tmp_path / "q", model, tensors, {"bits": 4, "group_size": 32, "quant_method": "gptq", "sym": True})
    byte_tokenizer().save_pretrained(tmp_path / "q")
    facts, tokens = greedy(ChatModelArguments(pretrain=str(tmp_path / "q")))
    assert tokens == expected(model)
    assert facts.precision == "GPTQ, fp32"
    assert facts.weight_bytes < 0.6 * 4 * sum(p.numel() for p in model.parameters())
    budget = str(facts.weight_bytes * 9 // 10)
    for place in ({}, {"nvme_dir": str(tmp_path / "drive")}):
        facts, same = greedy(ChatModelArguments(pretrain=str(tmp_path / "q"), device_budget=budget, **place))
        assert same == tokens


def test_the_announcements_command():
    """The options of `server.py PRETRAINED --quant 4bit --gptq_checkpoint X.pt --gptq_group_size 128`."""
    data = shared_data("gptq/gfl_coati_g128")
    if data is None:
        pytest.skip("shared/data/gptq is not here")
    checkpoint = str(data / "gfl_coati_g128-4bit-128g.pt")
    options = {"pretrain": str(data / "pretrained"), "gptq_checkpoint": checkpoint, "gptq_group_size": 128}
    facts, tokens = greedy(ChatModelArguments(quant="4bit", **options))
    assert facts.precision == "4bit, fp32"
    assert len(tokens) == 24
    with pytest.raises(InputError, match="--gptq_checkpoint needs --quant"):
        ChatModelArguments(**options)
    with pytest.raises(InputError, match="--nvme_dir needs --device_budget"):
        ChatModelArguments(quant="4bit", nvme_dir="somewhere", **options)


def test_tokenizer_and_model_have_to_belong_together(folder, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{index}>" for index in range(100)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="do not belong together"):
        load_chat_model(ChatModelArguments(pretrain=folder, tokenizer=str(tmp_path)))


@pytest.mark.parametrize("change", [{"max_batch": 0}, {"max_queue": 0}, {"kv_budget_gb": -1.0}, {"prefix_share": 1.0}])
def test_limits_are_named(change):
    with pytest.raises(InputError, match=f"--{next(iter(change)).removesuffix('_gb')}"):
        start(ChatModelArguments(pretrain="llama-tiny"), dataclasses.replace(BatchingArguments(), **change))


def test_one_process_serves(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        start(ChatModelArguments(pretrain="llama-tiny"), BatchingArguments())
