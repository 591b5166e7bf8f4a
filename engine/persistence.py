"""A trained model on disk: checkpoints to go on from, and weights in Hugging Face layout. All functions are
collectives."""

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import checkpoint as checkpoint_files
from . import export
from .checkpoint import Piece, read_checkpoint, write_checkpoint
from .chunk import Chunk
from .optimizer import ZeroOptimizer
from .parameter_names import persistent_buffer_names
from .rng_state import capture_rng_state, restore_rng_state
from .shard import Engine, engine_of


def save_checkpoint(
    folder: str | os.PathLike, model: nn.Module, optimizer: ZeroOptimizer | None, state: Any = None
) -> None:
    """Save weights, masters, moments, step counts, loss scale, random generators and the caller's `state` (nested lists
    and dicts of plain values and tensors; each rank's own).

    Going on from it at the same world size gives the same bits as not having stopped. It can be loaded at any other
    world size, stage, placement and chunk size. Replaces a checkpoint of the same name only once it is complete.

    Raises RuntimeError when gradients wait for a step, and on every rank where any rank fails.
    """
    engine = engine_of(model)
    engine.schedule.recover()
    engine.schedule.check_sound()
    error = _wrong_optimizer(engine, optimizer)
    if engine.schedule.micro_steps:
        error = RuntimeError("gradients wait for a step and are not saved: call optimizer.step() or zero_grad() first")
    engine.rank_group.barrier(error)
    write_checkpoint(
        folder,
        dict(_pieces(engine)),
        shapes=_shapes(engine),
        state={"optimizer": None if optimizer is None else optimizer.shared_state()},
        rank_state={"random": capture_rng_state(), "buffers": _persistent_buffers(model), "caller": state},
        rank=engine.rank_group.rank,
        world_size=engine.rank_group.world_size,
        barrier=engine.rank_group.barrier,
    )


@torch.no_grad()
def load_checkpoint(folder: str | os.PathLike, model: nn.Module, optimizer: ZeroOptimizer | None) -> Any:
    """Load what `save_checkpoint` saved and return the caller's state. A rank that the saving run did not have takes
    rank 0's.

    Raises CheckpointError on every rank, before anything is changed where it is another model's or incomplete.
    """
    engine = engine_of(model)
    engine.schedule.recover()
    saved, shared, rank_state, error = None, None, None, _wrong_optimizer(engine, optimizer)
    try:
        saved = read_checkpoint(folder)
        saved.check(_shapes(engine))
        rank = engine.rank_group.rank
        rank_state = saved.rank_state(rank if rank < saved.world_size else 0)
        shared = saved.state["optimizer"]
        if optimizer is not None:
            optimizer.check_shared_state(shared)
        engine.schedule.check_idle()
    except Exception as caught:
        error = error or caught
    engine.rank_group.barrier(error)

    engine.schedule.reshard_all()
    engine.schedule.wait_all()
    try:
        for chunk in engine.chunks:
            _load_chunk(chunk, saved)
    except Exception as caught:
        error = caught
    for group in engine.groups:
        group.mark_updated(group.chunks)
        if not group.is_sharded:
            engine.schedule.refresh(group)
    engine.rank_group.barrier(error)
    if optimizer is not None:
        optimizer.load_shared_state(shared)
    for name, buffer in _persistent_buffers(model).items():
        buffer.copy_(rank_state["buffers"][name])
    restore_rng_state(rank_state["random"])
    return rank_state["caller"]


def save_pretrained(
    folder: str | os.PathLike,
    model: nn.Module,
    *,
    max_shard_bytes: int = 5 * 10**9,
    written_as: nn.Module | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Save the weights, in the dtype that they are computed with, so that `from_pretrained` reads them. Block by block:
    no rank holds more than a block beside what it stores.

    `written_as` and `weights`: another model (on meta) to save in `model`'s place, and its full tensors by name, made
    of those that `whole_weights(model)` gives."""
    engine = engine_of(model)
    export.save_pretrained(
        folder,
        model if written_as is None else written_as,
        whole_weights(model) if weights is None else weights,
        dtype=engine.compute_dtype,
        max_shard_bytes=max_shard_bytes,
        write=engine.rank_group.rank == 0,
        barrier=engine.rank_group.barrier,
    )


def whole_weights(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, a copy of the full tensor on the CPU) of every parameter, or of those in `names`, block by block.
    Every rank must take them all."""
    engine = engine_of(model)
    for group in engine.groups:
        views = {fqn: view for chunk in group.chunks for fqn, view in chunk.views.items()}
        wanted = [fqn for fqn in views if names is None or fqn in names]
        if not wanted:
            continue
        engine.schedule.hold([group], "export")
        for fqn in wanted:
            yield fqn, views[fqn].detach().to("cpu", copy=True)
        engine.schedule.release([group], "export")


def _wrong_optimizer(engine: Engine, optimizer: ZeroOptimizer | None) -> ValueError | None:
    if optimizer is engine.optimizer:
        return None
    return ValueError("give the optimizer that initialize() returned with this model (None for a frozen model)")


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    persistent = persistent_buffer_names(model)
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    return {slot.fqn: slot.shape for chunk in engine.layout.chunks for slot in chunk.slots}


def _pieces(engine: Engine) -> Iterator[tuple[Piece, Any]]:
    """What this rank saves: of a chunk that every rank owns whole, rank 0 saves all."""
    for chunk in engine.chunks:
        if chunk.placement.owned_numel == chunk.spec.numel and engine.rank_group.rank != 0:
            continue
        payloads = ("master", "exp_avg", "exp_avg_sq") if chunk.spec.trainable else ("weight",)
        dtype = torch.float32 if chunk.spec.trainable else chunk.spec.dtype
        for owned in chunk.owned_slots:
            for payload in payloads:
                yield (
                    Piece(payload, owned.slot.fqn, owned.start, owned.stop - owned.start, dtype),
                    lambda chunk=chunk, payload=payload, part=owned.shard_slice: chunk.values_of(payload, part).cpu(),
                )


def _load_chunk(chunk: Chunk, saved: checkpoint_files.Checkpoint) -> None:
    dtype = torch.float32 if chunk.spec.dtype.is_floating_point else chunk.spec.dtype
    for owned in chunk.owned_slots:
        fqn, part = owned.slot.fqn, owned.shard_slice
        values = torch.empty(owned.stop - owned.start, dtype=dtype)
        saved.fill("master" if saved.holds("master", fqn) else "weight", fqn, owned.start, values)
        chunk.load_owned_master(values, part)
        if chunk.spec.trainable:
            for payload in ("exp_avg", "exp_avg_sq"):
                values = torch.empty(owned.stop - owned.start)
                saved.fill(payload, fqn, owned.start, values)
                chunk.load_moment(payload, values, part)
