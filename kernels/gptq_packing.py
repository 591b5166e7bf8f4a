"""Integer codes packed into int32 words, as GPTQ checkpoints store them.

Codes of b bits form one little-endian stream a column: code k takes the bits k * b to k * b + b - 1 of it, and word w
holds the bits 32 * w to 32 * w + 31. With 2, 4 and 8 bits a word holds whole codes, the first in its lowest bits; with
3 bits, 32 codes fill three words, and the codes 10 and 21 of them lie across two. `qweight` is packed along the input,
`qzeros` along the output.

A checkpoint of format "gptq" (v1) stores each zero-point less one, one of "gptq_v2" the zero-point itself.
"""

import math

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def packed_rows(count: int, bits: int) -> int:
    """How many int32 words hold `count` codes."""
    return -(-count * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [K, N] of any integer dtype, each in [0, 2 ** bits), to int32 words [packed_rows(K, bits), N].

    Raises ValueError for codes out of range or bits other than 2, 3, 4 and 8.
    """
    _check_bits(bits)
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {list(codes.shape)}, but [K, N] is needed")
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"codes reach from {low} to {high}, but {bits} bits hold 0 to {(1 << bits) - 1}")
    words = torch.zeros(packed_rows(len(codes), bits), codes.shape[1], dtype=torch.int32, device=codes.device)
    for rows, low, high, shift in _places(len(codes), bits):
        values = codes[rows].int()
        words[low] |= values << shift
        if high is not None:
            words[high] |= values >> 32 - shift
    return words


def unpack_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_codes`: int32 words [packed_rows(count, bits), N] to uint8 codes [count, N].

    Raises ValueError for words of another dtype or shape, or bits other than 2, 3, 4 and 8.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2 or len(words) != packed_rows(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits are int32 words of shape [{packed_rows(count, bits)}, N], "
            f"but these are {words.dtype} of shape {list(words.shape)}"
        )
    codes = torch.empty(count, words.shape[1], dtype=torch.uint8, device=words.device)
    for rows, low, high, shift in _places(count, bits):
        values = words[low] >> shift
        if high is not None:
            values = (values & (1 << 32 - shift) - 1) | words[high] << 32 - shift
        codes[rows] = values & (1 << bits) - 1
    return codes


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str = "gptq") -> Tensor:
    """Zero-points [G, N], each in [0, 2 ** bits), to `qzeros`: int32 [G, packed_rows(N, bits)].

    Readers disagree about a v1 zero-point of 0, which is stored as -1: raises ValueError for one, and for an unknown
    format.
    """
    if _stored_less_one(checkpoint_format):
        if zeros.numel() and int(zeros.min()) == 0:
            raise ValueError("a zero-point of 0 has no portable form in format gptq: make it 1, or use gptq_v2")
        zeros = zeros.int() - 1
    return pack_codes(zeros.T, bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, count: int, checkpoint_format: str = "gptq") -> Tensor:
    """`qzeros`, int32 [G, packed_rows(N, bits)] with N = `count`, to zero-points: uint8 [G, N].

    GPTQModel writes v1 by subtracting one from every field of a whole word at once, so that a zero-point of 0 borrows
    from the field above. The same constant is added to the whole word here, which undoes that exactly. With 3 bits it
    works field by field, modulo 8.
    """
    stored_less_one = _stored_less_one(checkpoint_format)
    if stored_less_one and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = qzeros + ones  # modulo 2 ** 32
    zeros = unpack_codes(qzeros.T.contiguous(), bits, count).T.contiguous()
    return (zeros + 1) & 7 if stored_less_one and bits == 3 else zeros


def _places(count: int, bits: int):
    """Where the codes 0 to count - 1 lie, those at one place of a word together: (the codes, the words with their
    lowest bits, the words with their highest bits if those are others, the shift in the former), slices all."""
    period_words = bits // math.gcd(bits, 32)
    period = 32 * period_words // bits
    for first in range(min(period, count)):
        repeats = len(range(first, count, period))
        word, shift = divmod(first * bits, 32)
        span = (repeats - 1) * period_words + 1
        low = slice(word, word + span, period_words)
        high = slice(word + 1, word + 1 + span, period_words) if shift + bits > 32 else None
        yield slice(first, count, period), low, high, shift


def _stored_less_one(checkpoint_format: str) -> bool:
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}, but has to be gptq or gptq_v2")
    return checkpoint_format == "gptq"


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, but has to be one of {BITS}")
