"""Kernels. Each has a Triton kernel, a CPU path, a plain-PyTorch oracle for both, and a benchmark."""

# Where the current folder is the repository, transformers finds this one as it looks for the PyPI package `kernels`: a
# second copy of the modules, which would register their operators again. It gets none.
if __name__ == "megalith.kernels":
    from .adam import fused_adam_
    from .adam_step import AdamHyper
    from .gptq import gptq_dequantize, gptq_matmul
    from .gptq_packing import pack_codes, pack_zeros, unpack_codes, unpack_zeros
    from .gptq_weight import GptqWeight, join_gptq_weights, prepare_gptq_weight
    from .split_master import join_master, split_master
    from .sum_of_squares import sum_of_squares

__all__ = [
    "AdamHyper",
    "GptqWeight",
    "fused_adam_",
    "gptq_dequantize",
    "gptq_matmul",
    "join_gptq_weights",
    "join_master",
    "pack_codes",
    "pack_zeros",
    "prepare_gptq_weight",
    "split_master",
    "sum_of_squares",
    "unpack_codes",
    "unpack_zeros",
]
