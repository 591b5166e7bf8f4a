"""Quantised weights of many kinds, and the measure of error, for the tests of the GPTQ kernels."""

import torch
from megalith.kernels import GptqWeight, pack_codes, prepare_gptq_weight

# bits, K, N, group_size, act_order, symmetric, with_bias: odd sizes, tails of words and groups, one group.
CASES = {
    "plain": (4, 256, 64, 128, False, True, False),
    "asymmetric": (4, 256, 72, 64, False, False, True),
    "wide": (4, 64, 1300, 32, False, False, False),
    "act_order": (4, 384, 40, 128, True, False, True),
    "one_group": (4, 200, 33, -1, False, False, False),
    "partial_group": (4, 320, 50, 128, True, True, True),
    "odd_group": (4, 91, 17, 20, False, False, False),
    "tiny": (4, 3, 1, 128, False, False, True),
    "2_bits": (2, 272, 30, 32, True, False, True),
    "3_bits": (3, 224, 37, 32, True, False, True),
    "8_bits": (8, 260, 45, 64, True, False, True),
}
# Mean relative error against float32, which each dtype has to keep: half of these is the rounding of the result.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def make_weight(
    case: str, *, scale_dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[GptqWeight, torch.Tensor]:
    """A random weight of this kind, and what it stands for, computed apart from the kernels: float32 [K, N]."""
    bits, in_features, out_features, group_size, act_order, symmetric, with_bias = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    rows_per_group = in_features if group_size == -1 else group_size
    groups = -(-in_features // rows_per_group)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 0.002).to(scale_dtype)
    zeros = torch.randint(0, 1 << bits, (groups, out_features), generator=generator).to(torch.uint8)
    if symmetric:
        zeros.fill_(1 << bits - 1)
    g_idx = torch.arange(in_features) // rows_per_group
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    weight = prepare_gptq_weight(
        pack_codes(codes, bits),
        scales,
        zeros,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        g_idx=g_idx,
        bias=torch.randn(out_features, generator=generator).half() if with_bias else None,
    )
    return weight, (codes - zeros.int()[g_idx]).float() * scales.float()[g_idx]


def expected_product(x: torch.Tensor, weight: GptqWeight, dense: torch.Tensor) -> torch.Tensor:
    """In float64: [..., N]."""
    y = x.double() @ dense.double()
    return y if weight.bias is None else y + weight.bias.double()


def mean_relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).abs().mean() / expected.abs().mean()).item()
