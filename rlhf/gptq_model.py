"""`load_quantized`: a transformers model over the 4-bit weights of any GPTQ checkpoint.

The model is built on meta, so that its full weights never exist. The names in the checkpoint say which of its linears
are quantised, the shapes of their tensors how (`gptq_tensors.py`).
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from ..engine.materialize import rebuild_buffers
from ..engine.parameter_names import listed, parameter_aliases
from ..engine.weight_conversion import Conversion, loading_conversions
from .errors import InputError
from .gptq_checkpoint import StoredTensor, open_checkpoint
from .gptq_config import GptqConfig, read_config
from .gptq_experts import fused_experts, linear_experts, stored_linears
from .gptq_linear import QuantizedLinear, join_projections
from .gptq_tensors import PARTS, read_weight
from .models import Source, build_on_meta
from .offload import offload

# Projections that modelling code calls with the same input, one after the other.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Buffers that earlier models saved and none reads any more.
_OLD_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".masked_bias", "position_ids")


def load_quantized(
    checkpoint, pretrained=None, bits=None, group_size=None, device="cpu", dtype=None, device_budget=None, nvme_dir=None
):
    """Return the causal language model of a GPTQ checkpoint, in evaluation mode, with its linears over packed weights.

    `checkpoint` is a folder, or a file (.safetensors, .pt, .bin, an index of shards) beside which, or in the folder
    `pretrained`, lies the model's config.json; weights in `pretrained` are never read. `bits` and `group_size` (-1: one
    group) are for files that do not declare them. What is not quantised is loaded as `dtype`: by default float32 on a
    CPU, else as the embedding is stored. With a `device_budget` (bytes, or "6GB") the engine keeps the weights on the
    host, or in a file in `nvme_dir`, and fetches each block while the one before it computes; what the budget has room
    for stays on `device`. Raises InputError that names file and tensor for whatever is missing, contradictory, damaged,
    or of a format that is not read, and for a budget that is too small.
    """
    compute_device = torch.device(device)
    if device_budget is None and nvme_dir is not None:
        raise InputError("nvme_dir is for weights that do not stay on the device: it needs a device_budget")
    checkpoint, device = Path(checkpoint), compute_device if device_budget is None else torch.device("cpu")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    model_folder = folder if pretrained is None else Path(pretrained)
    stored = open_checkpoint(checkpoint)
    declared = _with_given(read_config(dict.fromkeys((folder, model_folder))), bits, group_size)
    model, quantized, plain = _match(checkpoint, model_folder, stored)

    by_parent: dict[str, dict[str, Mapping[str, StoredTensor]]] = {}
    for name, parts in quantized.items():
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = parts
    for parent, children in tqdm(by_parent.items(), desc="loading", unit="module", disable=None, leave=False):
        weights = {}
        for leaf, parts in children.items():
            name = f"{parent}.{leaf}".lstrip(".")
            linear = model.get_submodule(name)
            has_bias = linear.bias is not None
            weights[leaf] = read_weight(parts, declared.of_module(name), *_features(linear), has_bias, device)
        for leaf, module in _modules_of(weights).items():
            setattr(model.get_submodule(parent), leaf, module)

    if dtype is None:
        dtype = (
            torch.float32 if compute_device.type == "cpu" else _stored_dtype(model.get_input_embeddings(), plain, model)
        )
    _load_plain(model, plain, stored, device, dtype)
    rebuild_buffers(model, device)
    model.config.dtype = dtype
    model.eval()
    return model if device_budget is None else offload(model, compute_device, dtype, device_budget, nvme_dir)


def _with_given(declared: GptqConfig, bits: int | None, group_size: int | None) -> GptqConfig:
    """What the caller gives has the last word, but has to agree with the file's own words."""
    given = {name: value for name, value in (("bits", bits), ("group_size", group_size)) if value is not None}
    for name, value in given.items():
        if getattr(declared, name) not in (None, value):
            raise InputError(f"{name} is {value}, but {declared.source} says {getattr(declared, name)}")
    source = "the caller" if given and declared.bits is None and declared.group_size is None else declared.source
    return replace(declared, source=source, **given)


def _match(checkpoint: Path, model_folder: Path, stored: Mapping[str, StoredTensor]):
    """Return the model on meta, {linear: its tensors} and {parameter: what makes it}; everything of the file is used
    and everything of the model there, or it is one InputError."""
    prefixes = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    if not prefixes:
        endings = sorted({name.rpartition(".")[2] for name in stored})
        raise InputError(
            f"{checkpoint}: no tensor is called qweight, so it is no GPTQ checkpoint (marlin, bitblas and others are "
            f"not read). Its tensors end in {', '.join(endings[:8])}"
        )
    parts = {p: {part: stored[f"{p}.{part}"] for part in PARTS if f"{p}.{part}" in stored} for p in prefixes}
    taken = {f"{prefix}.{part}" for prefix, found in parts.items() for part in found}
    on_meta = {f"{prefix}.weight": torch.empty(0, device="meta") for prefix in prefixes}
    on_meta |= {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in stored.items()
        if name not in taken and not name.endswith(_OLD_BUFFERS)
    }
    model = _build(model_folder)
    if _has_own_head(model, stored):
        model = _build(model_folder, tie_word_embeddings=False)
    of_experts = _unfuse_experts(model, parts)
    aliases = parameter_aliases(model)
    canonical = {alias: name for name, group in aliases.items() for alias in group}
    conversions = [Conversion((n,), {of_experts[n]: t}) for n, t in on_meta.items() if n in of_experts]
    others = {name: tensor for name, tensor in on_meta.items() if name not in of_experts}
    try:
        conversions += loading_conversions(model, others, canonical.keys())
    except ValueError as error:
        raise InputError(f"{checkpoint} does not fit {type(model).__name__}: {error}") from None

    quantized: dict[str, dict[str, StoredTensor]] = {}
    plain: dict[str, tuple[Conversion, str]] = {}
    unexpected = {}
    for conversion in conversions:
        prefix = conversion.sources[0].removesuffix(".weight")
        for name in conversion.targets:
            module = name.removesuffix(".weight")
            if prefix not in parts:
                if name in canonical:
                    plain.setdefault(canonical[name], (conversion, name))
                elif not _is_ignored(model, name):
                    unexpected[name] = list(on_meta[conversion.sources[0]].shape)
            elif name not in canonical or conversion.operation or not _is_linear(model.get_submodule(module)):
                raise parts[prefix]["qweight"].wrong(f"{type(model).__name__} has no linear layer that it could be")
            else:
                quantized[module] = parts[prefix]
    missing = {
        name: list(model.get_parameter(name).shape)
        for name in aliases
        if name not in plain and name.rpartition(".")[0] not in quantized
    }
    if missing or unexpected:
        raise InputError(
            f"{checkpoint} is no checkpoint of this {type(model).__name__}:"
            + (f"\n  missing: {listed(missing)}" if missing else "")
            + (f"\n  unexpected: {listed(unexpected)}" if unexpected else "")
        )
    return model, quantized, plain


def _build(folder: Path, **changes) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: has no config.json; name the folder that has the model's")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: config.json cannot be used: {error}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would ask for its own quantiser
    return build_on_meta(Source(config, None, os.fspath(folder)))


def _unfuse_experts(model: nn.Module, parts: Collection[str]) -> dict[str, str]:
    """Give `model` a linear for each of an expert's, where some of those are quantised; return their weights' names in
    a checkpoint, with their names in the model."""
    if not any(".experts." in prefix for prefix in parts):
        return {}
    stored = {f"{name}.weight": f"{linear}.weight" for linear, names in stored_linears(model).items() for name in names}
    for name, fused in fused_experts(model).items():
        model.set_submodule(name, linear_experts(fused, call_all=False))
    return stored


def _has_own_head(model: nn.Module, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the file unties a head that the config ties: it is quantised, or stored with other values."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return False
    head_name, embedding_name = (next(name for name, m in model.named_modules() if m is x) for x in (head, embedding))
    if f"{head_name}.qweight" in stored:
        return True
    both = [stored.get(f"{name}.weight") for name in (head_name, embedding_name)]
    return None not in both and not torch.equal(both[0].read(), both[1].read())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_ignored(model: nn.Module, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _features(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _modules_of(weights) -> dict[str, nn.Module]:
    modules = {}
    for names in _JOINED:
        if all(name in weights for name in names):
            modules |= join_projections({name: weights[name] for name in names})
    return {name: modules.get(name) or QuantizedLinear(weight) for name, weight in weights.items()}


def _stored_dtype(embedding: nn.Module, plain, model: nn.Module) -> torch.dtype:
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding.weight)
    conversion, target = plain[name]
    return conversion.targets[target].dtype


@torch.no_grad()
def _load_plain(model: nn.Module, plain, stored, device: torch.device, dtype: torch.dtype) -> None:
    """Fill what is not quantised, one tensor at a time."""
    for name, aliases in parameter_aliases(model).items():
        if name not in plain:
            continue  # of a quantised linear
        conversion, target = plain[name]
        sources = {source: stored[source].read() for source in conversion.sources}
        if conversion.operation is None:
            (value,) = sources.values()
        else:
            value = conversion.operation(sources)[target]
        shape = model.get_parameter(name).shape
        if value.shape != shape:
            raise stored[conversion.sources[0]].wrong(f"the model's {name} is {list(shape)}")
        parameter = nn.Parameter(value.to(device, dtype), requires_grad=False)
        for alias in aliases:
            path, _, leaf = alias.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = parameter
