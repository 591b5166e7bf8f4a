"""Checkpoints of every writer of GPTQ files, made from a small model by rounding to the nearest, and the dense model
that each of them stands for."""

import json
from pathlib import Path

import torch
from megalith.kernels import pack_codes, pack_zeros
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


def shared_data(name: str) -> Path | None:
    """A folder of shared/data, beside the checkout or above it, or None where there is none."""
    for parent in Path(__file__).resolve().parents:
        folder = parent / "shared" / "data" / name
        if folder.is_dir():
            return folder
    return None


def block_linears(model: nn.Module) -> list[str]:
    """What writers quantise by default: the linears of the blocks."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def round_linear(weight, bits=4, group_size=16, sym=True, act_order=False, checkpoint_format="gptq"):
    """`weight` [K, N] to (its tensors on disk, the values [K, N] that they stand for)."""
    k, n = weight.shape
    group_size = k if group_size == -1 else group_size
    g_idx = torch.arange(k) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    groups = int(g_idx.max()) + 1
    scales, zeros = torch.empty(groups, n), torch.full((groups, n), float(2 ** (bits - 1)))
    for group in range(groups):
        rows = weight[g_idx == group]
        if sym:
            scales[group] = rows.abs().amax(0) / (2 ** (bits - 1) - 0.5)
        else:
            low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
            scales[group] = (high - low) / (2**bits - 1)
            zeros[group] = torch.round(-low / scales[group]).clamp(min=1)
    scales = scales.half().float()
    codes = torch.round(weight / scales[g_idx] + zeros[g_idx]).clamp(0, 2**bits - 1)
    values = (codes - zeros[g_idx]) * scales[g_idx]
    tensors = {
        "qweight": pack_codes(codes.int(), bits),
        "qzeros": pack_zeros(zeros.to(torch.uint8), bits, checkpoint_format),
        "scales": scales.half(),
        "g_idx": g_idx.int(),
    }
    return tensors, values


@torch.no_grad()
def quantize_in_place(model, names=None, overrides=None, **options):
    """Round the linears `names` of `model` and return the checkpoint {name: tensor}; the model keeps the rounded
    values. `overrides`: options by linear."""
    model.half().float()  # what the file can hold
    names = block_linears(model) if names is None else names
    tensors = {}
    for name in names:
        linear = model.get_submodule(name)
        flat = linear.weight if isinstance(linear, Conv1D) else linear.weight.T
        parts, values = round_linear(flat.float(), **{**options, **(overrides or {}).get(name, {})})
        linear.weight.copy_(values if isinstance(linear, Conv1D) else values.T)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for name, parameter in model.named_parameters():
        if not (name.endswith(".weight") and name.removesuffix(".weight") in names):
            tensors[name] = parameter.detach().half().clone()
    return tensors


def write_folder(folder: Path, model, tensors, config=None, shards=1):
    """A folder as GPTQModel writes it; without `config` it declares nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if config is not None:
        (folder / "quantize_config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
