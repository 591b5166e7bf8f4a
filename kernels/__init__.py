"""Kernels. Each has a Triton kernel, a CPU path, a plain-PyTorch oracle for both, and a benchmark."""

from .adam import fused_adam_
from .adam_step import AdamHyper
from .gptq import gptq_dequantize, gptq_matmul
from .gptq_packing import pack_codes, pack_zeros, unpack_codes, unpack_zeros
from .gptq_weight import GptqWeight, join_gptq_weights, prepare_gptq_weight
from .moment_codes import CODE_BLOCK_NUMEL, CODE_DTYPES, decode_moment, encode_moment, scales_numel
from .rounding import descend_block, round_block
from .split_master import join_master, split_master
from .sum_of_squares import sum_of_squares

__all__ = [
    "CODE_BLOCK_NUMEL",
    "CODE_DTYPES",
    "AdamHyper",
    "GptqWeight",
    "decode_moment",
    "descend_block",
    "encode_moment",
    "fused_adam_",
    "gptq_dequantize",
    "gptq_matmul",
    "join_gptq_weights",
    "join_master",
    "pack_codes",
    "pack_zeros",
    "prepare_gptq_weight",
    "round_block",
    "scales_numel",
    "split_master",
    "sum_of_squares",
    "unpack_codes",
    "unpack_zeros",
]
