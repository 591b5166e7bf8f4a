"""The Adam step as one Triton launch over a flat shard."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam_step import AdamHyper, AdamTensors
from .moment_codes import CODE_BLOCK_NUMEL

BLOCK_NUMEL = 1024
# Without fusion, since a fused multiply-add rounds once where the CPU's two operations round twice. Four warps of eight
# elements a thread: 16-byte accesses to the halves and pairs of them to the float32 tensors.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _bfloat16_nearest_even(bits):
    """The int16 pattern of the bfloat16 nearest to a float32's int32 `bits`. In integers, because Triton's interpreter
    rounds a cast to bfloat16 wrongly."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(_is_nan(bits), 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _decode(m_code, v_code, m_scale, v_scale):
    """moment_codes.py has the form and its reasons."""
    m = tl.abs(m_code.to(tl.float32)) * (1.0 / 127)
    m = (m * m) * m_scale
    v = v_code.to(tl.float32) * (1.0 / 255)
    v = v * v
    return tl.where(m_code < 0, -m, m), (v * v) * v_scale


@triton.jit
def _scale(values, mask, CODE_BLOCK: tl.constexpr):
    """For each element the largest magnitude in its block, by bits."""
    BLOCKS: tl.constexpr = values.numel // CODE_BLOCK
    bits = tl.where(mask, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    most = tl.max(tl.reshape(bits, (BLOCKS, CODE_BLOCK)), axis=1, keep_dims=True)
    most = tl.reshape(tl.broadcast_to(most, (BLOCKS, CODE_BLOCK)), (values.numel,))
    return most.to(tl.float32, bitcast=True)


@triton.jit
def _fraction(values, scale):
    fraction = tl.div_rn(tl.abs(values), tl.where(scale == 0, 1.0, scale))
    return tl.where(fraction <= 1, fraction, 1.0)


@triton.jit
def adam_kernel(
    weight_ptr,  # a bfloat16 weight is passed as its int16 patterns
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    remainder_ptr,  # None without a split master
    master_ptr,  # None without a separate master
    scales_ptr,  # None where the moments are float32, else they are codes
    factor_ptr,
    found_inf_ptr,
    numel,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    decay,
    step_size,
    inverse_sqrt_bias2,
    eps,
    DECOUPLED: tl.constexpr,
    BLOCK_NUMEL: tl.constexpr,
    CODE_BLOCK: tl.constexpr,
):
    if tl.load(found_inf_ptr) != 0:
        return
    # int64, because a shard may have more than 2 ** 31 elements.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_NUMEL + tl.arange(0, BLOCK_NUMEL)
    mask = offsets < numel

    if remainder_ptr is not None:
        high = tl.load(weight_ptr + offsets, mask=mask).to(tl.int32)
        low = tl.load(remainder_ptr + offsets, mask=mask).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    elif master_ptr is not None:
        w = tl.load(master_ptr + offsets, mask=mask)
    else:
        w = tl.load(weight_ptr + offsets, mask=mask)
    g = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32) * tl.load(factor_ptr)
    m = tl.load(exp_avg_ptr + offsets, mask=mask)
    v = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
    if scales_ptr is not None:
        of_block = scales_ptr + offsets // CODE_BLOCK * 2
        m, v = _decode(m, v, tl.load(of_block, mask=mask), tl.load(of_block + 1, mask=mask))

    if DECOUPLED:
        w = w * decay
    else:
        g = g + w * decay
    m = (m - m * one_minus_beta1) + g * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    denominator = tl.sqrt_rn(v) * inverse_sqrt_bias2 + eps
    w = w - tl.div_rn(m * step_size, denominator)

    if scales_ptr is not None:
        m_scale, v_scale = _scale(m, mask, CODE_BLOCK), _scale(v, mask, CODE_BLOCK)
        m_code = (tl.sqrt_rn(_fraction(m, m_scale)) * 127.0 + 0.5).to(tl.int32)
        v_code = (tl.sqrt_rn(tl.sqrt_rn(_fraction(v, v_scale))) * 255.0 + 0.5).to(tl.int32)
        tl.store(exp_avg_ptr + offsets, tl.where(m < 0, -m_code, m_code).to(tl.int8), mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, tl.where(v > 0, tl.maximum(v_code, 1), v_code).to(tl.uint8), mask=mask)
        first = mask & (offsets % CODE_BLOCK == 0)
        tl.store(scales_ptr + offsets // CODE_BLOCK * 2, m_scale, mask=first)
        tl.store(scales_ptr + offsets // CODE_BLOCK * 2 + 1, v_scale, mask=first)
    else:
        tl.store(exp_avg_ptr + offsets, m, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
    if remainder_ptr is not None:
        bits = w.to(tl.int32, bitcast=True)
        high = tl.where(_is_nan(bits), 0x7FC0, (bits + 0x8000) >> 16)
        low = tl.where(_is_nan(bits), 0, bits)
        tl.store(weight_ptr + offsets, high.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + offsets, low.to(tl.int16), mask=mask)
    elif master_ptr is not None:
        tl.store(master_ptr + offsets, w, mask=mask)
        if weight_ptr.dtype.element_ty == tl.int16:
            tl.store(weight_ptr + offsets, _bfloat16_nearest_even(w.to(tl.int32, bitcast=True)), mask=mask)
        else:
            tl.store(weight_ptr + offsets, w.to(tl.float16), mask=mask)
    else:
        tl.store(weight_ptr + offsets, w, mask=mask)


def triton_adam_(tensors: AdamTensors, hyper: AdamHyper, factor: Tensor, found_inf: Tensor) -> None:
    """`fused_adam_` (see there) for checked tensors on the current stream of their device."""
    weight = tensors.weight
    if weight.dtype == torch.bfloat16:
        weight = weight.view(torch.int16)
    with torch.cuda.device_of(weight):
        adam_kernel[(triton.cdiv(weight.numel(), BLOCK_NUMEL),)](
            weight,
            *tensors[1:],
            factor,
            found_inf,
            weight.numel(),
            *hyper.scalars(),
            DECOUPLED=hyper.decoupled,
            BLOCK_NUMEL=BLOCK_NUMEL,
            CODE_BLOCK=CODE_BLOCK_NUMEL,
            **LAUNCH_OPTIONS,
        )
