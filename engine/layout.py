"""Packing of parameters into chunks. Pure: no tensors, no processes.

A *chunk* is contiguous storage of whole parameters in execution order, of one dtype, trainable or not. A *slot* is one
parameter's place in it. A *group* is the chunks of one block, gathered together. Inside a chunk the slots of one
optimizer group are neighbours, so that an optimizer step is one kernel launch a chunk and optimizer group.

Chunks are as long as what they hold, rounded up so that every rank's shard starts aligned: repeated blocks get chunks
of equal size because they hold equal parameters, and padding is the rounding alone. Where optimizer state is stored in
blocks of elements, trainable slots and shards start at multiples of such a block too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

ALIGNMENT_NUMEL = 64
"""A shard starts at a multiple of this many elements: 128 bytes or more in every dtype, a cache line and a DMA
burst."""


@dataclass(frozen=True)
class ParamSpec:
    """What the packing must know of one parameter (a tied parameter once, under its first name)."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    optimizer_group: int
    """Index in the optimizer's param_groups; -1 for a frozen parameter."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Slot:
    fqn: str
    offset_numel: int
    numel: int
    shape: tuple[int, ...]
    optimizer_group: int

    @property
    def stop_numel(self) -> int:
        return self.offset_numel + self.numel


@dataclass(frozen=True)
class ChunkSpec:
    dtype: torch.dtype
    trainable: bool
    numel: int
    """Capacity: used_numel rounded up to a multiple of world_size * ALIGNMENT_NUMEL, or of a larger alignment."""
    slots: tuple[Slot, ...]

    @property
    def used_numel(self) -> int:
        return self.slots[-1].stop_numel

    @property
    def param_numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    def padding(self) -> list[slice]:
        """The elements that belong to no parameter: between slots and after the last."""
        stops = [slot.stop_numel for slot in self.slots]
        starts = [slot.offset_numel for slot in self.slots[1:]] + [self.numel]
        return [slice(stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start]

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def shard_range(self, rank: int, world_size: int) -> tuple[int, int]:
        """[start, stop) of the elements that `rank` owns."""
        shard_numel = self.numel // world_size
        return rank * shard_numel, (rank + 1) * shard_numel


@dataclass(frozen=True)
class GroupSpec:
    name: str
    """The block's fully qualified name."""
    chunks: tuple[ChunkSpec, ...]


@dataclass(frozen=True)
class Layout:
    groups: tuple[GroupSpec, ...]
    world_size: int

    @property
    def chunks(self) -> list[ChunkSpec]:
        return [chunk for group in self.groups for chunk in group.chunks]

    @property
    def param_numel(self) -> int:
        return sum(chunk.param_numel for chunk in self.chunks)

    @property
    def stored_numel(self) -> int:
        return sum(chunk.numel for chunk in self.chunks)

    @property
    def padding_fraction(self) -> float:
        """Padding over all stored elements."""
        return 1 - self.param_numel / self.stored_numel if self.stored_numel else 0.0


def round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def pack_chunk(specs: Sequence[ParamSpec], world_size: int, slot_multiple: int = 1) -> ChunkSpec:
    """One chunk that holds `specs`, all of one dtype and trainability, neighbours by optimizer group."""
    multiple = _slot_multiple(specs[0], slot_multiple)
    slots, offset = [], 0
    for spec in sorted(specs, key=lambda spec: spec.optimizer_group):  # stable: execution order inside a group
        slots.append(Slot(spec.fqn, offset, spec.numel, spec.shape, spec.optimizer_group))
        offset += round_up(spec.numel, multiple)
    numel = round_up(max(offset, 1), world_size * max(ALIGNMENT_NUMEL, multiple))
    return ChunkSpec(specs[0].dtype, specs[0].trainable, numel, tuple(slots))


def _slot_multiple(spec: ParamSpec, slot_multiple: int) -> int:
    return slot_multiple if spec.trainable else 1


def split_by_size(specs: Iterable[ParamSpec], max_numel: int, slot_multiple: int = 1) -> list[list[ParamSpec]]:
    """Cut a sequence into runs of at most `max_numel`; a parameter that is larger alone gets a run of its own."""
    runs: list[list[ParamSpec]] = []
    filled = 0
    for spec in specs:
        if not runs or filled + spec.numel > max_numel:
            runs.append([])
            filled = 0
        runs[-1].append(spec)
        filled += round_up(spec.numel, _slot_multiple(spec, slot_multiple))
    return runs


def pack_group(
    name: str, specs: Sequence[ParamSpec], world_size: int, max_chunk_numel: int, slot_multiple: int
) -> GroupSpec:
    def kind(spec: ParamSpec) -> tuple[str, bool]:
        return str(spec.dtype), spec.trainable

    chunks = [
        pack_chunk(run, world_size, slot_multiple)
        for _, same_kind in groupby(sorted(specs, key=kind), key=kind)
        for run in split_by_size(same_kind, max_chunk_numel, slot_multiple)
    ]
    return GroupSpec(name, tuple(chunks))


def pack(
    blocks: Sequence[tuple[str, Sequence[ParamSpec]]], world_size: int, max_chunk_numel: int, slot_multiple: int = 1
) -> Layout:
    """Pack blocks, given in execution order as (name, its parameters), for `world_size` ranks. Trainable parameters
    start at multiples of `slot_multiple` elements.

    Raises ValueError when a parameter appears twice: a tied weight belongs to one block.
    """
    seen: set[str] = set()
    for _, specs in blocks:
        for spec in specs:
            if spec.fqn in seen:
                raise ValueError(f"parameter {spec.fqn} appears twice: give a tied weight once")
            seen.add(spec.fqn)
    groups = [pack_group(name, specs, world_size, max_chunk_numel, slot_multiple) for name, specs in blocks if specs]
    return Layout(tuple(groups), world_size)
