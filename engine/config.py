"""The options of `initialize`, validated at once so that a mistake is an error before anything is allocated."""

import math
import os
import re
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch

from ..kernels import CODE_BLOCK_NUMEL

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Precision(Enum):
    """What a weight is stored as, and where its full-precision master is.

    FP32: the weight is the master. BF16: the weight is the high half of the master, whose low 16 bits are stored beside
    it (4 bytes a parameter in all). FP16: a float32 master beside a float16 weight, with dynamic loss scaling.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


class StatePrecision(Enum):
    """What Adam's moments are stored as. EXACT: float32. EIGHT_BIT: one byte each, with two float32 scales for every
    256 elements of a parameter (kernels/moment_codes.py)."""

    EXACT = "exact"
    EIGHT_BIT = "8bit"

    @property
    def slot_multiple(self) -> int:
        """Parameters start at multiples of this many elements, so that no two share a scale."""
        return 1 if self is StatePrecision.EXACT else CODE_BLOCK_NUMEL


def parse_bytes(value: int | str | None, field: str) -> int | None:
    """`"24GB"`, `"1.5 GiB"` or a count of bytes, as bytes. KB, MB, GB are decimal and KiB, MiB, GiB binary.

    Raises ValueError that names `field`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{field}={value!r}: give a number of bytes or a string such as '24GB'")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{field}={value!r}: give a number of bytes or a string such as '24GB' or '1.5GiB'")
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value <= 0:
        raise ValueError(f"{field}={value!r}: must be more than 0 bytes")
    return value


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is stored and trained. Every field is a keyword of `initialize`."""

    zero_stage: int = 3
    """0: everything replicated; 1: optimizer state sharded; 2: and gradients; 3: and weights."""
    placement: str = "device"
    """"device", "host" or "nvme": the tier of what is at rest. "auto": each chunk on the fastest that has room within
    the budgets, the drive taking part where `nvme_dir` is given; after the second step, what was measured to be spare
    on the device takes more of them, and gives them back after a step that needed more."""
    param_offload: float | None = None
    """Fraction of the weights at rest that is offloaded (stage 3): with placement="host" to the host, the rest staying
    on the device, and with "nvme" to the drive, the rest staying on the host. None: all that the stage allows."""
    optimizer_offload: float | None = None
    """The same fraction of the optimizer state. Its part of the step then runs on the host. None: all."""
    precision: str = "fp32"
    state_precision: str = "exact"
    """"exact": Adam's moments in float32. "8bit": in one byte each, 8 bytes of scales for 256 parameters beside them:
    of 12 bytes a parameter in bf16, 6.03 are left, and the same bits on every tier and at any number of ranks."""
    max_grad_norm: float | None = None
    """Global 2-norm that gradients are clipped to; None leaves them."""
    update_in_backward: bool = False
    """Update a chunk as soon as its gradients are complete, while the backward pass goes on: nothing of the step is
    left to do after it, and gradients are not kept. What is updated cannot be taken back. So a gradient that is not
    finite is an error of `step()` instead of skipping it, each backward pass needs its own `step()`, and the learning
    rates are those of the backward pass. Needs one rank, no max_grad_norm and another precision than fp16."""
    offload_activations: bool = False
    """Keep the saved inputs of checkpointed blocks on the host from the forward to the backward pass, copied out and
    back while blocks compute; the last block's stays. Needs activation checkpointing of the model's blocks, of either
    kind (`gradient_checkpointing_enable`, or torch.utils.checkpoint around each): where no block of a model in training
    is checkpointed, its forward pass raises RuntimeError. What blocks save without it, and logits, stays."""
    device_budget: int | str | None = None
    """Bytes of device memory for what the engine stores, activations not among it. In stage 3, weights stay gathered
    while they fit in it. With placement="auto", the first step that adds up micro-batches after two that did not may
    need more. None: with placement="auto", three tenths of a CPU's memory; of a GPU's, six tenths of what is free until
    the second step, then what activations leave. Where batches differ much in length, give a number."""
    host_budget: int | str | None = None
    """Bytes of host memory for what the engine stores, offloaded activations not among it. placement="nvme" keeps
    gradients there while they fit until the step, and else on the drive too; None: half of what this machine has free,
    nine tenths with a GPU."""
    nvme_dir: str | None = None
    """Folder of a local drive (placement="nvme" or "auto"). What is written there is gone when the process ends."""
    nvme_ring: int | str = "96MB"
    """Host memory through which optimizer state on the drive is streamed, in pieces of a third of it."""
    nvme_checksums: bool = False
    """Check what is read from the drive against a checksum taken when it was written."""
    max_chunk_numel: int = 2**26
    """A block with more parameters than this is stored in several chunks."""
    prefetch: int = 1
    """How many groups are gathered ahead of their use."""
    loss_scale: float | None = None
    """fp16 only: the first loss scale. None: 2**16."""
    timeout_s: float = 600.0
    """How long a rank waits for the others in a transfer before it raises."""
    seed: int = 0
    """For weights that the engine initialises itself (a model on meta without `pretrained`)."""

    def __post_init__(self) -> None:
        def reject(field: str, rule: str) -> None:
            raise ValueError(f"{field}={getattr(self, field)!r}: {rule}")

        def is_number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def is_whole(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        if not is_whole(self.zero_stage) or self.zero_stage not in (0, 1, 2, 3):
            reject("zero_stage", "must be 0, 1, 2 or 3")
        if self.placement not in ("device", "host", "nvme", "auto"):
            reject("placement", "must be 'device', 'host', 'nvme' or 'auto'")
        for field in ("param_offload", "optimizer_offload"):
            value = getattr(self, field)
            if value is None:
                continue
            if not is_number(value) or not 0 <= value <= 1:
                reject(field, "must be a fraction from 0 to 1")
            if value > 0 and self.placement not in ("host", "nvme"):
                reject(field, "needs placement='host' or 'nvme'")
        if self.param_offload and self.zero_stage != 3:
            reject(
                "param_offload", f"needs zero_stage=3, and it is {self.zero_stage}: stages below 3 keep whole weights"
            )
        if self.precision not in [member.value for member in Precision]:
            reject("precision", "must be 'fp32', 'bf16' or 'fp16'")
        if self.state_precision not in [member.value for member in StatePrecision]:
            reject("state_precision", "must be 'exact' or '8bit'")
        if self.max_grad_norm is not None and not (is_number(self.max_grad_norm) and self.max_grad_norm > 0):
            reject("max_grad_norm", "must be a number above 0, or None for no clipping")
        if not isinstance(self.update_in_backward, bool):
            reject("update_in_backward", "must be True or False")
        if not isinstance(self.offload_activations, bool):
            reject("offload_activations", "must be True or False")
        if self.update_in_backward and self.max_grad_norm is not None:
            reject("update_in_backward", "needs max_grad_norm=None: the norm of all gradients clips each of them")
        if self.update_in_backward and self.precision == Precision.FP16.value:
            reject("update_in_backward", "needs 'fp32' or 'bf16': dynamic loss scaling skips steps that overflow")
        for field in ("device_budget", "host_budget", "nvme_ring"):
            object.__setattr__(self, field, parse_bytes(getattr(self, field), field))
        if self.nvme_ring is None:
            reject("nvme_ring", "must be a number of bytes")
        if not isinstance(self.nvme_checksums, bool):
            reject("nvme_checksums", "must be True or False")
        if self.nvme_dir is not None and not isinstance(self.nvme_dir, str | os.PathLike):
            reject("nvme_dir", "must be the path of a folder")
        if self.nvme_dir is None and self.placement == "nvme":
            reject("nvme_dir", "placement='nvme' needs a folder on a local drive")
        if self.nvme_dir is not None and self.placement not in ("nvme", "auto"):
            reject("nvme_dir", "needs placement='nvme' or 'auto'")
        if not is_whole(self.max_chunk_numel) or self.max_chunk_numel < 1:
            reject("max_chunk_numel", "must be a whole number of parameters, at least 1")
        if not is_whole(self.prefetch) or self.prefetch < 0:
            reject("prefetch", "must be a whole number of groups, 0 for none")
        if not is_whole(self.seed):
            reject("seed", "must be a whole number")
        if not is_number(self.timeout_s) or self.timeout_s <= 0:
            reject("timeout_s", "must be a number of seconds above 0")
        if self.loss_scale is not None:
            if self.precision != Precision.FP16.value:
                reject("loss_scale", f"needs precision='fp16', and it is {self.precision!r}")
            if not is_number(self.loss_scale) or self.loss_scale <= 0:
                reject("loss_scale", "must be a number above 0")

    @classmethod
    def from_keywords(cls, **keywords) -> "EngineConfig":
        """Raises TypeError that names an unknown keyword and the known ones."""
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise TypeError(f"initialize() has no keyword {name!r}; it takes {', '.join(known)}")
        return cls(**keywords)

    @property
    def weight_offload_fraction(self) -> float:
        if self.placement == "device" or self.zero_stage != 3:
            return 0.0
        return 1.0 if self.param_offload is None else float(self.param_offload)

    @property
    def optimizer_offload_fraction(self) -> float:
        if self.placement == "device":
            return 0.0
        return 1.0 if self.optimizer_offload is None else float(self.optimizer_offload)

    @property
    def keeps_state_on_host(self) -> bool:
        """Some of the optimizer state may lie on the host."""
        fraction = self.optimizer_offload_fraction
        return {"device": False, "host": fraction > 0, "nvme": fraction < 1, "auto": True}[self.placement]


def check_folder(path: str | os.PathLike, field: str) -> str:
    """Raises FileNotFoundError that names `field` when `path` is not a folder."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{field}={os.fspath(path)!r}: no such folder")
    return os.fspath(path)
