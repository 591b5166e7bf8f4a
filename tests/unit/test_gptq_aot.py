"""The Triton kernels of GPTQ compiled for GPUs that need not be there, and what their PTX says of the inner loop."""

import re

import pytest
from megalith.kernels import gptq_triton
from megalith.kernels.aot import ARCHITECTURES, compile_ahead

HALVES = {"fp16": "f16", "bf16": "bf16"}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """So that every kernel is really compiled, and nothing is left in the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


OPTIONS = gptq_triton.LAUNCH_OPTIONS


def compile_product(arch, half, bits, *, rows, columns, group_a_block, zeros):
    tile_rows, tile_columns, warps, stages = gptq_triton.configuration(rows, columns)
    types = {
        "x_ptr": f"*{half}",
        "sums_ptr": "*fp32",
        "qweight_ptr": "*i32",
        "scales_ptr": "*fp16",
        "parts_ptr": "*fp32",
        **dict.fromkeys(("rows", "out_features", "group_size", "word_rows", "blocks"), "i32"),
    }
    constants = {
        "BITS": bits,
        "WORD_ROWS": gptq_triton.WORD_ROWS,
        "GROUP_A_BLOCK": group_a_block,
        "EVEN_K": group_a_block,
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
    }
    if zeros:
        types["zeros_ptr"] = "*u8"
    else:
        constants["zeros_ptr"] = None
    kernel = gptq_triton.product_kernel
    options = {"num_warps": warps, "num_stages": stages, **OPTIONS}
    return compile_ahead(kernel, arch, types, constants, **options)


@pytest.mark.parametrize("half, columns", [("fp16", 4096), ("bf16", 22016)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_four_bits_reach_the_tensor_cores_without_a_conversion(arch, half, columns):
    compiled = compile_product(arch, half, 4, rows=1, columns=columns, group_a_block=True, zeros=half == "bf16")
    assert len(compiled.asm["cubin"]) > 0
    ptx = compiled.asm["ptx"]
    # The words come through the asynchronous pipeline and lie as the tensor cores want them before they are unpacked.
    assert "cp.async.c" in ptx
    assert f"m16n8k16.row.col.f32.{HALVES[half]}.{HALVES[half]}.f32" in ptx
    loop = ptx[: ptx.rindex("mma.sync")]
    assert not re.findall(rf"cvt\S*\.{HALVES[half]}\.[su]\d+|cvt\S*\.f32\.[su]32", loop[loop.index("mma.sync") :])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_forms_compile(arch):
    # What is not the fast path takes turns: bits, groups within a block, zero-points, tails, larger tiles.
    bits, half, rows = {80: (2, "fp16", 1), 90: (4, "fp16", 64), 100: (8, "bf16", 32)}[arch]
    assert compile_product(arch, half, bits, rows=rows, columns=4096, group_a_block=False, zeros=True).asm["cubin"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_other_kernels_compile(arch):
    integers = dict.fromkeys(("in_features", "out_features", "group_size", "first_column", "columns"), "i32")
    pointers = {
        "qweight_ptr": "*i32",
        "scales_ptr": "*fp16",
        "zeros_ptr": "*u8",
        "perm_ptr": "*i32",
        "out_ptr": "*bf16",
    }
    tile = {"ROWS": gptq_triton.DEQUANTIZE_ROWS, "COLUMNS": gptq_triton.DEQUANTIZE_COLUMNS}
    for bits in (3, 4):
        compile_ahead(gptq_triton.dequantize_kernel, arch, {**pointers, **integers}, {"BITS": bits, **tile}, **OPTIONS)
    arrange = {"x_ptr": "*fp16", "perm_ptr": "*i32", "arranged_ptr": "*fp16", "sums_ptr": "*fp32"}
    counts = {"in_features": "i32", "blocks": "i32"}
    constants = {"FIELDS": 8, "WORD_ROWS": gptq_triton.WORD_ROWS}
    compile_ahead(gptq_triton.arrange_kernel, arch, {**arrange, **counts}, constants, num_warps=1, **OPTIONS)
    reduce = {"parts_ptr": "*fp32", "bias_ptr": "*fp16", "y_ptr": "*bf16"}
    counts = {"numel": "i32", "out_features": "i32", "splits": "i32"}
    compile_ahead(gptq_triton.reduce_kernel, arch, {**reduce, **counts}, {"BLOCK": 256}, **OPTIONS)
