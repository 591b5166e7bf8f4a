"""A chunk: where its payloads are. Storage only; what happens when is the group's and the hooks' business.

The parameters of a model are views of their chunk's `full` buffer, made once. A chunk that is *sharded* is released by
resizing that buffer's storage to zero and unsharded by resizing it back and filling it, so that views which autograd
saved stay right; it is written through `.data`, so that no version counter moves. A chunk that is not sharded keeps
`full` for good, and its weight at rest is a slice of it: with one rank the shard and the whole are the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from ..kernels import join_master, split_master
from .config import EngineConfig, Precision
from .lanes import Event
from .layout import ChunkSpec, Slot
from .tiers import Payload, Storage, Tier


class ShardState(Enum):
    """Who owns the memory of a chunk's weights. SHARDED: the weight at rest alone. UNSHARDED: `full` is allocated, and
    holds the weights once the group's event has been waited for."""

    SHARDED = "sharded"
    UNSHARDED = "unsharded"


@dataclass(frozen=True)
class ChunkPlacement:
    """How one chunk is stored on one rank: a pure function of the options, so that the plan and the run share it."""

    sharded: bool
    """The weights are freed between uses."""
    weight_tier: Tier
    optimizer_tier: Tier
    owned: tuple[int, int]
    """[start, stop) of the elements whose optimizer state, and in stage 3 whose weight, this rank keeps."""
    precision: Precision

    @property
    def owned_numel(self) -> int:
        return self.owned[1] - self.owned[0]

    def payload_bytes(self, spec: ChunkSpec) -> dict[tuple[Tier, Payload], int]:
        """Bytes at rest by tier and payload."""
        rest_numel = self.owned_numel if self.sharded else spec.numel
        result = {(self.weight_tier, Payload.WEIGHT): rest_numel * spec.dtype.itemsize}
        if spec.trainable:
            tier = self.optimizer_tier
            master_itemsize = {Precision.FP32: 0, Precision.BF16: 2, Precision.FP16: 4}[self.precision]
            if master_itemsize:
                result[tier, Payload.MASTER] = self.owned_numel * master_itemsize
            result[tier, Payload.EXP_AVG] = result[tier, Payload.EXP_AVG_SQ] = self.owned_numel * 4
            if tier is Tier.HOST:
                result[tier, Payload.GRADIENT] = self.owned_numel * spec.dtype.itemsize
        return result


def place_chunks(specs: list[ChunkSpec], config: EngineConfig, rank: int, world_size: int) -> list[ChunkPlacement]:
    """Place every chunk of a model, given in execution order. Offloaded are the first ones: the last of the forward
    pass are the first of the backward pass, so that those cost no transfer when they stay."""
    weight_on_host = _first_fraction(specs, config.weight_offload_fraction, lambda spec: True)
    state_on_host = _first_fraction(specs, config.optimizer_offload_fraction, lambda spec: spec.trainable)
    result = []
    for index, spec in enumerate(specs):
        weight_tier = Tier.HOST if index in weight_on_host else Tier.DEVICE
        sharded = weight_tier is Tier.HOST or (config.zero_stage == 3 and world_size > 1)
        # A frozen chunk has no optimizer state to share out, and below stage 3 every rank keeps all of its weights.
        whole = config.zero_stage == 0 or world_size == 1 or (config.zero_stage < 3 and not spec.trainable)
        result.append(
            ChunkPlacement(
                sharded,
                weight_tier,
                Tier.HOST if index in state_on_host else Tier.DEVICE,
                (0, spec.numel) if whole else spec.shard_range(rank, world_size),
                Precision(config.precision),
            )
        )
    return result


def _first_fraction(specs: list[ChunkSpec], fraction: float, counts) -> set[int]:
    """Indices of the first of those that count, up to `fraction` of their bytes, to the nearest chunk."""
    wanted = fraction * sum(spec.nbytes for spec in specs if counts(spec))
    taken: set[int] = set()
    taken_bytes = 0
    for index, spec in enumerate(specs):
        if counts(spec) and taken_bytes + spec.nbytes / 2 <= wanted:
            taken.add(index)
            taken_bytes += spec.nbytes
    return taken


@dataclass(frozen=True)
class OwnedSlot:
    """The part of a parameter that this rank owns: elements [start, stop) of the parameter, at `shard_start` of the
    shard."""

    slot: Slot
    start: int
    stop: int
    shard_start: int

    @property
    def shard_slice(self) -> slice:
        return slice(self.shard_start, self.shard_stop)

    @property
    def shard_stop(self) -> int:
        return self.shard_start + self.stop - self.start


class Chunk:
    def __init__(self, name: str, index: int, spec: ChunkSpec, placement: ChunkPlacement, storage: Storage) -> None:
        self.name = name
        self.index = index
        """Place among all chunks of the model: the tag of its transfers."""
        self.spec = spec
        self.placement = placement
        self._storage = storage
        self.state = ShardState.UNSHARDED
        self.full: torch.Tensor  # 1D [numel]
        if placement.sharded:
            self.full = torch.empty(spec.numel, dtype=spec.dtype, device=storage.device)
            storage.ledger.add(Tier.DEVICE, Payload.GATHERED, self.full.nbytes)
        else:
            self.full = storage.zeros(Tier.DEVICE, Payload.WEIGHT, spec.numel, spec.dtype)
        self.views = {slot.fqn: self.full[slot.offset_numel : slot.stop_numel].view(slot.shape) for slot in spec.slots}
        start, stop = placement.owned
        self.weight: torch.Tensor  # 1D [owned_numel], the owned part of the weights at rest
        if placement.sharded:
            self.weight = storage.zeros(placement.weight_tier, Payload.WEIGHT, placement.owned_numel, spec.dtype)
        else:
            self.weight = self.full[start:stop]
        self.remainder: torch.Tensor | None = None  # 1D int16 [owned_numel], bf16 only
        self.master: torch.Tensor | None = None  # 1D float32 [owned_numel], fp16 only
        self.exp_avg: torch.Tensor | None = None  # 1D float32 [owned_numel]
        self.exp_avg_sq: torch.Tensor | None = None  # 1D float32 [owned_numel]
        self.host_grad: torch.Tensor | None = (
            None  # 1D [owned_numel], where gradients land when the state is on the host
        )
        self.pending: Event | None = None
        """An update that `step()` has published: until then, weight and state at rest are those of the step before."""
        if spec.trainable:
            self._allocate_state()

    def settle(self) -> None:
        """Wait for the update that is pending: before weight or state at rest are read or written. Raises what the
        update raised."""
        if self.pending is not None:
            self.pending.wait()  # what it writes on the host is written by then
            self.pending = None

    def _allocate_state(self) -> None:
        tier, numel = self.placement.optimizer_tier, self.placement.owned_numel
        if self.placement.precision is Precision.BF16:
            self.remainder = self._storage.zeros(tier, Payload.MASTER, numel, torch.int16)
        if self.placement.precision is Precision.FP16:
            self.master = self._storage.zeros(tier, Payload.MASTER, numel, torch.float32)
        self.exp_avg = self._storage.zeros(tier, Payload.EXP_AVG, numel, torch.float32)
        self.exp_avg_sq = self._storage.zeros(tier, Payload.EXP_AVG_SQ, numel, torch.float32)
        if tier is Tier.HOST:
            self.host_grad = self._storage.zeros(tier, Payload.GRADIENT, numel, self.spec.dtype)

    # Weights

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of this chunk."""
        return tensor.untyped_storage()._cdata == self.full.untyped_storage()._cdata

    def allocate_full(self) -> None:
        if self.state is not ShardState.SHARDED:
            raise RuntimeError(f"chunk {self.name} is {self.state.value} already: only a sharded chunk is unsharded")
        self.full.untyped_storage().resize_(self.full.nbytes)
        self._storage.ledger.add(Tier.DEVICE, Payload.GATHERED, self.full.nbytes)
        self.state = ShardState.UNSHARDED

    def free_full(self) -> None:
        """The caller has ordered this after every use of the weights."""
        if self.state is not ShardState.UNSHARDED or not self.placement.sharded:
            raise RuntimeError(f"chunk {self.name} cannot be resharded: it is {self.state.value}")
        self._storage.ledger.add(Tier.DEVICE, Payload.GATHERED, -self.full.nbytes)
        self.full.untyped_storage().resize_(0)
        self.state = ShardState.SHARDED

    def copy_weight_in(self) -> None:
        """This rank's weights at rest into their place in `full`."""
        if self.placement.sharded:
            start, stop = self.placement.owned
            self.full.data[start:stop].copy_(self.weight, non_blocking=True)

    def load_full(self, values: torch.Tensor) -> None:
        """Take weight and master from whole values [numel], float32 where they are floats; they may be `full`
        itself."""
        start, stop = self.placement.owned
        if not self.placement.sharded:
            self.full.data.copy_(values)
        self.load_owned_master(values[start:stop])

    def load_owned_master(self, values: torch.Tensor, part: slice = slice(None)) -> None:
        """Take weight and master of the owned elements in `part` from full-precision values. Of a chunk that is neither
        sharded nor wholly owned, the caller gathers the rest."""
        self.settle()
        if self.remainder is not None:
            weight, remainder = self.weight.data[part], self.remainder[part]
            if values.device == weight.device == remainder.device:
                split_master(values, out=(weight, remainder))
            else:
                high, low = split_master(values)
                weight.copy_(high)
                remainder.copy_(low)
            return
        self.weight.data[part].copy_(values)
        if self.master is not None:
            self.master[part].copy_(values)

    def values_of(self, payload: str, part: slice) -> torch.Tensor:
        """The owned elements in `part` of "weight", "master" (float32, full precision), "exp_avg" or "exp_avg_sq"."""
        self.settle()
        if payload != "master":
            return getattr(self, payload)[part]
        if self.remainder is not None:
            return join_master(self.weight[part].to(self.remainder.device), self.remainder[part])
        return (self.weight if self.master is None else self.master)[part]

    def owned_slots(self) -> Iterator[OwnedSlot]:
        """The parts of this chunk's parameters in the owned range, in storage order."""
        owned_start, owned_stop = self.placement.owned
        for slot in self.spec.slots:
            start, stop = max(slot.offset_numel, owned_start), min(slot.stop_numel, owned_stop)
            if start < stop:
                yield OwnedSlot(slot, start - slot.offset_numel, stop - slot.offset_numel, start - owned_start)
