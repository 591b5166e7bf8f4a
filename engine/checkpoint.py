"""Checkpoints: every rank writes what it owns, as pieces of flattened parameters; any other set of ranks reads what it
needs.

A folder holds one safetensors file a rank, and `index.json`, which says where each piece of each payload of each
parameter lies. A piece is known by parameter name and global offset, never by chunk or rank, so that world size, stage,
placement and chunk size may change between saving and loading.

The files are written in `.NAME.saving` beside the folder NAME, the index last, and then moved into place; the
checkpoint that NAME held before is at `.NAME.previous` meanwhile. At any instant a complete checkpoint is at one of the
three, where `read_checkpoint` finds it.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .parameter_names import listed
from .safetensors_io import (
    DTYPE_NAMES,
    DTYPES,
    Entry,
    SafetensorsFile,
    SafetensorsFileError,
    SafetensorsWriter,
    fsync_folder,
    tensor_bytes,
    write_text_atomically,
)
from .state_tree import decode_tree, encode_tree, tensor_names

INDEX_NAME = "index.json"
FORMAT = "megalith checkpoint"
VERSION = 1

Barrier = Callable[[Exception | None], None]
"""`barrier(error)` waits for all ranks, and raises on each of them where any brought an error."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, corrupt, or not of this model."""


@dataclass(frozen=True)
class Piece:
    """Elements [offset_numel, offset_numel + numel) of a payload of the flattened parameter `fqn`, as a rank saves
    them.
    """

    payload: str
    """"weight", "master", "exp_avg" or "exp_avg_sq"."""
    fqn: str
    offset_numel: int
    numel: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return _key(self.payload, self.fqn, self.offset_numel)


def raise_alone(error: Exception | None) -> None:
    """The barrier of a single process."""
    if error is not None:
        raise error


def write_checkpoint(
    folder: str | os.PathLike,
    pieces: Mapping[Piece, Callable[[], Tensor]],
    *,
    shapes: Mapping[str, Sequence[int]],
    state: Any,
    rank_state: Any,
    rank: int = 0,
    world_size: int = 1,
    barrier: Barrier = raise_alone,
) -> None:
    """Write a checkpoint to `folder`, which all ranks see; called by every rank.

    `pieces` are this rank's: each gives its values, of its dtype and numel, when it is written, so that one is in
    memory at a time. Over all ranks the pieces of a payload of a parameter cover it without overlap. `shapes` has the
    shape of every parameter. `state` is the same on all ranks (optimizer groups, step, scaler) and `rank_state` is this
    rank's own (random generators, the caller's state): nested values as `encode_tree` takes them.

    A full disk on one rank is an error on all, by `barrier`. What a failed or killed save left behind is removed, by
    itself or by the next save. A checkpoint that `folder` holds is replaced, and stays where it is until then; any
    other folder of that name is an error.
    """
    target, saving, previous = _places(folder)

    def together(work: Callable[[], None]) -> None:
        error = None
        try:
            work()
        except Exception as caught:
            error = caught
        barrier(error)

    def prepare() -> None:
        if rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            _recover(target, saving, previous)
            if target.exists() and not (target / INDEX_NAME).is_file() and any(target.iterdir()):
                raise CheckpointError(f"{target} exists and is no checkpoint: name another folder, or remove it")
            shutil.rmtree(saving, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)
            saving.mkdir()

    def finish() -> None:
        if rank == 0:
            write_text_atomically(saving / INDEX_NAME, json.dumps(_merged_index(saving, shapes, world_size)))
            if target.exists():
                os.replace(target, previous)
            os.replace(saving, target)
            fsync_folder(target.parent)
            shutil.rmtree(previous, ignore_errors=True)

    try:
        together(prepare)
        together(lambda: _write_rank(saving, pieces, state if rank == 0 else None, rank_state, rank, world_size))
        together(finish)
    except Exception:
        if rank == 0:
            _recover(target, saving, previous)
            shutil.rmtree(saving, ignore_errors=True)
        raise


def read_checkpoint(folder: str | os.PathLike) -> "Checkpoint":
    """Open the checkpoint in `folder`.

    Raises CheckpointError where none is complete, and where a file is missing or of the wrong size. Values are read,
    and their checksums compared, when they are asked for.
    """
    target, saving, previous = _places(folder)
    for place in (target, saving, previous, target):  # once more: a save that ends now moves `saving` to `target`
        if (place / INDEX_NAME).is_file():
            return Checkpoint(place)
    if target.exists():
        raise CheckpointError(f"{target} has no {INDEX_NAME}: its save did not end, or it is no checkpoint")
    raise CheckpointError(f"there is no checkpoint {target}")


class Checkpoint:
    """A complete checkpoint, opened by `read_checkpoint`. Holds no values and no open file."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
            if (index["format"], index["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {index['format']} {index['version']}; this reads {FORMAT} {VERSION}")
            self.world_size: int = index["world_size"]
            """The number of ranks that saved it."""
            self.shapes: dict[str, tuple[int, ...]] = {fqn: tuple(shape) for fqn, shape in index["shapes"].items()}
            self._payloads: dict[str, dict[str, dict]] = index["payloads"]
            self._ranks: list[dict] = index["ranks"]
            sizes = {folder / entry["file"]: entry["bytes"] for entry in self._ranks}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX_NAME} cannot be used: {error!r}") from error
        for path, nbytes in sizes.items():
            if not path.is_file() or path.stat().st_size != nbytes:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                raise CheckpointError(
                    f"{path} is missing, truncated or corrupt: {found}, and {nbytes} bytes were written"
                )
        self._files: dict[int, SafetensorsFile] = {}

    @property
    def state(self) -> Any:
        """What all ranks shared."""
        return self._decoded(0, "state")

    def rank_state(self, rank: int) -> Any:
        """What `rank` saved for itself. Raises CheckpointError where fewer ranks saved."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.folder} was saved by {self.world_size} ranks and has no state of rank {rank}")
        return self._decoded(rank, "rank_state")

    def holds(self, payload: str, fqn: str) -> bool:
        return fqn in self._payloads.get(payload, {})

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise CheckpointError, with all differences, unless this is a checkpoint of parameters of these `shapes`."""
        expected = {fqn: tuple(shape) for fqn, shape in shapes.items()}
        problems = {
            "not in the checkpoint": {fqn: list(s) for fqn, s in expected.items() if fqn not in self.shapes},
            "not in the model": {fqn: list(s) for fqn, s in self.shapes.items() if fqn not in expected},
            "of another shape": {
                fqn: f"{list(self.shapes[fqn])}, the model has {list(s)}"
                for fqn, s in expected.items()
                if self.shapes.get(fqn, s) != s
            },
        }
        lines = "".join(f"\n  {kind}: {listed(entries)}" for kind, entries in problems.items() if entries)
        if lines:
            raise CheckpointError(f"{self.folder} is a checkpoint of another model. Parameters{lines}")

    @torch.no_grad()
    def fill(self, payload: str, fqn: str, offset_numel: int, out: Tensor) -> None:
        """Write the elements of `payload` of `fqn` from `offset_numel` on into `out`: 1-D, any device, any dtype
        (cast).

        Only the ranges that are asked for are read. Raises CheckpointError where the checkpoint lacks them, and where
        what a rank once wrote as one piece is read whole and does not have its checksum.
        """
        if not self.holds(payload, fqn):
            raise CheckpointError(f"{self.folder} has no {payload} of {fqn}")
        entry = self._payloads[payload][fqn]
        stop_numel, total_numel = offset_numel + out.numel(), math.prod(self.shapes[fqn])
        if offset_numel < 0 or stop_numel > total_numel or out.dim() != 1:
            raise CheckpointError(
                f"{payload} of {fqn} has {total_numel} elements in {self.folder}; "
                f"those from {offset_numel} on were asked for, into a tensor of shape {list(out.shape)}"
            )
        for rank, start, numel in entry["pieces"]:
            first, last = max(start, offset_numel), min(start + numel, stop_numel)
            if first >= last:
                continue
            part = out[first - offset_numel : last - offset_numel]
            direct = part.dtype == DTYPES[entry["dtype"]] and part.device.type == "cpu" and part.is_contiguous()
            values = part if direct else torch.empty(last - first, dtype=DTYPES[entry["dtype"]], device="cpu")
            self._read(rank, _key(payload, fqn, start), values, first - start)
            if not direct:
                part.copy_(values)

    def _file(self, rank: int) -> SafetensorsFile:
        if rank not in self._files:
            self._files[rank] = SafetensorsFile(self.folder / self._ranks[rank]["file"])
        return self._files[rank]

    def _read(self, rank: int, key: str, out: Tensor, offset_numel: int = 0) -> None:
        """Fill `out`, contiguous and on the CPU, and compare the checksum where it is all of `key`."""
        try:
            file = self._file(rank)
            file.read_into(key, out, offset_numel)
        except SafetensorsFileError as error:
            raise CheckpointError(str(error)) from error
        if out.numel() == file.tensors[key].numel and zlib.crc32(tensor_bytes(out)) != self._ranks[rank]["crc32"][key]:
            raise CheckpointError(f"{file.path} is corrupt: {key} does not have the checksum that it was saved with")

    def _decoded(self, rank: int, kind: str) -> Any:
        encoded = self._ranks[rank][kind]
        tensors = {}
        for name in tensor_names(encoded):
            dtype, shape = self._ranks[rank]["tensors"][name]
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
            self._read(rank, name, tensors[name])
        return decode_tree(encoded, tensors)


def _key(payload: str, fqn: str, offset_numel: int) -> str:
    return f"{payload}/{fqn}/{offset_numel}"


def _places(folder: str | os.PathLike) -> tuple[Path, Path, Path]:
    target = Path(folder).resolve()
    return target, target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.previous")


def _recover(target: Path, saving: Path, previous: Path) -> None:
    """Finish the move into place that a killed save began, so that the last complete checkpoint is at `target`."""
    for place in (saving, previous):
        if not target.exists() and (place / INDEX_NAME).is_file():
            os.replace(place, target)


def _write_rank(
    folder: Path, pieces: Mapping[Piece, Callable[[], Tensor]], state: Any, rank_state: Any, rank: int, world_size: int
) -> None:
    encoded_state, tensors = encode_tree(state, "state/")
    encoded_rank_state, rank_tensors = encode_tree(rank_state, "rank_state/")
    tensors |= rank_tensors
    entries = [Entry(piece.key, piece.dtype, (piece.numel,)) for piece in pieces]
    entries += [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    path = folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    checksums = {}

    with SafetensorsWriter(path, entries) as writer:

        def write(name: str, tensor: Tensor) -> None:
            tensor = tensor.detach().cpu().contiguous()
            checksums[name] = zlib.crc32(tensor_bytes(tensor))
            writer.write(name, tensor)

        for piece, produce in pieces.items():
            write(piece.key, produce())
        for name, tensor in tensors.items():
            write(name, tensor)

    listing = [(p.payload, p.fqn, DTYPE_NAMES[p.dtype], p.offset_numel, p.numel) for p in pieces]
    entry = {"file": path.name, "bytes": writer.nbytes, "crc32": checksums}
    entry |= {"state": encoded_state, "rank_state": encoded_rank_state}
    entry["tensors"] = {name: (DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}
    write_text_atomically(_rank_index(folder, rank), json.dumps({"entry": entry, "pieces": listing}))


def _rank_index(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _merged_index(folder: Path, shapes: Mapping[str, Sequence[int]], world_size: int) -> dict[str, Any]:
    """The index of all ranks' files; what the ranks wrote for it is removed. Raises CheckpointError unless every
    payload of every parameter is there wholly and once."""
    payloads: dict[str, dict[str, dict]] = {}
    ranks = []
    for rank in range(world_size):
        path = _rank_index(folder, rank)
        if not path.is_file():
            raise CheckpointError(
                f"rank {rank} wrote nothing into {folder}: name a folder on a disk that all ranks see"
            )
        written = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        ranks.append(written["entry"])
        for payload, fqn, dtype, offset, numel in written["pieces"]:
            entry = payloads.setdefault(payload, {}).setdefault(fqn, {"dtype": dtype, "pieces": []})
            if entry["dtype"] != dtype:
                raise CheckpointError(f"{payload} of {fqn} is {entry['dtype']} on one rank and {dtype} on rank {rank}")
            entry["pieces"].append((rank, offset, numel))
    for payload, entries in payloads.items():
        for fqn, entry in entries.items():
            if fqn not in shapes:
                raise CheckpointError(f"{payload} of {fqn} has pieces and no shape")
            entry["pieces"].sort(key=lambda piece: piece[1:])
            end = 0
            for rank, offset, numel in entry["pieces"]:
                if offset != end:
                    raise CheckpointError(f"{payload} of {fqn}: rank {rank} wrote from {offset} on, and {end} was next")
                end += numel
            if end != math.prod(shapes[fqn]):
                raise CheckpointError(f"{payload} of {fqn}: the ranks wrote {end} of {math.prod(shapes[fqn])} elements")
    return {
        "format": FORMAT,
        "version": VERSION,
        "world_size": world_size,
        "shapes": {fqn: list(shape) for fqn, shape in shapes.items()},
        "payloads": payloads,
        "ranks": ranks,
    }
