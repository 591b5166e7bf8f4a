"""The compiled CPU kernels (cpu_*.cpp): found beside this file, loaded with ctypes, called with raw pointers.

ctypes releases the interpreter's lock during a call, so that other lanes go on meanwhile.
"""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .adam_step import AdamScalars, AdamTensors
from .gptq_weight import GptqWeight
from .moment_codes import CODE_BLOCK_NUMEL

ABI = 6  # megalith_cpu_abi in cpu_adam.cpp
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")  # in the order of Isa there
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of Dtype there
_FLOAT32, _SPLIT, _MASTER = 0, 1, {torch.bfloat16: 2, torch.float16: 3}  # Form there


class _Scalars(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in (*AdamScalars._fields, "factor")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after a warning, where there are none. Raises ImportError for a stale build."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_cpu" + suffix)
        if path.exists():
            break
    else:
        warnings.warn(
            "megalith's compiled CPU kernels are absent, so its CPU optimizer runs on torch operations, ten times "
            "slower: install a C++ compiler with OpenMP and then megalith again",
            stacklevel=2,
        )
        return None
    loaded = ctypes.CDLL(str(path))
    if loaded.megalith_cpu_abi() != ABI:
        raise ImportError(f"{path} has ABI {loaded.megalith_cpu_abi()}, but {ABI} is needed: build megalith again")
    pointer, int64, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.megalith_cpu_adam.argtypes = (
        [integer] * 2 + [pointer] * 7 + [int64, ctypes.POINTER(_Scalars)] + [integer] * 3
    )
    gptq = [integer, pointer, pointer, integer, pointer]
    loaded.megalith_cpu_gptq_dequantize.argtypes = (
        gptq + [pointer] + [int64] * 3 + [integer, pointer] + [int64] * 2 + [integer] * 2
    )
    loaded.megalith_cpu_round_block.argtypes = [pointer] * 6 + [int64] * 2 + [integer] * 4
    loaded.megalith_cpu_descend_block.argtypes = [pointer] * 5 + [int64] * 2 + [integer] * 3
    loaded.megalith_cpu_gptq_matmul.argtypes = gptq + [int64] * 3 + [pointer, integer, pointer, int64] + [integer] * 2
    loaded.megalith_cpu_sum_of_squares.argtypes = [integer, pointer, int64, pointer, integer, integer]
    return loaded


@functools.cache
def best_isa() -> str:
    """The instruction set that this machine's CPU kernels use: one of ISAS, or "torch" where they are absent."""
    return "torch" if library() is None else ISAS[library().megalith_cpu_isa()]


def adam_(tensors: AdamTensors, scalars: AdamScalars, *, decoupled: bool, factor: float, isa: str) -> None:
    """One Adam step over checked CPU tensors. Raises ValueError for an `isa` that this CPU lacks."""
    if tensors.remainder is not None:
        form = _SPLIT
    elif tensors.master is not None:
        form = _MASTER[tensors.weight.dtype]
    else:
        form = _FLOAT32
    call = library().megalith_cpu_adam
    after = (ctypes.byref(_Scalars(*scalars, factor)), decoupled, _isa_number(isa), torch.get_num_threads())
    # With the bytes that a block of codes takes: each has two scales.
    starts = [
        (0, 0) if t is None else (t.data_ptr(), 8 if t is tensors.scales else t.element_size() * CODE_BLOCK_NUMEL)
        for t in tensors._replace(grad=None)
    ]
    done_numel = 0
    for grad in tensors.grads:
        places = [address + done_numel * size // CODE_BLOCK_NUMEL or None for address, size in starts]
        places[1] = grad.data_ptr()
        call(form, _DTYPES.index(grad.dtype), *places, grad.numel(), *after)
        done_numel += grad.numel()


def sum_of_squares(tensors: Sequence[Tensor], isa: str) -> Tensor:
    """Sum of the squares of each checked CPU tensor: float64 [len(tensors)]. Raises ValueError for an `isa` that this
    CPU lacks."""
    totals = torch.zeros(len(tensors), dtype=torch.float64)
    call, after = library().megalith_cpu_sum_of_squares, (_isa_number(isa), torch.get_num_threads())
    for x, address in zip(tensors, range(totals.data_ptr(), totals.data_ptr() + totals.nbytes, 8), strict=True):
        if x.numel():
            call(_DTYPES.index(x.dtype), x.data_ptr(), x.numel(), address, *after)
    return totals


def gptq_dequantize_(weight: GptqWeight, out: Tensor, first_column: int, isa: str) -> None:
    """Write the columns from `first_column` on to contiguous CPU `out` [K, n], its rows in the order of the input."""
    library().megalith_cpu_gptq_dequantize(
        *_gptq_arguments(weight),
        None if weight.perm is None else weight.perm.data_ptr(),
        weight.in_features,
        weight.out_features,
        weight.group_size,
        _DTYPES.index(out.dtype),
        out.data_ptr(),
        first_column,
        out.shape[1],
        _isa_number(isa),
        torch.get_num_threads(),
    )


def gptq_matmul(x: Tensor, dtype: torch.dtype, weight: GptqWeight, isa: str) -> Tensor:
    """Contiguous float32 CPU x [M, K], in the order of the stored rows, times the weight without its bias: [M, N].

    The weight has 2, 4 or 8 bits, and one group or groups of whole words. x holds numbers of `dtype`.
    """
    y = torch.empty(len(x), weight.out_features)
    library().megalith_cpu_gptq_matmul(
        *_gptq_arguments(weight),
        weight.in_features,
        weight.out_features,
        weight.group_size,
        x.data_ptr(),
        _DTYPES.index(dtype),
        y.data_ptr(),
        len(x),
        _isa_number(isa),
        torch.get_num_threads(),
    )
    return y


def round_block(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, max_code: int, num_beams: int, isa: str
) -> tuple[Tensor, Tensor]:
    """`rounding.round_block` of contiguous float32 CPU tensors. Raises ValueError for an `isa` that this CPU lacks."""
    codes, errors = torch.empty(weight.shape, dtype=torch.uint8), torch.empty_like(weight)
    tensors = (weight, factor, scales, zeros, codes, errors)
    library().megalith_cpu_round_block(
        *(tensor.data_ptr() for tensor in tensors),
        *weight.shape,
        max_code,
        num_beams,
        _isa_number(isa),
        torch.get_num_threads(),
    )
    return codes, errors


def descend_block(gradient: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, max_code: int, isa: str) -> Tensor:
    """`rounding.descend_block` of contiguous CPU tensors. Raises ValueError for an `isa` that this CPU lacks."""
    change = torch.empty_like(gradient)
    tensors = (gradient, hessian, scales, codes, change)
    library().megalith_cpu_descend_block(
        *(tensor.data_ptr() for tensor in tensors), *gradient.shape, max_code, _isa_number(isa), torch.get_num_threads()
    )
    return change


def _gptq_arguments(weight: GptqWeight) -> tuple:
    return (
        weight.bits,
        weight.qweight.data_ptr(),
        weight.scales.data_ptr(),
        weight.scales.dtype == torch.float16,
        None if weight.zeros is None else weight.zeros.data_ptr(),
    )


def _isa_number(isa: str) -> int:
    if isa not in ISAS or ISAS.index(isa) > ISAS.index(best_isa()):
        raise ValueError(f"isa is {isa!r}, but this CPU's best is {best_isa()!r} of {ISAS}")
    return ISAS.index(isa)
