"""The Adam step on the CPU: the compiled kernel, or the oracle over blocks that stay in the cache."""

from torch import Tensor

from . import native
from .adam_step import AdamHyper, AdamTensors
from .reference import adam_reference_

_BLOCK_NUMEL = 1 << 18  # the fastest: temporaries stay in the last cache, and every operation has work for all threads


def cpu_adam_(tensors: AdamTensors, hyper: AdamHyper, factor: Tensor, found_inf: Tensor) -> None:
    """`fused_adam_` (see there) for checked CPU tensors, on `torch.get_num_threads()` threads."""
    if native.best_isa() == "torch":
        blocked_adam_(tensors, hyper, factor, found_inf)
    elif found_inf.item() == 0:
        native.adam_(tensors, hyper.scalars(), decoupled=hyper.decoupled, factor=factor.item(), isa=native.best_isa())


def blocked_adam_(tensors: AdamTensors, hyper: AdamHyper, factor: Tensor, found_inf: Tensor) -> None:
    """The same step in torch operations, block by block."""
    for part in tensors.by_grad():
        for start in range(0, part.weight.numel(), _BLOCK_NUMEL):
            adam_reference_(part.block(start, start + _BLOCK_NUMEL), hyper, factor, found_inf)
