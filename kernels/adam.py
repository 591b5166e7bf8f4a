"""Fused Adam over a flat shard: unscale, clip, update and the write of the compute weight in one pass over memory."""

import torch
from torch import Tensor

from .adam_step import AdamHyper, AdamTensors
from .cpu_adam import cpu_adam_
from .moment_codes import CODE_BLOCK_NUMEL, CODE_DTYPES, scales_numel

_HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def fused_adam_(
    weight: Tensor,
    grad: Tensor | tuple[Tensor, ...],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: AdamHyper,
    *,
    factor: Tensor,
    found_inf: Tensor,
    remainder: Tensor | None = None,
    master: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """One step of Adam or AdamW, in place, on the device of the tensors.

    All tensors are one-dimensional, contiguous, of equal numel and on one CPU or CUDA device; they may be views of a
    larger buffer at any offset. `grad` is float32, bfloat16 or float16, and may be several tensors that follow each
    other, as autograd leaves them; the moments are float32, or with `scales` (float32 [scales_numel(numel)]) int8 and
    uint8 codes, whose form moment_codes.py tells. What else is given says where the float32 master of the weight is:

    - float32 `weight` alone: the weight is the master;
    - bfloat16 `weight` and int16 `remainder`: its two halves, as `split_master` makes them;
    - bfloat16 or float16 `weight` and float32 `master`: the weight is overwritten by the rounded master.

    `factor` (float32 [1], the same device) multiplies the gradient once that is float32: 1 / loss scale, the clipping
    coefficient and 1 / accumulation steps. With a `found_inf` (float32 [1], the same device) that is not zero nothing
    is written. On CUDA both are read by the kernel, so that the host never waits.

    The result has the same bits on every device, with any number of threads, and however the shard was cut (with codes,
    at multiples of their blocks). Tensors on meta are checked, and nothing is done. Raises ValueError that names
    the tensor of a wrong dtype, shape, device or layout.
    """
    tensors = AdamTensors(weight, grad, exp_avg, exp_avg_sq, remainder, master, scales)
    _check(tensors, factor, found_inf)
    if weight.numel() == 0 or weight.is_meta:
        return
    if weight.device.type == "cpu":
        cpu_adam_(tensors, hyper, factor, found_inf)
    else:
        # Here, because a machine without CUDA need not load Triton.
        from .adam_triton import triton_adam_

        for part in tensors.by_grad():
            triton_adam_(part, hyper, factor, found_inf)


def _check(tensors: AdamTensors, factor: Tensor, found_inf: Tensor) -> None:
    weight = tensors.weight
    if weight.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"weight is on {weight.device}, but the fused Adam runs on cpu and cuda")
    if tensors.remainder is not None and tensors.master is not None:
        raise ValueError("remainder and master are both given: pass the remainder of a split master or a whole master")
    if tensors.remainder is not None:
        weight_dtypes = (torch.bfloat16,)
    elif tensors.master is not None:
        weight_dtypes = _HALVES
    else:
        weight_dtypes = (torch.float32,)
    accepted = {
        "weight": weight_dtypes,
        "exp_avg": (torch.float32,),
        "exp_avg_sq": (torch.float32,),
        "remainder": (torch.int16,),
        "master": (torch.float32,),
    }
    if tensors.scales is not None:
        accepted |= {name: (dtype,) for name, dtype in CODE_DTYPES.items()}
        _check_tensor("scales", tensors.scales, (torch.float32,), scales_numel(weight.numel()), weight.device)
        if any(grad.numel() % CODE_BLOCK_NUMEL for grad in tensors.grads[:-1]):
            raise ValueError(f"grad is cut within a block of {CODE_BLOCK_NUMEL} elements, whose moments share a scale")
    if isinstance(tensors.grad, tuple):
        grad_numel = sum(grad.numel() for grad in tensors.grad)
        if grad_numel != weight.numel():
            raise ValueError(f"grad has {grad_numel} elements, but {weight.numel()} are needed")
    for grad in tensors.grads:
        numel = grad.numel() if isinstance(tensors.grad, tuple) else weight.numel()
        _check_tensor("grad", grad, (torch.float32, *_HALVES), numel, weight.device)
    for name, tensor in tensors._replace(grad=None, scales=None)._asdict().items():
        if tensor is not None:
            _check_tensor(name, tensor, accepted[name], weight.numel(), weight.device)
    _check_tensor("factor", factor, (torch.float32,), 1, weight.device)
    _check_tensor("found_inf", found_inf, (torch.float32,), 1, weight.device)


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple, numel: int, device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, but this form of Adam takes {' or '.join(map(str, dtypes))}")
    if tensor.shape != (numel,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but [{numel}] is needed")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the weight on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has stride {tensor.stride(0)}, but has to be contiguous")
