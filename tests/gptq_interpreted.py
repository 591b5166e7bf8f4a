"""The Triton kernels of GPTQ in Triton's interpreter. Run by tests/unit/test_gptq_interpreter.py.

No test of the ordinary run, because the interpreter is chosen for a whole process, when Triton is imported.
"""

import os

assert os.environ["TRITON_INTERPRET"] == "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from gptq_cases import CASES, LIMITS, expected_product, make_weight, mean_relative_error  # noqa: E402
from megalith.kernels import gptq_triton  # noqa: E402
from megalith.kernels.gptq_triton import dense_matmul, dequantize_, fused_matmul, is_fusible  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

FUSIBLE = [case for case in CASES if is_fusible(make_weight(case)[0])]


@pytest.fixture(autouse=True)
def right_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as uint16. It multiplies those as the integers that they are, and truncates a
    float32 instead of rounding it."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *others):
        return dot(self, *(_as_float32(handle) for handle in (a, b)), *others)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.mark.parametrize("case", CASES)
def test_dequantized_weights_are_exact(case):
    weight, dense = make_weight(case, scale_dtype=torch.float32 if case == "plain" else torch.float16)
    for dtype, first in ((torch.float32, 0), (torch.float16, dense.shape[1] // 3)):
        out = torch.empty(dense.shape[0], dense.shape[1] - first, dtype=dtype)
        dequantize_(weight, out, first)
        assert torch.equal(out, dense[:, first:].to(dtype))


# bfloat16 differs where numbers are unpacked and rounded, not in what is masked.
HALVES = [(case, torch.float16) for case in FUSIBLE]
HALVES += [(case, torch.bfloat16) for case in ("plain", "asymmetric", "8_bits")]


@pytest.mark.parametrize("case, dtype", HALVES)
def test_fused_products_are_those_of_float32(case, dtype, monkeypatch):
    weight, dense = make_weight(case)
    for rows, programs in ((3, 768), (17, 12)) if case == "plain" else ((3, 5),):
        monkeypatch.setattr(gptq_triton, "PROGRAMS", programs)
        x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = fused_matmul(x, weight)
        assert y.dtype == dtype and y.shape == (rows, weight.out_features)
        error = mean_relative_error(y, expected_product(x, weight, dense))
        assert error < LIMITS[dtype], (rows, error)
        assert torch.equal(fused_matmul(x, weight), y)


@pytest.mark.parametrize("case", ["act_order", "3_bits"])
def test_dense_products_are_those_of_float32(case, monkeypatch):
    weight, dense = make_weight(case)
    monkeypatch.setattr(gptq_triton, "SCRATCH_BYTES", 4 * weight.in_features * 11)
    x = torch.randn(5, weight.in_features)
    assert mean_relative_error(dense_matmul(x, weight), expected_product(x, weight, dense)) < 1e-5


def test_most_weights_are_fusible():
    assert set(CASES) - set(FUSIBLE) == {"odd_group", "3_bits"}
