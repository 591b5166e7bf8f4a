"""Models that answer with more weights than the device holds: the engine fetches each block while the one before it
computes."""

import os

import torch
from torch import nn

from .. import engine
from .errors import InputError

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def offload(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    device_budget: int | str,
    nvme_dir: str | os.PathLike | None = None,
    pretrained: str | os.PathLike | None = None,
) -> nn.Module:
    """The same model, whose frozen weights lie on the host, or in a file in `nvme_dir`.

    `device_budget` (bytes, or a size such as "6GB") is what weights may take on `device`, those of the blocks that are
    being used and fetched included; those for which there is room stay. Weights on meta are read from the folder
    `pretrained`. Floating-point ones become `dtype`, and integers stay what they are. Raises InputError where the
    budget does not hold a block and its neighbours, or the drive not the weights.
    """
    model.requires_grad_(False)
    options = {"zero_stage": 3, "precision": _PRECISIONS[dtype], "device_budget": device_budget, "placement": "host"}
    if nvme_dir is not None:
        options |= {"placement": "nvme", "nvme_dir": os.fspath(nvme_dir)}
    try:
        plan = engine.plan(model, None, **options)
        least, budget = plan.gathered_peak_bytes, plan.config.device_budget
        if least > budget:
            raise ValueError(
                f"the weights that are on the device at the same time, those of a block and its neighbours, take up to "
                f"{least} bytes, and {budget} are given"
            )
        engine.initialize(model, None, **options, pretrained=pretrained, device=device)
    except (ValueError, engine.OutOfBudgetError, engine.NvmeError) as error:
        raise InputError(f"--device_budget {device_budget}: {error}") from None
    return model
