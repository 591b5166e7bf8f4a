"""Tensors of every form of the fused Adam, and comparison by bits, for the tests of its implementations."""

import torch
from megalith.kernels import AdamHyper, encode_moment, scales_numel, split_master
from megalith.kernels.adam_step import AdamTensors

FORMS = ("float32", "split", "master_bfloat16", "master_float16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 4095, 4097, 100_003)
ADAMW = AdamHyper(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decoupled=True, step=3)
ADAM = AdamHyper(lr=1e-3, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.01, decoupled=False, step=1)
HYPERS = {"adamw": ADAMW, "adam": ADAM}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def make_tensors(form: str, grad_dtype: torch.dtype, numel: int, *, seed: int = 0, offset: int = 0) -> AdamTensors:
    """Random tensors of [numel] as after some steps, each a view that starts `offset` elements into its own buffer."""
    generator = torch.Generator().manual_seed(seed)
    master, grad, exp_avg, exp_avg_sq = (torch.randn(numel, generator=generator) for _ in range(4))
    return _place(form, master * 0.02, grad.to(grad_dtype), exp_avg * 0.1, exp_avg_sq.square() * 0.01, offset)


def make_special_tensors(form: str, grad_dtype: torch.dtype) -> AdamTensors:
    """Every combination of weight, gradient and moments among zeros, subnormals, huge values, infinities and NaN."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -3.0, 65504.0, 65519.9, 65520.0, 3.4e38, inf, -inf, nan]
    )
    moments = torch.tensor([0.0, 1e-45, 1e-39, 1.0, 3e38, inf])
    # A GPU's NaN, which would become -0 if it were rounded as if it were a number.
    moments = torch.cat([moments, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    # By index, since a copy of floats might not keep the bits of a NaN.
    grid = torch.cartesian_prod(*(torch.arange(len(axis)) for axis in (values, values, moments, moments)))
    index = grid.unbind(1)
    master, grad, exp_avg, exp_avg_sq = values[index[0]], values[index[1]], moments[index[2]], moments[index[3]]
    return _place(form, master, grad.to(grad_dtype), exp_avg, exp_avg_sq, offset=0)


def with_codes(tensors: AdamTensors) -> AdamTensors:
    """The same with 8-bit moments."""
    numel = tensors.weight.numel()
    scales = torch.zeros(scales_numel(numel))
    codes = {"exp_avg": torch.zeros(numel, dtype=torch.int8), "exp_avg_sq": torch.zeros(numel, dtype=torch.uint8)}
    for moment, values in codes.items():
        encode_moment(getattr(tensors, moment), moment, values, scales)
    return tensors._replace(**codes, scales=scales)


def copy_of(tensors: AdamTensors) -> AdamTensors:
    return AdamTensors(*(None if tensor is None else tensor.clone() for tensor in tensors))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, except that a NaN equals every other: their payloads differ between processors."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def differing(tensors: AdamTensors, expected: AdamTensors) -> list[str]:
    """The names of the tensors whose bits are not the expected ones."""
    return [
        name
        for name, tensor in tensors._asdict().items()
        if tensor is not None and not same_bits(tensor.cpu(), getattr(expected, name).cpu())
    ]


def _place(form, master, grad, exp_avg, exp_avg_sq, offset) -> AdamTensors:
    remainder = separate = None
    if form == "float32":
        weight = master
    elif form == "split":
        weight, remainder = split_master(master)
    else:
        separate, weight = master, master.to(torch.bfloat16 if form == "master_bfloat16" else torch.float16)
    tensors = (weight, grad, exp_avg, exp_avg_sq, remainder, separate)
    return AdamTensors(*(None if tensor is None else _shifted(tensor, offset) for tensor in tensors))


def _shifted(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    buffer = tensor.new_zeros(offset + tensor.numel() + offset)
    view = buffer[offset : offset + tensor.numel()]
    return view.copy_(tensor)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = tensor.view(_INTEGERS[tensor.element_size()])
    return integers.masked_fill(tensor.isnan(), -1) if tensor.is_floating_point() else integers
