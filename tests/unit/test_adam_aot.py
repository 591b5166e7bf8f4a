"""The Triton kernels compiled for GPUs that need not be there, and what their PTX says of rounding and memory."""

import re

import pytest
from adam_cases import FORMS
from megalith.kernels import adam_triton, sum_of_squares_triton
from megalith.kernels.adam_step import AdamScalars
from megalith.kernels.aot import ARCHITECTURES, compile_ahead
from megalith.kernels.moment_codes import CODE_BLOCK_NUMEL
from megalith.kernels.reference import SUM_BLOCK_NUMEL, SUM_LANES


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """So that every kernel is really compiled, and nothing is left in the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_adam(arch: int, form: str, grad: str, decoupled: bool, codes: bool = False):
    weight = {"float32": "*fp32", "split": "*i16", "master_bfloat16": "*i16", "master_float16": "*fp16"}[form]
    types = {
        "weight_ptr": weight,
        "grad_ptr": grad,
        **dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr", "factor_ptr", "found_inf_ptr"), "*fp32"),
        "numel": "i64",
        **dict.fromkeys(AdamScalars._fields, "fp32"),
    }
    absent = {"remainder_ptr": None, "master_ptr": None, "scales_ptr": None}
    if form == "split":
        types["remainder_ptr"] = "*i16"
        del absent["remainder_ptr"]
    elif form.startswith("master"):
        types["master_ptr"] = "*fp32"
        del absent["master_ptr"]
    if codes:
        types |= {"exp_avg_ptr": "*i8", "exp_avg_sq_ptr": "*u8", "scales_ptr": "*fp32"}
        del absent["scales_ptr"]
    constants = {
        **absent,
        "DECOUPLED": decoupled,
        "BLOCK_NUMEL": adam_triton.BLOCK_NUMEL,
        "CODE_BLOCK": CODE_BLOCK_NUMEL,
    }
    return compile_ahead(adam_triton.adam_kernel, arch, types, constants, **adam_triton.LAUNCH_OPTIONS)


def instructions(ptx: str) -> list[str]:
    """The opcodes of a PTX text, e.g. "mul.rn.f32"."""
    return re.findall(r"^\s+(?:@%?!?\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s", ptx, re.MULTILINE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_rounds_every_operation_once_and_moves_16_bytes_at_a_time(arch, form):
    # The gradient's dtype and the kind of Adam take turns, so that every one is compiled for some form.
    grad = ["*fp32", "*bf16", "*fp16", "*bf16"][FORMS.index(form)]
    compiled = compile_adam(arch, form, grad, decoupled=form != "master_float16")
    assert len(compiled.asm["cubin"]) > 0
    opcodes = instructions(compiled.asm["ptx"])
    arithmetic = [op for op in opcodes if re.match(r"(add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\..*f(16|32)", op)]
    kinds = {op.removesuffix("x2") for op in arithmetic}
    # .rn forbids the assembler to fuse a product with a sum; no .ftz keeps subnormals; .full and .approx are inexact.
    assert kinds == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
    # Besides the two scalars, every access is of 16 bytes.
    loads = [op for op in opcodes if op.startswith("ld.global")]
    stores = [op for op in opcodes if op.startswith("st.global")]
    assert sorted(set(loads)) == ["ld.global.b32", "ld.global.v4.b32"] and loads.count("ld.global.b32") == 2
    assert set(stores) == {"st.global.v4.b32"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_with_codes_rounds_every_operation_once(arch):
    opcodes = instructions(compile_adam(arch, "split", "*bf16", decoupled=True, codes=True).asm["ptx"])
    arithmetic = [op for op in opcodes if re.match(r"(add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\..*f(16|32)", op)]
    assert {op.removesuffix("x2") for op in arithmetic} == {
        "add.rn.f32",
        "sub.rn.f32",
        "mul.rn.f32",
        "div.rn.f32",
        "sqrt.rn.f32",
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sum_of_squares_adds_in_float64(arch):
    for pointer, square in (("*bf16", True), ("*fp64", False)):
        compiled = compile_ahead(
            sum_of_squares_triton.block_sums_kernel,
            arch,
            {"x_ptr": pointer, "sums_ptr": "*fp64", "numel": "i64"},
            {"SQUARE": square, "LANES": SUM_LANES, "ROWS": SUM_BLOCK_NUMEL // SUM_LANES},
            **sum_of_squares_triton.LAUNCH_OPTIONS,
        )
        opcodes = instructions(compiled.asm["ptx"])
        assert len(compiled.asm["cubin"]) > 0
        assert any(op in ("add.rn.f64", "add.f64") for op in opcodes)
        assert not [op for op in opcodes if re.match(r"(add|mul|fma)\..*f(16|32)", op)]
        assert {op for op in opcodes if op.startswith("ld.global")} <= {"ld.global.v4.b32", "ld.global.v2.b64"}
