"""Checkpoints: every rank writes what it owns, as pieces of flattened parameters; any other set of ranks reads what it needs.

A folder holds one safetensors file a rank, and `index.json`, which says where each piece of each payload of each parameter
lies. A piece is known by parameter name and global offset, never by chunk or rank, so that world size, stage, placement and
chunk size may change between saving and loading.

The files are written in `.NAME.saving` beside the folder NAME, the index last, and then moved into place; the checkpoint that
NAME held before is at `.NAME.previous` meanwhile. At any instant a complete checkpoint is at one of the three, where
`read_checkpoint` finds it.
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

_LISTED = 8  # how many names of a kind an error lists


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, corrupt, or not of this model."""


@dataclass(frozen=True)
class Piece:
    """The elements [offset_numel, offset_numel + numel) of one payload of the flattened parameter `fqn`."""

    payload: str
    """"weight", "master", "exp_avg" or "exp_avg_sq"."""
    fqn: str
    offset_numel: int
    numel: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{self.payload}/{self.fqn}/{self.offset_numel}"


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
    barrier: Callable[[Exception | None], None] = raise_alone,
) -> None:
    """Write a checkpoint to `folder`, which all ranks see; called by every rank.

    `pieces` are this rank's: each gives its values, of its dtype and numel, when it is written, so that one is in memory at a
    time. Over all ranks the pieces of a payload of a parameter cover it without overlap. `shapes` has the shape of every
    parameter. `state` is the same on all ranks (optimizer groups, step, scaler) and `rank_state` is this rank's own (random
    generators, the caller's state): nested values as `encode_tree` takes them.

    `barrier(error)` waits for all ranks, and raises on each of them where any brought an error, so that a full disk on one is
    an error on all. What a failed or killed save left behind is removed, by itself or by the next save.
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
            shutil.rmtree(saving, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)
            saving.mkdir()

    def finish() -> None:
        if rank == 0:
            index = _merged_index(saving, world_size, shapes)
            write_text_atomically(saving / INDEX_NAME, json.dumps(index))
            if target.exists():
                os.replace(target, previous)
            os.replace(saving, target)
            fsync_folder(target.parent)
            shutil.rmtree(previous, ignore_errors=True)

    together(prepare)
    try:
        together(lambda: _write_rank(saving, pieces, state, rank_state, rank, world_size))
        together(finish)
    except Exception:
        if rank == 0 and target.exists():
            shutil.rmtree(saving, ignore_errors=True)
        raise


def read_checkpoint(folder: str | os.PathLike) -> "Checkpoint":
    """Open the checkpoint in `folder`. Raises CheckpointError where there is none that is complete, and for files of the wrong
    size; values are read, and their checksums compared, when they are asked for."""
    target, saving, previous = _places(folder)
    for place in (target, saving, previous, target):  # once more: a save that ends now moves `saving` to `target`
        if (place / INDEX_NAME).is_file():
            return Checkpoint(place)
    if target.exists():
        raise CheckpointError(f"{target} has no {INDEX_NAME}: the save did not end, or this is not a checkpoint")
    raise CheckpointError(f"there is no checkpoint {target}")
