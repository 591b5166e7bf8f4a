"""Where what an engine stores lies: pure functions of layout and options, which the plan and the run share."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..kernels import scales_numel
from .config import EngineConfig, Precision, StatePrecision
from .layout import ChunkSpec, Layout
from .streaming_sizes import NO_RING, Ring
from .tiers import Payload, Tier

STORE_RING_BYTES = 2**25
"""Of an `NvmeStore`, for transfers that are not aligned."""

WEIGHT_STAGING_BYTES = 2**25
"""Of each of the two lanes that move tensors between a GPU and a drive."""


@dataclass(frozen=True)
class ChunkPlacement:
    """How one chunk is stored on one rank: a pure function of the options, so that the plan and the run share it."""

    sharded: bool
    """The weights are freed between uses."""
    weight_tier: Tier
    optimizer_tier: Tier
    gradient_tier: Tier
    """Where reduced gradients wait for the step."""
    owned: tuple[int, int]
    """[start, stop) of the elements whose optimizer state, and in stage 3 whose weight, this rank keeps."""
    precision: Precision
    state_precision: StatePrecision = StatePrecision.EXACT

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
            moment_itemsize = 4 if self.state_precision is StatePrecision.EXACT else 1
            result[tier, Payload.EXP_AVG] = result[tier, Payload.EXP_AVG_SQ] = self.owned_numel * moment_itemsize
            if self.state_precision is StatePrecision.EIGHT_BIT:
                result[tier, Payload.SCALES] = 4 * scales_numel(self.owned_numel)
            if self.gradient_tier is not Tier.DEVICE:
                result[self.gradient_tier, Payload.GRADIENT] = self.gradient_bytes(spec)
        return result

    def tier_bytes(self, tier: Tier, spec: ChunkSpec) -> int:
        """At rest on one tier."""
        return sum(nbytes for (where, _), nbytes in self.payload_bytes(spec).items() if where is tier)

    def state_bytes(self, spec: ChunkSpec) -> int:
        """Of the optimizer, wherever it is at rest."""
        payloads = self.payload_bytes(spec).items()
        return sum(nbytes for (_, payload), nbytes in payloads if payload not in (Payload.WEIGHT, Payload.GRADIENT))

    def is_on_device(self, spec: ChunkSpec) -> bool:
        return all(tier is Tier.DEVICE for tier, _ in self.payload_bytes(spec))

    def promoted(self, spec: ChunkSpec) -> "ChunkPlacement":
        """With all of it on the device. Where one rank has the whole chunk, its weights are gathered for good."""
        sharded = self.sharded and self.owned_numel < spec.numel
        return replace(
            self,
            sharded=sharded,
            weight_tier=Tier.DEVICE,
            optimizer_tier=Tier.DEVICE,
            gradient_tier=Tier.DEVICE,
        )

    def gradient_bytes(self, spec: ChunkSpec) -> int:
        """Taken at start, off the device. On the host, float32 sums of 16-bit gradients get other memory when there are
        any; a drive's space is all taken at start."""
        return self.owned_numel * (4 if self.gradient_tier is Tier.NVME else spec.dtype.itemsize)


def place_chunks(
    specs: list[ChunkSpec],
    config: EngineConfig,
    rank: int,
    world_size: int,
    weight_tiers: list[Tier],
    state_tiers: list[Tier],
) -> list[ChunkPlacement]:
    """Place every chunk of a model on the tiers given, as far as the stage allows. Gradients of chunks whose state is
    on the drive are too, as yet."""
    result = []
    precisions = Precision(config.precision), StatePrecision(config.state_precision)
    for spec, weight_tier, state_tier in zip(specs, weight_tiers, state_tiers, strict=True):
        if config.zero_stage < 3:  # weights are whole on the device at all times
            weight_tier = Tier.DEVICE
        sharded = weight_tier is not Tier.DEVICE or (config.zero_stage == 3 and world_size > 1)
        # A frozen chunk has no optimizer state to share out, and below stage 3 every rank keeps all of its weights.
        whole = config.zero_stage == 0 or world_size == 1 or (config.zero_stage < 3 and not spec.trainable)
        owned = (0, spec.numel) if whole else spec.shard_range(rank, world_size)
        result.append(ChunkPlacement(sharded, weight_tier, state_tier, state_tier, owned, *precisions))
    return result


def fixed_tiers(specs: list[ChunkSpec], config: EngineConfig) -> tuple[list[Tier], list[Tier]]:
    """Of the weights and of the optimizer state of each chunk, given in execution order. Offloaded are the first ones:
    the last of the forward pass are the first of the backward pass, so that those cost no transfer when they stay."""
    kept, offloaded = {
        "device": (Tier.DEVICE, Tier.DEVICE),
        "host": (Tier.DEVICE, Tier.HOST),
        "nvme": (Tier.HOST, Tier.NVME),
    }[config.placement]
    weights = _first_fraction(specs, config.weight_offload_fraction, lambda spec: True)
    state = _first_fraction(specs, config.optimizer_offload_fraction, lambda spec: spec.trainable)
    return (
        [offloaded if index in weights else kept for index in range(len(specs))],
        [offloaded if index in state else kept for index in range(len(specs))],
    )


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


def disk_name(chunk_name: str, payload: Payload) -> str:
    """Of a payload's buffer on the drive: what its errors say."""
    return f"{payload.value} of {chunk_name}"


@dataclass(frozen=True)
class StoragePlan:
    """What one rank stores."""

    layout: Layout
    placements: list[ChunkPlacement]
    piece_numel: int
    """Of the ring that streams updates, 0 where nothing is on a drive."""
    staging_bytes: int
    """On the host."""
    device_ring: Ring = NO_RING
    """For what the device updates of the state on the host."""
    host_ring: Ring = NO_RING
    """For what the host updates of weights on the device, and of gradients there."""

    @property
    def uses_disk(self) -> bool:
        return self.piece_numel > 0

    def named_chunks(self) -> Iterator[tuple[str, ChunkSpec, ChunkPlacement]]:
        placements = iter(self.placements)
        for group in self.layout.groups:
            for number, spec in enumerate(group.chunks):
                yield f"{group.name}[{number}]", spec, next(placements)

    def at_rest(self) -> dict[Tier, Counter[Payload]]:
        """Bytes by tier and payload."""
        result: dict[Tier, Counter[Payload]] = {}
        for _, spec, placement in self.named_chunks():
            for (tier, payload), nbytes in placement.payload_bytes(spec).items():
                result.setdefault(tier, Counter())[payload] += nbytes
        if self.staging_bytes:
            result.setdefault(Tier.HOST, Counter())[Payload.STAGING] += self.staging_bytes
        for tier, ring in ((Tier.DEVICE, self.device_ring), (Tier.HOST, self.host_ring)):
            if ring.nbytes:
                result.setdefault(tier, Counter())[Payload.STAGING] += ring.nbytes
        return result

    def tier_bytes(self, tier: Tier) -> int:
        return sum(self.at_rest().get(tier, {}).values())

    @property
    def host_peak(self) -> int:
        """With the float32 sums of micro-batches, should there be any."""
        wide = sum(
            placement.owned_numel * 4
            for _, spec, placement in self.named_chunks()
            if spec.trainable and placement.gradient_tier is Tier.HOST and spec.dtype != torch.float32
        )
        return self.tier_bytes(Tier.HOST) + wide

    @property
    def slab_bytes(self) -> int:
        """Of what is at rest on the host; the drive's staging buffers are apart."""
        return self.tier_bytes(Tier.HOST) - self.staging_bytes

    def disk_sizes(self) -> dict[str, int]:
        """Bytes of each buffer on the drive, by name."""
        return {
            disk_name(name, payload): nbytes
            for name, spec, placement in self.named_chunks()
            for (tier, payload), nbytes in placement.payload_bytes(spec).items()
            if tier is Tier.NVME
        }
