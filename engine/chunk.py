"""A chunk: where its payloads are. Storage only; what happens when is the group's and the hooks' business.

The parameters of a model are views of their chunk's `full` buffer, made once. A chunk that is *sharded* is released by
resizing that buffer's storage to zero and unsharded by resizing it back and filling it, so that views which autograd
saved stay right; it is written through `.data`, so that no version counter moves. A chunk that is not sharded keeps
`full` for good, and its weight at rest is a slice of it: with one rank the shard and the whole are the same memory.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from ..kernels import (
    CODE_BLOCK_NUMEL,
    CODE_DTYPES,
    decode_moment,
    encode_moment,
    join_master,
    scales_numel,
    split_master,
)
from .config import Precision, StatePrecision
from .disk_tensor import DiskTensor, in_memory
from .lanes import Lane, UpdateEvent
from .layout import ChunkSpec, Slot
from .placement import ChunkPlacement, disk_name
from .staging import Staging, alias
from .tiers import Payload, Storage, Tier, Work, advise_huge_pages

STATE_PAYLOADS = {
    "remainder": Payload.MASTER,
    "master": Payload.MASTER,
    "exp_avg": Payload.EXP_AVG,
    "exp_avg_sq": Payload.EXP_AVG_SQ,
    "scales": Payload.SCALES,
}
"""Of the optimizer, by attribute of a chunk."""


class ShardState(Enum):
    """Who owns the memory of a chunk's weights. SHARDED: the weight at rest alone. UNSHARDED: `full` is allocated, and
    holds the weights once the group's event has been waited for."""

    SHARDED = "sharded"
    UNSHARDED = "unsharded"


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


def _owned_slots(spec: ChunkSpec, placement: ChunkPlacement) -> tuple[OwnedSlot, ...]:
    owned_start, owned_stop = placement.owned
    result = []
    for slot in spec.slots:
        start, stop = max(slot.offset_numel, owned_start), min(slot.stop_numel, owned_stop)
        if start < stop:
            result.append(OwnedSlot(slot, start - slot.offset_numel, stop - slot.offset_numel, start - owned_start))
    return tuple(result)


def payload_part(payload: str, start: int, stop: int) -> slice:
    """Where a payload has what belongs to the owned elements [start, stop), `start` being a multiple of the blocks that
    share scales."""
    if payload != "scales":
        return slice(start, stop)
    first = start // CODE_BLOCK_NUMEL * 2
    return slice(first, first + scales_numel(stop - start))


class Chunk:
    def __init__(self, name: str, index: int, spec: ChunkSpec, placement: ChunkPlacement, storage: Storage) -> None:
        self.name = name
        self.index = index
        """Place among all chunks of the model: the tag of its transfers."""
        self.spec = spec
        self.placement = placement
        self.home = placement
        """The placement in the plan. Another one is `promoted`."""
        self._at_home: dict[str, torch.Tensor | DiskTensor] = {}  # by attribute: room kept for what is promoted
        self.owned_slots = _owned_slots(spec, placement)
        """The parts of this chunk's parameters in the owned range, in storage order."""
        self._storage = storage
        self.state = ShardState.UNSHARDED
        self.full: torch.Tensor  # 1D [numel]
        if placement.sharded:
            self.full = torch.empty(spec.numel, dtype=spec.dtype, device=storage.device)
            storage.ledger.add(Tier.DEVICE, Payload.GATHERED, self.full.nbytes)
        else:
            self.full = storage.zeros(Tier.DEVICE, Payload.WEIGHT, spec.numel, spec.dtype)
        self._full_cdata = self.full.untyped_storage()._cdata
        self.views = {slot.fqn: self.full[slot.offset_numel : slot.stop_numel].view(slot.shape) for slot in spec.slots}
        start, stop = placement.owned
        # What follows is 1D [owned_numel], and on a drive where the placement says so.
        self.weight: torch.Tensor | DiskTensor  # the owned part of the weights at rest
        if placement.sharded:
            self.weight = self._zeros(placement.weight_tier, Payload.WEIGHT, spec.dtype)
        else:
            self.weight = self.full[start:stop]
        self.remainder: torch.Tensor | DiskTensor | None = None  # int16, bf16 only
        self.master: torch.Tensor | DiskTensor | None = None  # float32, fp16 only
        self.exp_avg: torch.Tensor | DiskTensor | None = None  # float32, or int8 codes
        self.exp_avg_sq: torch.Tensor | DiskTensor | None = None  # float32, or uint8 codes
        self.scales: torch.Tensor | DiskTensor | None = None  # of codes: float32 [scales_numel(owned_numel)]
        self.version = 0
        """Of weight and state at rest: what was read of an older one is void."""
        self.rest_grad: torch.Tensor | DiskTensor | None = None
        """Where gradients wait for the step, off the device."""
        self.pending: UpdateEvent | None = None
        """An update that `step()` has published: until then, weight and state at rest are those of the step before."""
        if spec.trainable:
            self._allocate_state()

    def settle(self) -> None:
        """Block the host until the update that is pending is done: before weight or state at rest are read or written.
        Raises what the update raised."""
        if self.pending is not None:
            self.pending.wait()
            self.pending.synchronize()  # the device may still be copying to the host
            self.pending = None

    def follow_update(self) -> None:
        """Order the caller's work on the device after the update that is pending: before it reads the weights. A drive
        may still be taking them from `full` then."""
        if self.pending is not None:
            self.pending.wait_for_values()
            if self.pending.done():
                self.settle()

    def _allocate_state(self) -> None:
        tier = self.placement.optimizer_tier
        if self.placement.precision is Precision.BF16:
            self.remainder = self._zeros(tier, Payload.MASTER, torch.int16)
        if self.placement.precision is Precision.FP16:
            self.master = self._zeros(tier, Payload.MASTER, torch.float32)
        dtypes = dict.fromkeys(CODE_DTYPES, torch.float32)
        if self.placement.state_precision is StatePrecision.EIGHT_BIT:
            dtypes = CODE_DTYPES
            self.scales = self._zeros(tier, Payload.SCALES, torch.float32, scales_numel(self.placement.owned_numel))
        self.exp_avg = self._zeros(tier, Payload.EXP_AVG, dtypes["exp_avg"])
        self.exp_avg_sq = self._zeros(tier, Payload.EXP_AVG_SQ, dtypes["exp_avg_sq"])
        if self.placement.gradient_tier is Tier.HOST:
            self.rest_grad = self._zeros(Tier.HOST, Payload.GRADIENT, self.spec.dtype)
        elif self.placement.gradient_tier is Tier.NVME:
            self.rest_grad = self._zeros(Tier.NVME, Payload.GRADIENT, torch.float32)

    def _zeros(
        self, tier: Tier, payload: Payload, dtype: torch.dtype, numel: int | None = None
    ) -> torch.Tensor | DiskTensor:
        numel = self.placement.owned_numel if numel is None else numel
        if tier is not Tier.NVME:
            return self._storage.zeros(tier, payload, numel, dtype)
        return self._storage.on_disk(payload, disk_name(self.name, payload), numel, dtype)

    # Moves between two steps. The chunk is sharded, or holds the weights in `full`.

    @property
    def is_promoted(self) -> bool:
        return bool(self._at_home)

    def promote(self, lane: Lane, staging: Staging) -> None:
        """Move weight and state to the device. Their room at home stays reserved, so that `send_home` cannot fail for
        want of it. When this raises, the chunk is where it was."""
        self.settle()
        target = self.home.promoted(self.spec)
        stays_whole = self.placement.sharded and not target.sharded
        leaving = [name for name in STATE_PAYLOADS if getattr(self, name) is not None]
        if self.home.optimizer_tier is Tier.DEVICE:
            leaving = []
        if self.home.weight_tier is not Tier.DEVICE and not stays_whole:
            leaving.append("weight")
        at_home = {name: getattr(self, name) for name in leaving}
        moved = {name: self._storage.device_zeros(each.numel(), each.dtype) for name, each in at_home.items()}
        is_new = stays_whole and self.state is ShardState.SHARDED
        if is_new:
            self.allocate_full()

        def copy() -> None:
            if stays_whole:
                self.copy_weight_in(staging)
            for name, out in moved.items():
                self._copy_in(at_home[name], out, staging)

        try:
            lane.submit(copy, f"promote {self.name}").wait()
        except BaseException:
            if is_new:
                self.free_full()
            raise
        if stays_whole:
            at_home["weight"] = self.weight
            moved["weight"] = self.full[slice(*self.placement.owned)]
            self._count(Payload.GATHERED, -self.full.nbytes)
        self._switch(target, moved, 1)
        self._at_home = at_home

    def send_home(self, lane: Lane, staging: Staging) -> None:
        """Undo `promote`. Where the weights are gathered then, the caller may reshard them."""
        self.settle()
        here = {name: getattr(self, name).detach() for name in self._at_home}
        becomes_sharded = self.home.sharded and not self.placement.sharded
        if becomes_sharded:
            here["weight"] = self.owned_in_full()

        def copy() -> None:
            for name, values in here.items():
                self.did(Work.LINK_OUT, values.nbytes)
                target = self._at_home[name]
                if isinstance(target, DiskTensor):
                    staging.write(values, target)
                else:
                    target.copy_(values)  # and wait: the host may update it next

        lane.submit(copy, f"send home {self.name}").wait()
        self._switch(self.home, self._at_home, -1)
        self._at_home = {}
        if becomes_sharded:
            self._count(Payload.GATHERED, self.full.nbytes)

    def _switch(self, placement: ChunkPlacement, values: dict[str, torch.Tensor | DiskTensor], sign: int) -> None:
        """Nothing of it can fail. `sign`: whether the device takes them or gives them back."""
        for name, each in values.items():
            nbytes = each.numel() * each.dtype.itemsize
            if name == "weight" and not self.home.promoted(self.spec).sharded:
                nbytes = self.full.nbytes
            self._count(STATE_PAYLOADS.get(name, Payload.WEIGHT), sign * nbytes)
            setattr(self, name, each)
        self.placement = placement
        self.version += 1

    def _count(self, payload: Payload, nbytes: int) -> None:
        self._storage.ledger.add(Tier.DEVICE, payload, nbytes)

    def did(self, work: Work, amount: int) -> None:
        self._storage.ledger.did(work, amount)

    # Weights

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of this chunk."""
        return tensor.untyped_storage()._cdata == self._full_cdata

    def allocate_full(self) -> None:
        if self.state is not ShardState.SHARDED:
            raise RuntimeError(f"chunk {self.name} is {self.state.value} already: only a sharded chunk is unsharded")
        self.full.untyped_storage().resize_(self.full.nbytes)
        advise_huge_pages(self.full)
        self._storage.ledger.add(Tier.DEVICE, Payload.GATHERED, self.full.nbytes)
        self.state = ShardState.UNSHARDED

    def free_full(self) -> None:
        """The caller has ordered this after every use of the weights."""
        if self.state is not ShardState.UNSHARDED or not self.placement.sharded:
            raise RuntimeError(f"chunk {self.name} cannot be resharded: it is {self.state.value}")
        self._storage.ledger.add(Tier.DEVICE, Payload.GATHERED, -self.full.nbytes)
        self.full.untyped_storage().resize_(0)
        self.state = ShardState.SHARDED

    def copy_weight_in(self, staging: Staging) -> None:
        """This rank's weights at rest into their place in `full`."""
        if not self.placement.sharded:
            return
        out = self.full.data[slice(*self.placement.owned)]
        if self.placement.weight_tier is Tier.DEVICE:
            out.copy_(self.weight, non_blocking=True)
        else:
            self._copy_in(self.weight, out, staging)

    def _copy_in(self, values: torch.Tensor | DiskTensor, out: torch.Tensor, staging: Staging) -> None:
        """From where they are at rest off the device."""
        self.did(Work.LINK_IN, out.nbytes)
        if isinstance(values, DiskTensor):
            staging.read(values, out)
        else:
            out.copy_(values, non_blocking=True)

    @property
    def is_updated_in_place(self) -> bool:
        """Whether an update in the backward pass takes the weights from `full`, where they are, and not from a
        drive."""
        updated = self.spec.trainable and self.placement.optimizer_tier is not Tier.DEVICE
        return updated and self.placement.gradient_tier is Tier.DEVICE and isinstance(self.weight, DiskTensor)

    def owned_in_full(self) -> torch.Tensor:
        """The owned part [owned_numel] of the gathered weights, for as long as they are; the drive may read it."""
        owned = self.full.data[slice(*self.placement.owned)]
        return owned if owned.is_cuda else alias(owned)

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
        self.version += 1
        weight = self.weight[part] if isinstance(self.weight, DiskTensor) else self.weight.data[part]
        if self.remainder is None:
            weight.copy_(values)
            if self.master is not None:
                self.master[part].copy_(values)
            return
        remainder = self.remainder[part]
        in_place = isinstance(weight, torch.Tensor) and isinstance(remainder, torch.Tensor)
        if in_place and values.device == weight.device == remainder.device:
            split_master(values, out=(weight, remainder))
        else:
            high, low = split_master(values)
            weight.copy_(high)
            remainder.copy_(low)

    def load_moment(self, payload: str, values: torch.Tensor, part: slice) -> None:
        """Take "exp_avg" or "exp_avg_sq" of the owned elements in `part`, which begins a parameter's blocks of
        scales."""
        self.settle()
        self.version += 1
        moment = getattr(self, payload)[part]
        if self.scales is None:
            moment.copy_(values)
            return
        own_scales = self.scales[payload_part("scales", *part.indices(self.placement.owned_numel)[:2])]
        codes, scales = torch.empty(values.numel(), dtype=moment.dtype), in_memory(own_scales).cpu().clone()
        encode_moment(values.cpu().float(), payload, codes, scales)
        moment.copy_(codes)
        own_scales.copy_(scales)

    def values_of(self, payload: str, part: slice) -> torch.Tensor:
        """The owned elements in `part` of "weight", "master" (float32, full precision), "exp_avg" or "exp_avg_sq"
        (float32 of moments in codes, whose `part` begins a block); what is on a drive is read."""
        self.settle()
        if self.scales is not None and payload in CODE_DTYPES:
            start, stop, _ = part.indices(self.placement.owned_numel)
            own_scales = in_memory(self.scales[payload_part("scales", start, stop)])
            return decode_moment(in_memory(getattr(self, payload)[part]), payload, own_scales)
        if payload != "master":
            return in_memory(getattr(self, payload)[part])
        if self.remainder is not None:
            remainder = in_memory(self.remainder[part])
            return join_master(in_memory(self.weight[part]).to(remainder.device), remainder)
        return in_memory((self.weight if self.master is None else self.master)[part])
