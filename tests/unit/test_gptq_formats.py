"""Checkpoints that test_load_quantized.py does not have: other containers, declarations, dtypes, biases."""

import json

import pytest
import torch
from gptq_files import quantize_in_place, write_folder
from megalith.rlhf import load_quantized
from megalith.rlhf.errors import InputError
from megalith.rlhf.gptq_config import parse_config
from safetensors.torch import save_file
from tiny import VOCAB, make_model
from torch import nn

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same(loaded, dense, tolerance=1e-5):
    expected = dense.eval()(input_ids=IDS).logits
    assert (loaded(input_ids=IDS).logits - expected).norm() <= tolerance * expected.norm()


def gptq_for_llama_triton(folder, tensors):
    """From April 2023 on: g_idx, no declaration, one .safetensors or .pt under a name of its own."""
    save_file(tensors, folder / "llama7b-gptq-4bit-16g.safetensors")


def legacy_pickle(folder, tensors):
    """torch before 1.6 wrote no zip archive."""
    torch.save(tensors, folder / "llama7b-4bit-16g.pt", _use_new_zipfile_serialization=False)


def wrapped(folder, tensors):
    torch.save({"state_dict": tensors, "model": None} | {"state_dict": tensors}, folder / "whole.pth")


def autogptq(folder, tensors):
    save_file(tensors, folder / "gptq_model-4bit-16g.safetensors", metadata={"format": "pt", "gptq_bits": "4"})
    config = {"bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": False}
    config |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-16g"}
    (folder / "quantize_config.json").write_text(json.dumps({**config, "is_marlin_format": False}))


def sharded_bin(folder, tensors):
    names = list(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{index + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_config_json(folder, tensors):
    """transformers: the declaration lies in config.json alone."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 16, "sym": False, "quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


WRITERS = [gptq_for_llama_triton, legacy_pickle, wrapped, autogptq, sharded_bin, in_config_json]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_containers_with_act_order(tmp_path, write):
    model = make_model("llama")
    tensors = quantize_in_place(model, act_order=True, sym=False)
    model.config.save_pretrained(tmp_path)
    write(tmp_path, tensors)
    assert_same(load_quantized(tmp_path), model)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2", "qwen2"])
def test_biases_count(tmp_path, family):
    """Drawn at random: models initialise them to 0, which would hide that they were lost. LLaMA has none of its own,
    but a file may add one."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape).half())
    tensors = quantize_in_place(model)
    if family == "llama":
        linear = model.model.layers[1].mlp.down_proj
        linear.bias = nn.Parameter((0.1 * torch.randn(32)).half().float())
        tensors["model.layers.1.mlp.down_proj.bias"] = linear.bias.detach().half()
    config = {"bits": 4, "group_size": 16, "quant_method": "gptq"}
    loaded = load_quantized(write_folder(tmp_path, model, tensors, config))
    assert_same(loaded, model)


def test_bf16_scales(tmp_path):
    """As AutoRound writes them."""
    model = make_model("llama")
    tensors = quantize_in_place(model)
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] = tensors[name].bfloat16()
    loaded = load_quantized(write_folder(tmp_path, model, tensors, {"bits": 4, "group_size": 16}))
    assert loaded.model.layers[0].mlp.down_proj.gptq_weight.scales.dtype == torch.float32
    assert_same(loaded, model, tolerance=1e-2)


def test_declarations():
    """Every writer's words for the same."""
    same = [
        {"bits": 3, "group_size": 64, "sym": False},
        {"w_bit": 3, "q_group_size": 64, "zero_point": True},
        {"bits": 3, "group_size": 64, "sym": False, "method": "gptq", "format": "gptq", "pack_dtype": "int32"},
        {"bits": 3, "group_size": 64, "sym": False, "quant_method": "gptq", "checkpoint_format": "gptq"},
    ]
    for values in same:
        config = parse_config(values, "x")
        assert (config.bits, config.group_size, config.sym) == (3, 64, False)
    assert parse_config({"format": "gptq_v2"}, "x").checkpoint_format == "gptq_v2"
    for refused in ({"format": "bitblas"}, {"checkpoint_format": "gptq_p"}, {"method": "qqq"}, {"pack_dtype": "int8"}):
        with pytest.raises(InputError, match=str(next(iter(refused.values())))):
            parse_config(refused, "x")
