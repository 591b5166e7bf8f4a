"""The compiled CPU kernels (cpu_adam.cpp): found beside this file, loaded with ctypes, called with raw pointers.

ctypes releases the interpreter's lock during a call, so that other lanes go on meanwhile.
"""

import ctypes
import functools
import importlib.machinery
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .adam_step import AdamScalars, AdamTensors

ABI = 2  # megalith_cpu_abi in cpu_adam.cpp
ISAS = ("baseline", "avx2", "avx512")  # in the order of Isa there
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
        [integer] * 2 + [pointer] * 6 + [int64, ctypes.POINTER(_Scalars)] + [integer] * 3
    )
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
    library().megalith_cpu_adam(
        form,
        _DTYPES.index(tensors.grad.dtype),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        tensors.weight.numel(),
        ctypes.byref(_Scalars(*scalars, factor)),
        decoupled,
        _isa_number(isa),
        torch.get_num_threads(),
    )


def sum_of_squares(x: Tensor, isa: str) -> Tensor:
    """Sum of the squares of a checked CPU tensor: float64 [1]. Raises ValueError for an `isa` that this CPU lacks."""
    total = torch.empty(1, dtype=torch.float64)
    library().megalith_cpu_sum_of_squares(
        _DTYPES.index(x.dtype), x.data_ptr(), x.numel(), total.data_ptr(), _isa_number(isa), torch.get_num_threads()
    )
    return total


def _isa_number(isa: str) -> int:
    if isa not in ISAS or ISAS.index(isa) > ISAS.index(best_isa()):
        raise ValueError(f"isa is {isa!r}, but this CPU's best is {best_isa()!r} of {ISAS}")
    return ISAS.index(isa)
