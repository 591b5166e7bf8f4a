"""Kernels: each has a CPU path, a Triton kernel, a plain-PyTorch oracle to which both are bit-identical, a benchmark."""

from .adam import fused_adam_
from .adam_step import AdamHyper
from .split_master import join_master, split_master
from .sum_of_squares import sum_of_squares

__all__ = [
    "AdamHyper",
    "fused_adam_",
    "join_master",
    "split_master",
    "sum_of_squares",
]
