"""Packed codes come back, lie where checkpoints of every kind have them, and zero-points survive both formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.kernels import pack_codes, pack_zeros, unpack_codes, unpack_zeros
from megalith.kernels.gptq_packing import BITS, packed_rows


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 130), st.integers(1, 5), st.integers(0, 99))
def test_codes_come_back(bits, count, columns, seed):
    codes = torch.randint(0, 1 << bits, (count, columns), generator=torch.Generator().manual_seed(seed))
    words = pack_codes(codes, bits)
    assert words.shape == (packed_rows(count, bits), columns)
    assert torch.equal(unpack_codes(words, bits, count), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_the_words_are_one_little_endian_stream(bits):
    codes = torch.randint(0, 1 << bits, (77, 1), generator=torch.Generator().manual_seed(0))
    stream = sum(int(code) << bits * k for k, code in enumerate(codes))
    words = [int(word) % (1 << 32) for word in pack_codes(codes, bits)[:, 0]]
    assert words == [stream >> 32 * w & 0xFFFFFFFF for w in range(len(words))]


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_come_back(bits, checkpoint_format):
    zeros = torch.arange(1, 1 << bits, dtype=torch.uint8).repeat(3, 2)[:, :37]
    qzeros = pack_zeros(zeros, bits, checkpoint_format)
    assert qzeros.shape == (3, packed_rows(zeros.shape[1], bits))
    assert torch.equal(unpack_zeros(qzeros, bits, zeros.shape[1], checkpoint_format), zeros)


def test_symmetric_words_are_those_of_the_two_formats():
    zeros = torch.full((1, 8), 8)
    assert pack_zeros(zeros, 4, "gptq").item() == 0x77777777
    assert pack_zeros(zeros, 4, "gptq_v2").item() == 0x88888888 - (1 << 32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_that_borrowed_from_its_neighbour_is_decoded(bits):
    """GPTQModel subtracts one from all fields of a word at once."""
    zeros = torch.tensor([[0, 1, 0, 3] * (8 // bits)], dtype=torch.uint8)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    written = pack_codes(zeros.T, bits).T - ones
    assert torch.equal(unpack_zeros(written, bits, zeros.shape[1], "gptq"), zeros)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pack_codes(torch.tensor([[16]]), 4), "codes reach from 16 to 16, but 4 bits hold 0 to 15"),
        (lambda: pack_codes(torch.tensor([[-1]]), 4), "codes reach from -1"),
        (lambda: pack_codes(torch.tensor([1]), 4), "codes have shape \\[1\\]"),
        (lambda: pack_codes(torch.tensor([[1]]), 5), "bits is 5"),
        (lambda: unpack_codes(torch.zeros(2, 3, dtype=torch.int32), 4, 17), "shape \\[3, N\\]"),
        (lambda: unpack_codes(torch.zeros(2, 3), 4, 16), "these are torch.float32"),
        (lambda: pack_zeros(torch.tensor([[0, 3]]), 4), "zero-point of 0 has no portable form"),
        (lambda: unpack_zeros(torch.zeros(1, 1, dtype=torch.int32), 4, 8, "marlin"), "checkpoint_format is 'marlin'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
