"""LoRA over the engine: base weights frozen to the bit, adapters by their own rules, PEFT's files, merging."""

import copy
import json
import os

import pytest
import torch
from megalith import engine
from megalith.rlhf import lora, reward_model
from megalith.rlhf.arguments import LoraArguments, ModelArguments
from megalith.rlhf.errors import InputError
from megalith.rlhf.models import PRESETS, Source, build_on_meta, load_source
from megalith.rlhf.reward_model import build_reward_model
from megalith.rlhf.tokenizer import byte_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
MISSING = (*lora.NEW_PARAMETERS, *reward_model.NEW_PARAMETERS)


def output(model):
    """Logits of a language model; scores of a reward model at the last token, as transformers gives them."""
    made = model(IDS)
    return made[:, -1:] if isinstance(made, torch.Tensor) else made.logits


def base_folder(preset, path):
    source = Source(PRESETS[preset](), byte_tokenizer(), None)
    source.config.pad_token_id = 257
    model = build_on_meta(source).requires_grad_(False)
    model, _ = engine.initialize(model, None, device="cpu", seed=3)
    engine.save_pretrained(path, model)
    return source


def adapted(build, source, folder, rank=4, **options):
    model = lora.add_adapters(build(source), LoraArguments(lora_rank=rank), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"zero_stage": 3, "placement": "host", **options}
    return engine.initialize(
        model,
        optimizer,
        pretrained=folder,
        allow_missing=MISSING,
        stored_name=lora.stored_name,
        device="cpu",
        **options,
    )


def train(model, optimizer, steps=3):
    for _ in range(steps):
        output(model).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "opt-tiny", "bloom-tiny"])
def test_a_language_model_learns_in_its_adapters_alone(preset, tmp_path):  # P21
    source = base_folder(preset, tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", local_files_only=True).eval()
    model, optimizer = adapted(build_on_meta, source, tmp_path / "base")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: tensor for name, tensor in engine.whole_weights(model, frozen)}
    with torch.no_grad():
        base = output(plain)
        torch.testing.assert_close(output(model), base, atol=1e-5, rtol=0)
        train_output = output(model)
    with torch.enable_grad():
        train(model, optimizer)
    with torch.no_grad():
        learned = output(model)
        assert (learned - train_output).abs().max() > 0.01
        with lora.adapters_off(model):
            assert torch.equal(output(model), train_output)
        assert torch.equal(output(model), learned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.whole_weights(model, frozen))

    lora.save_adapter(tmp_path / "adapter", model, str(tmp_path / "base"), is_first=True)
    engine.save_pretrained(
        tmp_path / "merged", model, written_as=build_on_meta(source), weights=lora.merged_weights(model)
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    peft_model = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(output(merged), learned, atol=1e-5, rtol=0)
        torch.testing.assert_close(output(peft_model), learned, atol=1e-5, rtol=0)
    # Going on after the adapters were off: they still learn.
    with torch.enable_grad():
        train(model, optimizer, 1)
    with torch.no_grad():
        assert not torch.equal(output(model), learned)


def test_the_score_head_is_trained_and_saved(tmp_path):  # R8
    source = base_folder("llama-tiny", tmp_path / "base")
    model, optimizer = adapted(build_reward_model, source, tmp_path / "base")
    head = dict(engine.whole_weights(model, {"score.weight"}))["score.weight"]
    train(model, optimizer)
    assert not torch.equal(dict(engine.whole_weights(model, {"score.weight"}))["score.weight"], head)
    lora.save_adapter(tmp_path / "adapter", model, str(tmp_path / "base"), is_first=True)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, local_files_only=True)
    peft_model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_model(IDS).logits, output(model), atol=1e-5, rtol=0)


def test_initial_adapters_are_loras_own_and_follow_the_seed():
    source = Source(PRESETS["llama-tiny"](), byte_tokenizer(), None)
    models = [lora.add_adapters(build_on_meta(source), LoraArguments(lora_rank=4), seed) for seed in (0, 0, 1)]
    first, again, other = ({n: p for n, p in m.named_parameters() if ".lora_" in n} for m in models)
    assert len(first) == 2 * 2 * 7  # A and B of 7 linear layers in 2 blocks
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, parameter in first.items():
        if ".lora_B." in name:
            assert parameter.abs().sum() == 0
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
            assert not torch.equal(parameter, other[name])


def test_no_optimizer_memory_is_spent_on_the_base(tmp_path):
    source = base_folder("llama-tiny", tmp_path / "base")
    model, _ = adapted(build_on_meta, source, tmp_path / "base", placement="device")
    report = engine.memory_report(model)["device"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained * 4 <= report["exp_avg"]["bytes"] < 1.2 * trained * 4


@pytest.mark.parametrize("targets", ["no_such_layer", "embed_tokens"])
def test_layers_that_cannot_be_adapted_are_named(targets):
    source = Source(PRESETS["llama-tiny"](), byte_tokenizer(), None)
    with pytest.raises(InputError, match=f"--lora_target_modules {targets}"):
        lora.add_adapters(build_on_meta(source), LoraArguments(lora_rank=2, lora_target_modules=targets), 0)


@pytest.mark.parametrize("build", [build_on_meta, build_reward_model])
def test_a_folder_of_adapters_is_read_as_its_base_with_them_merged(build, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    source = base_folder("llama-tiny", base)
    model, optimizer = adapted(build, source, base)
    source.tokenizer.save_pretrained(base)
    for _ in range(2):  # what is merged follows the adapters
        train(model, optimizer)
        with torch.no_grad():
            learned = output(model)
        lora.save_adapter(folder, model, str(base), is_first=True)
        found = load_source(ModelArguments(pretrain=str(folder)))
        read, _ = engine.initialize(build(found).requires_grad_(False), None, pretrained=found.folder, device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(output(read), learned, atol=1e-5, rtol=0)
    assert found.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    written = os.stat(found.folder).st_mtime_ns
    assert load_source(ModelArguments(pretrain=str(folder))).folder == found.folder == str(folder / "merged")
    assert os.stat(found.folder).st_mtime_ns == written


def test_what_a_folder_of_adapters_lacks_is_named(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    source = base_folder("llama-tiny", base)
    model, _ = adapted(build_on_meta, source, base)
    lora.save_adapter(folder, model, str(tmp_path / "gone"), is_first=True)
    with pytest.raises(InputError, match="holds adapters of the model '.*gone', and there is no such folder"):
        load_source(ModelArguments(pretrain=str(folder)))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(InputError, match="cannot be put into"):
        load_source(ModelArguments(pretrain=str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="and 23 others are not in both"):
        load_source(ModelArguments(pretrain=str(folder)))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        load_source(ModelArguments(pretrain=str(folder)))
    assert not (folder / "merged").exists()
