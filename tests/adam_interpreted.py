"""The Triton kernels in Triton's interpreter against the oracles, by bits. Run by tests/unit/test_adam_interpreter.py.

No test of the ordinary run, because the interpreter is chosen for a whole process, when Triton is imported.
"""

import os

assert os.environ["TRITON_INTERPRET"] == "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from adam_cases import ADAMW, DTYPES, FORMS, HYPERS, copy_of, differing, make_special_tensors, make_tensors, with_codes  # noqa: E402
from megalith.kernels.adam_triton import triton_adam_  # noqa: E402
from megalith.kernels.reference import (  # noqa: E402
    SUM_BLOCK_NUMEL,
    SUM_LANES,
    adam_reference_,
    sum_of_squares_reference,
)
from megalith.kernels.sum_of_squares_triton import triton_sum_of_squares  # noqa: E402

ONE, ZERO = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_bits_of_the_oracle(form, grad_dtype, kind):
    factor = torch.tensor([0.37])
    for numel in (1, 3, 1024, 4097):
        tensors = make_tensors(form, grad_dtype, numel)
        expected = copy_of(tensors)
        triton_adam_(tensors, HYPERS[kind], factor, ZERO)
        adam_reference_(expected, HYPERS[kind], factor, ZERO)
        assert differing(tensors, expected) == [], numel


@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities and NaN
def test_special_values_have_the_bits_of_the_oracle(form, kind):
    tensors = make_special_tensors(form, torch.float32)
    expected = copy_of(tensors)
    triton_adam_(tensors, HYPERS[kind], ONE, ZERO)
    adam_reference_(expected, HYPERS[kind], ONE, ZERO)
    assert differing(tensors, expected) == []


@pytest.mark.parametrize("form", FORMS)
def test_unaligned_views_are_updated_and_their_neighbours_are_not(form):
    tensors = make_tensors(form, torch.bfloat16, 1025, offset=3)
    expected = copy_of(tensors)
    triton_adam_(tensors, ADAMW, ONE, ZERO)
    adam_reference_(expected, ADAMW, ONE, ZERO)
    assert differing(tensors, expected) == []
    for tensor in tensors:
        if tensor is not None:
            assert not tensor._base[:3].any() and not tensor._base[-3:].any()


@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_codes_has_the_bits_of_the_oracle(form, kind):
    for numel in (1, 257, 4097):
        tensors = with_codes(make_tensors(form, torch.bfloat16, numel))
        expected = copy_of(tensors)
        triton_adam_(tensors, HYPERS[kind], torch.tensor([0.37]), ZERO)
        adam_reference_(expected, HYPERS[kind], torch.tensor([0.37]), ZERO)
        assert differing(tensors, expected) == [], numel


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities and NaN
def test_special_values_with_codes_have_the_bits_of_the_oracle():
    tensors = with_codes(make_special_tensors("float32", torch.float32))
    expected = copy_of(tensors)
    triton_adam_(tensors, ADAMW, ONE, ZERO)
    adam_reference_(expected, ADAMW, ONE, ZERO)
    assert differing(tensors, expected) == []


@pytest.mark.parametrize("flag", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_found_inf_leaves_every_tensor_as_it_was(form, flag):
    tensors = make_tensors(form, torch.float16, 1025)
    before = copy_of(tensors)
    triton_adam_(tensors, ADAMW, ONE, torch.tensor([flag]))
    assert differing(tensors, before) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_squares_has_the_bits_of_the_oracle(dtype):
    for numel in (1, SUM_LANES - 1, SUM_BLOCK_NUMEL, SUM_BLOCK_NUMEL + 1, 100_003):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(triton_sum_of_squares(x), sum_of_squares_reference(x)), numel
