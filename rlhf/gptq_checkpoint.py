"""The files of a quantised checkpoint as one table of tensors, whatever they are: safetensors, shards, .pt or .bin.

Tensors are read one at a time, when asked for. Pickle files are read with `weights_only`, so that nothing in them is
ever executed, and mapped instead of loaded where their format allows it.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..engine.safetensors_io import SafetensorsFile, SafetensorsFileError
from .errors import InputError

_PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor on the CPU; raises InputError naming the file."""

    def wrong(self, reason) -> InputError:
        return InputError(f"{self.file}: {self.name} {list(self.shape)}: {reason}")


def open_checkpoint(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, or of the one checkpoint in a folder, by name.

    Raises InputError that names the file for one that is missing, truncated, corrupt or not a table of tensors, and for
    a folder with none or with several.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file or folder")
    if path.name.endswith(".index.json"):
        return _from_index(path)
    return _from_pickle(path) if path.suffix in _PICKLES else _from_safetensors(path)


def _in_folder(folder: Path) -> Path:
    for kind in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.pt", "*.pth", "*.bin"):
        found = sorted(folder.glob(kind))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise InputError(f"{folder}: holds several checkpoints and no index over them ({names}); name one of them")
    raise InputError(f"{folder}: holds no checkpoint (*.safetensors, *.pt or *.bin)")


def _from_index(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: is no index of shards: {error!r}") from None
    shards = {name: open_checkpoint(index.parent / name) for name in names}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InputError(f"{index}: says that {shard} holds {name}; it does not")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _from_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = SafetensorsFile(path)
    except SafetensorsFileError as error:
        raise InputError(str(error)) from None

    def read(name):
        out = torch.empty(file.tensors[name].shape, dtype=file.tensors[name].dtype)
        try:
            file.read_into(name, out)
        except SafetensorsFileError as error:
            raise InputError(str(error)) from None
        return out

    return {
        name: StoredTensor(path, name, tensor.shape, tensor.dtype, lambda name=name: read(name))
        for name, tensor in file.tensors.items()
    }


def _from_pickle(path: Path) -> dict[str, StoredTensor]:
    # Files of before torch 1.6 are not zip archives, and those cannot be mapped.
    mapped = _begins_with_zip(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: is truncated, corrupt or more than a table of tensors: {reason}") from None
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise InputError(f"{path}: holds {type(values).__name__} of other things than tensors")
    return {
        name: StoredTensor(path, name, tuple(tensor.shape), tensor.dtype, tensor.clone)
        for name, tensor in values.items()
    }


def _begins_with_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
