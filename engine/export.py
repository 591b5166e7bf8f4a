"""A model's weights and configuration as a folder in Hugging Face layout, written tensor by tensor."""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Barrier, raise_alone
from .parameter_names import declared_ties, parameter_aliases, persistent_buffer_names
from .pretrained import INDEX_NAME, WEIGHTS_NAME
from .safetensors_io import Entry, SafetensorsWriter, fsync_folder, require_disk_space, write_text_atomically
from .weight_conversion import Conversion, saving_conversions

_WEIGHTS_PATTERN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(
    folder: str | os.PathLike,
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    write: bool = True,
    barrier: Barrier = raise_alone,
) -> None:
    """Write `model`'s weights, and its config and generation config where it has them, for `from_pretrained` to read.

    `tensors` gives (name, full tensor) of every parameter once, in any order, a tied one under any of its names; they
    are saved in `dtype`. Each is in memory only until it is written (merged parameters until their group is complete).
    Persistent buffers are taken from `model` in their own dtype. Tied names are written once where the model class
    declares them tied. More than `max_shard_bytes` of weights makes numbered shards and an index.

    Giving a tensor may be a collective operation, so every rank iterates `tensors` to its end, even when writing fails,
    and one has write=True. `barrier(error)` waits for all ranks and raises on each where any rank brought an error.

    Everything is written beside its place and then moved, weights before their index. What an earlier export left is
    replaced; other files in `folder` stay.
    """
    remaining = iter(tensors)
    error = None
    if write:
        try:
            _write_export(Path(folder), model, remaining, dtype, max_shard_bytes)
        except Exception as caught:
            error = caught
    for _ in remaining:
        pass
    barrier(error)


def _write_export(
    folder: Path, model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    saved_as = _saved_names(model)
    persistent = persistent_buffer_names(model)
    buffers = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name in persistent}
    weights = {name: model.get_parameter(name) for names in saved_as.values() for name in names}
    dtypes = {name: dtype if weight.is_floating_point() else weight.dtype for name, weight in weights.items()}
    on_meta = {name: torch.empty(w.shape, dtype=dtypes[name], device="meta") for name, w in weights.items()}
    on_meta |= {name: torch.empty(b.shape, dtype=b.dtype, device="meta") for name, b in buffers.items()}
    conversions = saving_conversions(model, on_meta)
    shards = _split_into_shards(conversions, max_shard_bytes)

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".saving"
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted export
    partial.mkdir()
    try:
        _write_configs(partial, model, dtype)
        given = _checked(tensors, saved_as, on_meta)
        _write_weights(partial, shards, conversions, chain(given, buffers.items()))
        # First the index or single file goes, so that a half-moved export is never taken for a complete one.
        for path in sorted(folder.iterdir(), key=lambda path: path.name not in (INDEX_NAME, WEIGHTS_NAME)):
            if _WEIGHTS_PATTERN.fullmatch(path.name):
                path.unlink()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == INDEX_NAME):
            os.replace(path, folder / path.name)
        fsync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _saved_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter name to the names that its tensor is written under: all but those that loading ties by itself."""
    declared = declared_ties(model)
    saved = {}
    for canonical, aliases in parameter_aliases(model).items():
        names = tuple(name for name in aliases if name == canonical or name not in declared)
        saved |= dict.fromkeys(aliases, names)
    return saved


def _split_into_shards(conversions: Iterable[Conversion], max_shard_bytes: int) -> list[dict[str, Entry]]:
    """The tensors to be written, in order, in files of `max_shard_bytes` at most; a larger tensor is alone in its
    file.
    """
    shards: list[dict[str, Entry]] = [{}]
    shard_bytes = 0
    for conversion in conversions:
        for name, tensor in conversion.targets.items():
            entry = Entry(name, tensor.dtype, tuple(tensor.shape))
            if shards[-1] and shard_bytes + entry.nbytes > max_shard_bytes:
                shards.append({})
                shard_bytes = 0
            shards[-1][name] = entry
            shard_bytes += entry.nbytes
    return shards


def _write_configs(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def _checked(
    tensors: Iterable[tuple[str, Tensor]], saved_as: Mapping[str, tuple[str, ...]], on_meta: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """`tensors` under the names and in the dtype that they are written with. Every parameter must come once."""
    awaited = {names[0] for names in saved_as.values()}
    for given_name, tensor in tensors:
        names = saved_as.get(given_name, ())
        if not names or names[0] not in awaited:
            raise ValueError(f"{given_name} was given twice or is no parameter of the model")
        awaited.remove(names[0])
        if tensor.shape != on_meta[names[0]].shape:
            expected = list(on_meta[names[0]].shape)
            raise ValueError(f"{given_name} was given as {list(tensor.shape)}; the model has {expected}")
        tensor = tensor.detach().to("cpu", on_meta[names[0]].dtype)
        for name in names:
            yield name, tensor
        del tensor  # or it would stay while the next is made
    if awaited:
        raise ValueError(f"these parameters were not given: {sorted(awaited)}")


def _write_weights(
    folder: Path, shards: list[dict[str, Entry]], conversions: list[Conversion], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    total_bytes = sum(entry.nbytes for shard in shards for entry in shard.values())
    require_disk_space(folder, total_bytes)
    files = [WEIGHTS_NAME]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    file_of = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    conversion_of = {source: conversion for conversion in conversions for source in conversion.sources}
    waiting: dict[int, dict[str, Tensor]] = {}  # sources of a conversion that needs more of them
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(SafetensorsWriter(folder / file, shard.values(), {"format": "pt"}))
            for file, shard in zip(files, shards, strict=True)
        }
        for source, tensor in tensors:
            conversion = conversion_of[source]
            sources = waiting.setdefault(id(conversion), {})
            sources[source] = tensor
            if len(sources) < len(conversion.sources):
                continue
            made = {source: tensor} if conversion.operation is None else conversion.operation(sources)
            for name, value in made.items():
                writers[file_of[name]].write(name, value)
            del waiting[id(conversion)], sources, made, value, tensor  # before the next is made
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
        write_text_atomically(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
