"""Weights quantised by GPTQ: dequantised, and multiplied with.

Both are custom operators, `torch.ops.megalith.gptq_dequantize` and `gptq_matmul`, so that torch.compile takes them as
they are and CUDA graphs capture them. Gradients flow to x, and to nothing else.
"""

import torch
from torch import Tensor

from .gptq_weight import GptqWeight

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm"
_NUMBERS = "int bits, int group_size, int in_features"


def gptq_dequantize(weight: GptqWeight, dtype: torch.dtype) -> Tensor:
    """The weight as `dtype` (float32, bfloat16 or float16): [K, N], its rows in the order of the input.

    Computed in float32 and rounded once. Raises ValueError for another dtype.
    """
    if dtype not in _ACTIVATIONS:
        raise ValueError(f"dtype is {dtype}, but gptq_dequantize makes {', '.join(map(str, _ACTIVATIONS))}")
    return _operators.gptq_dequantize(
        weight.qweight,
        weight.scales,
        weight.zeros,
        weight.perm,
        weight.bits,
        weight.group_size,
        weight.in_features,
        dtype,
    )


def gptq_matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """x [..., K] (float32, bfloat16 or float16) times the weight, plus its bias: [..., N] of x's dtype.

    Summed in float32. The same input has the same bits in every call on one machine. Weights up to a bounded number of
    rows of x are read as they are; for more they are dequantised, at most 64 MiB at a time. Raises ValueError for
    another dtype, a last dimension that is not K, or tensors on different devices.
    """
    if x.dtype not in _ACTIVATIONS:
        raise ValueError(f"x is {x.dtype}, but gptq_matmul takes {', '.join(map(str, _ACTIVATIONS))}")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has shape {list(x.shape)}, but the weight takes {weight.in_features} input features")
    if x.device != weight.qweight.device:
        raise ValueError(f"x is on {x.device}, but the weight on {weight.qweight.device}")
    return _operators.gptq_matmul(
        x,
        weight.qweight,
        weight.scales,
        weight.zeros,
        weight.perm,
        weight.bias,
        weight.bits,
        weight.group_size,
        weight.in_features,
    )


def _dequantize(qweight, scales, zeros, perm, bits, group_size, in_features, dtype):
    weight = GptqWeight(qweight, scales, zeros, perm, None, bits, group_size, in_features)
    out = torch.empty(in_features, weight.out_features, dtype=dtype, device=qweight.device)
    _implementation(qweight).dequantize_(weight, out, first_column=0)
    return out


def _matmul(x, qweight, scales, zeros, perm, bias, bits, group_size, in_features):
    weight = GptqWeight(qweight, scales, zeros, perm, bias, bits, group_size, in_features)
    y = _implementation(qweight).matmul(x.reshape(-1, in_features).contiguous(), weight)
    return y.view(*x.shape[:-1], weight.out_features)


def _implementation(tensor: Tensor):
    """The module that works on the device of `tensor`."""
    if tensor.device.type == "cpu":
        from . import cpu_gptq

        return cpu_gptq
    # Here, because a machine without CUDA need not load Triton.
    from . import gptq_triton

    return gptq_triton


def _fake_dequantize(qweight, scales, zeros, perm, bits, group_size, in_features, dtype):
    return qweight.new_empty(in_features, qweight.shape[1], dtype=dtype)


def _fake_matmul(x, qweight, scales, zeros, perm, bias, bits, group_size, in_features):
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


def _save_for_backward(ctx, inputs, output):
    _x, *tensors, _bias, bits, group_size, in_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = bits, group_size, in_features


def _matmul_backward(ctx, grad):
    """d(x @ W) / dx; the weight is constant."""
    dense = _operators.gptq_dequantize(*ctx.saved_tensors, *ctx.numbers, grad.dtype)
    return (grad @ dense.T, *[None] * 8)


# "megalith". From the repository's root, transformers imports this folder a second time, as the package `kernels` that
# it looks for, and a namespace can be defined once alone.
_namespace = __name__.partition(".")[0]
_operators = getattr(torch.ops, _namespace)
_library = torch.library.Library(_namespace, "DEF")
_library.define(f"gptq_dequantize({_TENSORS}, {_NUMBERS}, ScalarType dtype) -> Tensor")
_library.define(f"gptq_matmul(Tensor x, {_TENSORS}, Tensor? bias, {_NUMBERS}) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("gptq_dequantize", _dequantize, _key)
    _library.impl("gptq_matmul", _matmul, _key)
torch.library.register_fake(f"{_namespace}::gptq_dequantize", _fake_dequantize, lib=_library)
torch.library.register_fake(f"{_namespace}::gptq_matmul", _fake_matmul, lib=_library)
torch.library.register_autograd(
    f"{_namespace}::gptq_matmul", _matmul_backward, setup_context=_save_for_backward, lib=_library
)
