"""Strategies by name: which engine options they stand for, and the process group that they run in."""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..engine import CheckpointError, EngineConfig, OutOfBudgetError
from ..engine.safetensors_io import SafetensorsFileError
from .errors import InputError, naming_input, nearest

STRATEGIES = {
    "naive": {"zero_stage": 0, "placement": "device"},
    "ddp": {"zero_stage": 0, "placement": "device"},
    "zero1": {"zero_stage": 1, "placement": "device"},
    "zero2": {"zero_stage": 2, "placement": "device"},
    "zero2_cpu": {"zero_stage": 2, "placement": "host"},
    "zero3": {"zero_stage": 3, "placement": "device"},
    "zero3_cpu": {"zero_stage": 3, "placement": "host"},
    "gemini": {"zero_stage": 3, "placement": "device"},
    "gemini_cuda": {"zero_stage": 3, "placement": "device"},
    "gemini_cpu": {"zero_stage": 3, "placement": "host"},
    "gemini_auto": {"zero_stage": 3, "placement": "auto"},
    "gemini_nvme": {"zero_stage": 3, "placement": "nvme"},
}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self):
        return self.rank == 0


def engine_options(strategy_args, device, max_grad_norm, seed):
    """Keywords of `engine.initialize` for the chosen strategy; a `colossalai_` prefix of its name is ignored.

    Raises InputError for an unknown name and for a value that the engine rejects.
    """
    name = strategy_args.strategy.removeprefix("colossalai_")
    if name not in STRATEGIES:
        raise InputError(
            f"--strategy {strategy_args.strategy}: unknown{nearest(name, STRATEGIES)} (known: {', '.join(STRATEGIES)})"
        )
    precision = strategy_args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    options = {
        **STRATEGIES[name],
        "precision": precision,
        "device_budget": strategy_args.device_budget,
        "host_budget": strategy_args.host_budget,
        "nvme_dir": strategy_args.nvme_dir,
        "state_precision": strategy_args.state_precision,
        "offload_activations": strategy_args.offload_activations,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
    }
    try:
        EngineConfig(**options)
    except ValueError as error:
        raise InputError(str(error)) from None
    return options


def split_budgets(options):
    """(what an engine.Manager takes of the keywords of `engine.initialize`, the rest)."""
    names = ("device_budget", "host_budget")
    budgets = {name: options.get(name) for name in names}
    return budgets, {name: value for name, value in options.items() if name not in names}


def choose_device(name):
    """The device of this rank for "auto", "cpu" or "cuda". Raises InputError for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank}, but there are {torch.cuda.device_count()} CUDA devices: start fewer processes"
        )
    return torch.device("cuda", local_rank)


def check_world_size(strategy_args):
    """`naive` is for one process. Raises InputError when torchrun has started more."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if strategy_args.strategy.removeprefix("colossalai_") == "naive" and world_size > 1:
        raise InputError(f"--strategy naive is for one process and there are {world_size}: use ddp")


def check_checkpointing(strategy_args, model_args):
    """Raises InputError for activations that go to the host where blocks do not compute again."""
    if strategy_args.offload_activations and not model_args.gradient_checkpointing:
        raise InputError("--offload_activations moves the inputs of checkpointed blocks: add --gradient_checkpointing")


@contextlib.contextmanager
def process_group(device):
    """Join the ranks that torchrun started, or be a group of one; yields Ranks and leaves the group at the end."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with naming_input(CheckpointError, OutOfBudgetError, SafetensorsFileError):
            yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
