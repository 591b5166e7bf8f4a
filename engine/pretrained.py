"""Weights from a folder in Hugging Face layout, streamed into tensors that exist already."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from .parameter_names import listed, parameter_aliases, persistent_buffer_names
from .safetensors_io import SafetensorsFile, SafetensorsFileError
from .weight_conversion import Conversion, is_transformers_model, loading_conversions

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Buffers that earlier models saved and none reads any more.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PretrainedFolder:
    """The weights of `model` in `folder`: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Only headers are read here, and everything that does not fit `model` is one error, at once: ValueError that lists
    the tensors missing, unexpected, or of another shape; SafetensorsFileError for files absent, truncated or corrupt.

    As in `from_pretrained`, a checkpoint of the base model loads into a model with a head and the reverse, either name
    of a tied parameter will do, and tensors that the model class ignores (old attention masks, `inv_freq`) are skipped.
    Unlike there, a parameter that the folder lacks is an error unless it matches one of the patterns `allow_missing`
    (`"score.*"`); those are in `missing`, for the caller to initialise. `stored_name` gives the name in the folder of
    a parameter that has another in the model, as adapters that wrap a layer give it one. `model` may be on meta, and
    is not changed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: nn.Module,
        *,
        allow_missing: Collection[str] = (),
        stored_name: Callable[[str], str] | None = None,
    ):
        self.folder = Path(folder)
        self._files = _stored_tensors(self.folder)
        aliases = parameter_aliases(model)
        self._canonical = {alias: name for name, group in aliases.items() for alias in group}
        if stored_name is not None:
            self._canonical |= {stored_name(alias): name for alias, name in self._canonical.items()}
        shapes = {name: model.get_parameter(name).shape for name in aliases}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        persistent = buffers.keys() & persistent_buffer_names(model)
        shapes |= {name: buffers[name].shape for name in persistent}

        stored = {name: _on_meta(file, name) for name, file in self._files.items()}
        names = self._canonical.keys() | persistent
        try:
            conversions = loading_conversions(model, stored, names)
        except ValueError as error:
            raise ValueError(f"{self.folder} does not fit {type(model).__name__}: {error}") from error

        # Parameter or buffer to what makes it, and the name made; a tied parameter may be stored under more of its
        # names.
        self._source: dict[str, tuple[Conversion, str]] = {}
        self._tied_sources: dict[str, list[tuple[Conversion, str]]] = {}
        unexpected, misfits = self._match(conversions, shapes, persistent)
        absent = {name: list(shapes[name]) for name in aliases if name not in self._source and name not in misfits}
        self.missing = frozenset(name for name in absent if _may_be_missing(model, name, allow_missing))
        ignored = _ignored(model, unexpected, stored) | (unexpected.keys() & buffers.keys())
        problems = {
            "missing": {name: shape for name, shape in absent.items() if name not in self.missing},
            "unexpected": {name: shape for name, shape in unexpected.items() if name not in ignored},
            "of another shape or kind": misfits,
        }
        if any(problems.values()):
            lines = "".join(f"\n  {kind}: {listed(entries)}" for kind, entries in problems.items() if entries)
            raise ValueError(f"{self.folder} is not a checkpoint of this {type(model).__name__}:{lines}")
        self._buffers = [name for name in persistent if name in self._source]

    def _match(
        self, conversions: list[Conversion], shapes: Mapping[str, torch.Size], persistent: Collection[str]
    ) -> tuple[dict[str, object], dict[str, object]]:
        """Note what makes each parameter and buffer. Returns what is made and unknown, and what does not fit."""
        unexpected, misfits = {}, {}
        for conversion in conversions:
            for name, tensor in conversion.targets.items():
                fqn = self._canonical.get(name, name)
                if fqn not in shapes:
                    unexpected[name] = list(tensor.shape)
                elif tensor.shape != shapes[fqn]:
                    misfits[fqn] = f"{list(tensor.shape)}, the model has {list(shapes[fqn])}"
                elif tensor.dtype not in _WEIGHT_DTYPES and fqn not in persistent:
                    misfits[fqn] = f"{tensor.dtype}, quantised weights are not read"
                elif fqn not in self._source:
                    self._source[fqn] = conversion, name
                elif name == fqn:
                    self._tied_sources.setdefault(fqn, []).append(self._source[fqn])
                    self._source[fqn] = conversion, name
                else:
                    self._tied_sources.setdefault(fqn, []).append((conversion, name))
        return unexpected, misfits

    def __contains__(self, fqn: str) -> bool:
        return self._canonical.get(fqn, fqn) in self._source

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Write the folder's values into `targets`: full-size tensors of any device and floating-point dtype, by name.

        One stored tensor is in memory at a time beyond the targets, and none at all where dtypes agree and the target
        is on the CPU; for merged parameters, all that one of them is made of. Raises ValueError for a name that the
        folder lacks, and where it stores two names of a tied parameter with different values.
        """
        wanted: dict[int, tuple[Conversion, list[tuple[str, Tensor]]]] = {}
        for name, target in targets.items():
            if name not in self:
                raise ValueError(f"{self.folder} holds no {name}")
            conversion, made_name = self._source[self._canonical.get(name, name)]
            if target.shape != conversion.targets[made_name].shape:
                shape = list(conversion.targets[made_name].shape)
                raise ValueError(f"{name} is {shape} in {self.folder}, and its target is {list(target.shape)}")
            wanted.setdefault(id(conversion), (conversion, []))[1].append((made_name, target))
        for conversion, named_targets in wanted.values():
            if conversion.operation is None:
                for _, target in named_targets:
                    self._files[conversion.sources[0]].read_into(conversion.sources[0], target)
            else:
                made = self._make(conversion)
                for made_name, target in named_targets:
                    target.copy_(made[made_name])
        for name, target in targets.items():
            for conversion, other_name in self._tied_sources.get(self._canonical.get(name, name), ()):
                if not torch.equal(self._make(conversion)[other_name].to(target), target):
                    raise ValueError(
                        f"{self.folder} stores {other_name} and {name} with different values, and the model ties them: "
                        f"load it with tie_word_embeddings=False"
                    )

    def fill_buffers(self, model: nn.Module, device: torch.device | str) -> None:
        """Fill the persistent buffers that the folder holds; those on meta are made on `device`."""
        for name in self._buffers:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if module._buffers[leaf].is_meta:
                module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device=device)
            self.fill({name: module._buffers[leaf]})

    def _make(self, conversion: Conversion) -> dict[str, Tensor]:
        sources = {}
        for name in conversion.sources:
            sources[name] = torch.empty_like(_on_meta(self._files[name], name), device="cpu")
            self._files[name].read_into(name, sources[name])
        if conversion.operation is None:
            return dict(zip(conversion.targets, sources.values(), strict=True))
        return conversion.operation(sources)


def _stored_tensors(folder: Path) -> dict[str, SafetensorsFile]:
    """Every stored tensor's name to its file, all headers checked."""
    if (folder / WEIGHTS_NAME).is_file():
        file = SafetensorsFile(folder / WEIGHTS_NAME)
        return dict.fromkeys(file.tensors, file)
    index = folder / INDEX_NAME
    if not index.is_file():
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        raise SafetensorsFileError(
            f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME} (found: {found}). Pickled weights are not read: "
            f"save them as safetensors first"
        )
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: SafetensorsFile(folder / name) for name in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsFileError(f"{index} is corrupt: {error!r}") from error
    for name, file in weight_map.items():
        if name not in files[file].tensors:
            raise SafetensorsFileError(f"{index} says that {file} holds {name}; it does not")
    return {name: files[file] for name, file in weight_map.items()}


def _on_meta(file: SafetensorsFile, name: str) -> Tensor:
    return torch.empty(file.tensors[name].shape, dtype=file.tensors[name].dtype, device="meta")


def _may_be_missing(model: nn.Module, name: str, allow_missing: Collection[str]) -> bool:
    declared = (model._keys_to_ignore_on_load_missing or ()) if is_transformers_model(model) else ()
    return any(fnmatchcase(name, pattern) for pattern in allow_missing) or any(re.search(p, name) for p in declared)


def _ignored(model: nn.Module, unexpected: Collection[str], stored: Collection[str]) -> set[str]:
    """Those of the `unexpected` tensors that `from_pretrained` would leave unread without a doubt."""
    if not is_transformers_model(model):
        return set()
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
    ignored = {name for name in unexpected if any(re.search(pattern, name) for pattern in patterns)}
    # Beside a base model under its prefix lie heads, of which `model` may have another or none.
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in stored):
        ignored |= {name for name in unexpected if not name.startswith(prefix)}
    return ignored
