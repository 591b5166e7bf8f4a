"""Quantised checkpoints as files: a block at a time while they are made, whole at the end.

Tensors on disk are those of AutoGPTQ and GPTQModel (see gptq_tensors.py). No more than one of them is in memory at a
time, but for the single .pt file, which torch.save writes from the mapped safetensors file.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..engine.safetensors_io import Entry, SafetensorsWriter, require_disk_space, write_text_atomically
from ..kernels import pack_codes, pack_zeros
from .gptq_algorithm import GptqOptions, QuantizedMatrix
from .gptq_config import CONFIG_NAME

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint that is still to be read."""

    entry: Entry
    read: Callable[[], Tensor]


def disk_tensors(matrix: QuantizedMatrix, bits: int, checkpoint_format: str) -> dict[str, Tensor]:
    """The tensors of one linear on disk but for its bias, on the CPU."""
    return {
        "qweight": pack_codes(matrix.codes, bits).cpu(),
        "qzeros": pack_zeros(matrix.zeros, bits, checkpoint_format).cpu(),
        "scales": matrix.scales.cpu().contiguous(),
        "g_idx": matrix.g_idx.cpu(),
    }


def declaration(
    options: GptqOptions, checkpoint_format: str, true_sequential: bool, lm_head: bool, version: str
) -> dict:
    """What quantize_config.json says. `desc_act` is about the layout: static groups need no order at run time."""
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act and not options.static_groups,
        "static_groups": options.static_groups,
        "sym": options.sym,
        "lm_head": lm_head,
        "true_sequential": true_sequential,
        "damp_percent": options.damp_percent,
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"megalith:{version}"],
            "act_order": options.desc_act,
            "mse": options.mse,
            "num_beams": options.num_beams,
            "descent_passes": options.descent_passes,
        },
    }


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def write_folder(folder: Path, pieces: Iterable[Piece], config: dict, declared: dict, max_shard_bytes: int) -> None:
    """config.json, quantize_config.json and the weights, in shards with an index where they exceed one.

    The weights get their names last, so that an interrupted run leaves none that look complete.
    """
    _write_configs(folder, config, declared)
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(p.entry.nbytes for p in shards[-1]) + piece.entry.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(piece)
    total_bytes = sum(piece.entry.nbytes for shard in shards for piece in shard)
    require_disk_space(folder, total_bytes)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / name, [piece.entry for piece in shard], {"format": "pt"}) as writer:
            for piece in shard:
                writer.write(piece.entry.name, piece.read())
    if len(shards) > 1:
        weight_map = {p.entry.name: name for name, shard in zip(names, shards, strict=True) for p in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def write_single_file(folder: Path, pieces: Iterable[Piece], config: dict, declared: dict) -> Path:
    """The .pt file that `--gptq_checkpoint` names, in the layout of GPTQ-for-LLaMa of March 2023: float32 scales, a
    bias for every linear, no g_idx. Its name and nothing else tells bits and group size."""
    _write_configs(folder, config, None)
    pieces = list(pieces)
    held = folder / ".pieces.safetensors"
    with SafetensorsWriter(held, [piece.entry for piece in pieces]) as writer:
        for piece in pieces:
            writer.write(piece.entry.name, piece.read())
    group = declared["group_size"]
    path = folder / f"model-{declared['bits']}bit{'' if group == -1 else f'-{group}g'}.pt"
    try:
        with safe_open(held, "pt") as file:
            tensors = OrderedDict()
            for name in file.keys():
                if name.endswith(".g_idx"):
                    continue
                tensor = file.get_tensor(name)
                tensors[name] = tensor.float() if name.endswith(".scales") else tensor
                bias = name.replace(".scales", ".bias")
                if name.endswith(".scales") and bias not in file.keys():
                    tensors[bias] = torch.zeros(tensor.shape[1])
            partial = path.with_name(f".{path.name}.partial")
            torch.save(tensors, partial)
            os.replace(partial, path)
    finally:
        held.unlink()
    return path


def _write_configs(folder: Path, config: dict, declared: dict | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if declared is not None:
        config = {**config, "quantization_config": declared}
        write_text_atomically(folder / CONFIG_NAME, json.dumps(declared, indent=2) + "\n")
    write_text_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
