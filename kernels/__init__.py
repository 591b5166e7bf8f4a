"""Kernels. Each has a Triton kernel, a CPU path, a plain-PyTorch oracle for both, and a benchmark."""

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
