"""GPTQ weights on a GPU: dequantised, and multiplied with in tiles that are dequantised on the way to the tensor cores.

A product of few rows takes three launches, which depend on nothing but shapes, so that CUDA graphs capture them:

1. `arrange_kernel` permutes each row of x, and sums it block by block.
2. `product_kernel` multiplies: one program a tile of columns and a stretch of the input (split-K).
3. `reduce_kernel` adds the stretches up in their order, and the bias.

How the second unpacks: the 16 word rows of a block lie in a [16, N] tile as the tensor cores want their operand, and
`words >> (j * bits)`, masked and or-ed with the float16 pattern of 1024, *is* the pair of numbers 1024 + code for the
fields j and j + F / 2 of every word, F = 32 / bits, without a conversion (Kim et al. 2022, arXiv 2211.10017). Each such
pair holds two consecutive elements of the operand, so the first launch puts x into the same order. For bfloat16 the
offset is 128. Scale, zero-point and offset wait until the end of a group:

    y[m, n] = sum over groups of scale * (sum over k of x * (offset + code) - (offset + zero) * sum over k of x)

Configurations are fixed by a table: nothing is tuned during a request. They were chosen by counting instructions in
code compiled for sm_90, not yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gptq_weight import GptqWeight

WORD_ROWS = 16  # of a block: what the tensor cores take at once
# Rows of x up to which tiles are dequantised on the way; for more, the weight is dequantised first. On an H200, 32 rows
# of 4096 x 11008 take 34 us against 68, and 64 rows 92 against 69.
FUSED_ROWS = 32
SCRATCH_BYTES = 64 << 20  # of dequantised weight at a time
PROGRAMS = 768  # as many as keep a GPU of some 130 multiprocessors full
DEQUANTIZE_ROWS, DEQUANTIZE_COLUMNS = 32, 128
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def dequantize_kernel(
    qweight_ptr,
    scales_ptr,
    zeros_ptr,  # None: all are the middle
    perm_ptr,  # None: rows stay in their order
    out_ptr,
    in_features,
    out_features,
    group_size,
    first_column,
    columns,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n = first_column + at
    mask = (k < in_features)[:, None] & (at < columns)[None, :]
    word, shift = k * BITS // 32, k * BITS % 32
    codes = tl.load(qweight_ptr + word[:, None] * out_features + n[None, :], mask=mask, other=0) >> shift[:, None]
    if 32 % BITS != 0:
        # A code that lies across two words has its upper bits in the lowest ones of the next.
        across = mask & (shift + BITS > 32)[:, None]
        upper = tl.load(qweight_ptr + (word + 1)[:, None] * out_features + n[None, :], mask=across, other=0)
        below = 32 - shift
        codes = tl.where(across, (codes & ((1 << below) - 1)[:, None]) | (upper << below[:, None]), codes)
    of_group = (k // group_size)[:, None] * out_features + n[None, :]
    zero = 1 << BITS - 1
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + of_group, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + of_group, mask=mask, other=0.0).to(tl.float32)
    value = ((codes & (1 << BITS) - 1) - zero).to(tl.float32) * scale
    row = k
    if perm_ptr is not None:
        row = tl.load(perm_ptr + k, mask=k < in_features, other=0)
    out_at = row.to(tl.int64)[:, None] * columns + at[None, :]
    tl.store(out_ptr + out_at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def arrange_kernel(
    x_ptr, perm_ptr, arranged_ptr, sums_ptr, in_features, blocks, FIELDS: tl.constexpr, WORD_ROWS: tl.constexpr
):
    """One block of one row of x [M, K]: arranged [M, blocks * BLOCK] with zeros beyond K, and sums [M, blocks]."""
    BLOCK: tl.constexpr = WORD_ROWS * FIELDS
    m, block = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, BLOCK)
    # Element p of a block belongs to the pair `p // 2` of the product's operand: field j of word r, or j + FIELDS / 2.
    j, r, upper = p // (2 * WORD_ROWS), p // 2 % WORD_ROWS, p % 2
    k = block * BLOCK + r * FIELDS + j + upper * (FIELDS // 2)
    mask = k < in_features
    if perm_ptr is not None:
        k = tl.load(perm_ptr + k, mask=mask, other=0)
    x = tl.load(x_ptr + m * in_features + k, mask=mask, other=0.0)
    tl.store(arranged_ptr + (m * blocks + block) * BLOCK + p, x)
    tl.store(sums_ptr + m * blocks + block, tl.sum(x.to(tl.float32), axis=0))


@triton.jit
def product_kernel(
    x_ptr,  # [M, blocks * BLOCK], arranged
    sums_ptr,  # [M, blocks]
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    parts_ptr,  # float32 [splits, M, N]
    rows,
    out_features,
    group_size,
    word_rows,
    blocks,
    BITS: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    GROUP_A_BLOCK: tl.constexpr,  # else several groups of whole words make up a block
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    FIELDS: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = WORD_ROWS * FIELDS
    split, splits = tl.program_id(2), tl.num_programs(2)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, WORD_ROWS)
    pair = tl.arange(0, 2 * WORD_ROWS)
    in_m, in_n = m < rows, n < out_features
    half: tl.constexpr = x_ptr.dtype.element_ty
    # float16 holds 1024 + code for up to 8 bits, bfloat16 128 + code for up to 7.
    OFFSET_BITS: tl.constexpr = 0x64006400 if half == tl.float16 else (0x43004300 if BITS < 8 else 0)
    OFFSET: tl.constexpr = 1024 if half == tl.float16 else (128 if BITS < 8 else 0)
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(blocks * split // splits, blocks * (split + 1) // splits):
        word = block * WORD_ROWS + r
        in_words = in_n[None, :] if EVEN_K else (word < word_rows)[:, None] & in_n[None, :]
        words = tl.load(qweight_ptr + word[:, None] * out_features + n[None, :], mask=in_words, other=0)
        if not GROUP_A_BLOCK:
            of_word = (word * FIELDS // group_size)[:, None] * out_features + n[None, :]
            word_scale = tl.load(scales_ptr + of_word, mask=in_words, other=0.0).to(tl.float32)
            word_zero = OFFSET + (1 << BITS - 1)
            if zeros_ptr is not None:
                word_zero = OFFSET + tl.load(zeros_ptr + of_word, mask=in_words, other=0).to(tl.float32)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for j in tl.static_range(FIELDS // 2):
            x_at = (m * blocks + block)[:, None] * BLOCK + (j * 2 * WORD_ROWS + pair)[None, :]
            x = tl.load(x_ptr + x_at, mask=in_m[:, None], other=0.0)
            both = (words >> (j * BITS)) & MASK
            if OFFSET_BITS != 0:
                both = both | OFFSET_BITS
                low = both.to(tl.int16).to(half, bitcast=True)
                high = (both >> 16).to(tl.int16).to(half, bitcast=True)
            else:
                low = (both & 0xFFFF).to(tl.float32).to(half)
                high = (both >> 16).to(tl.float32).to(half)
            if not GROUP_A_BLOCK:
                low = ((low.to(tl.float32) - word_zero) * word_scale).to(half)
                high = ((high.to(tl.float32) - word_zero) * word_scale).to(half)
            operand = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (2 * WORD_ROWS, COLUMNS))
            product = tl.dot(x, operand, product)
        if GROUP_A_BLOCK:
            of_group = (block * BLOCK // group_size) * out_features + n
            scale = tl.load(scales_ptr + of_group, mask=in_n, other=0.0).to(tl.float32)
            x_sum = tl.load(sums_ptr + m * blocks + block, mask=in_m, other=0.0)
            if zeros_ptr is not None:
                zero = OFFSET + tl.load(zeros_ptr + of_group, mask=in_n, other=0).to(tl.float32)
                product -= zero[None, :] * x_sum[:, None]
            else:
                product -= ((OFFSET + (1 << BITS - 1)) * x_sum)[:, None]
            total += scale[None, :] * product
        else:
            total += product
    parts_at = (split * rows + m)[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(parts_ptr + parts_at, total, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def reduce_kernel(parts_ptr, bias_ptr, y_ptr, numel, out_features, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    total = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(parts_ptr + split * numel + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % out_features, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


def dequantize_(weight: GptqWeight, out: Tensor, first_column: int) -> None:
    """Write the columns from `first_column` on to `out` [K, n], its rows in the order of the input."""
    columns = out.shape[1]
    grid = (triton.cdiv(weight.in_features, DEQUANTIZE_ROWS), triton.cdiv(columns, DEQUANTIZE_COLUMNS))
    if 0 in grid:
        return
    with torch.cuda.device_of(out):
        dequantize_kernel[grid](
            weight.qweight,
            weight.scales,
            weight.zeros,
            weight.perm,
            out,
            weight.in_features,
            weight.out_features,
            weight.group_size,
            first_column,
            columns,
            BITS=weight.bits,
            ROWS=DEQUANTIZE_ROWS,
            COLUMNS=DEQUANTIZE_COLUMNS,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )


def matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """x [M, K], contiguous, in the order of the input, times the weight, plus its bias: [M, N]."""
    if 0 < len(x) <= FUSED_ROWS and x.dtype != torch.float32 and is_fusible(weight):
        return fused_matmul(x, weight)
    return dense_matmul(x, weight)


def is_fusible(weight: GptqWeight) -> bool:
    """Whether its groups fit the blocks of `product_kernel`."""
    if weight.bits == 3 or weight.out_features == 0:
        return False
    fields = 32 // weight.bits
    return _group_a_block(weight) or weight.group_size % fields == 0


def configuration(rows: int, columns: int) -> tuple[int, int, int, int]:
    """For a product [rows, columns]: rows and columns of a tile, warps, stages of the pipeline."""
    if rows <= 16:
        return 16, 64 if columns < 8192 else 128, 2, 4
    return 32 if rows <= 32 else 64, 128, 4, 3


def fused_matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """`matmul` for float16 or bfloat16 rows, at least one and at most 64, and a weight that is fusible."""
    rows, columns = len(x), weight.out_features
    fields = 32 // weight.bits
    blocks = triton.cdiv(weight.in_features, WORD_ROWS * fields)
    tile_rows, tile_columns, warps, stages = configuration(rows, columns)
    tiles = triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows)
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles[0] * tiles[1]), blocks // 4))
    arranged = torch.empty(rows, blocks * WORD_ROWS * fields, dtype=x.dtype, device=x.device)
    sums = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
    parts = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        arrange_kernel[(rows, blocks)](
            x,
            weight.perm,
            arranged,
            sums,
            weight.in_features,
            blocks,
            FIELDS=fields,
            WORD_ROWS=WORD_ROWS,
            num_warps=1,
            **LAUNCH_OPTIONS,
        )
        product_kernel[(*tiles, splits)](
            arranged,
            sums,
            weight.qweight,
            weight.scales,
            weight.zeros,
            parts,
            rows,
            columns,
            weight.group_size,
            len(weight.qweight),
            blocks,
            BITS=weight.bits,
            WORD_ROWS=WORD_ROWS,
            GROUP_A_BLOCK=_group_a_block(weight),
            EVEN_K=len(weight.qweight) % WORD_ROWS == 0,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=warps,
            num_stages=stages,
            **LAUNCH_OPTIONS,
        )
        reduce_kernel[(triton.cdiv(y.numel(), 256),)](
            parts, weight.bias, y, y.numel(), columns, splits, BLOCK=256, num_warps=2, **LAUNCH_OPTIONS
        )
    return y


def dense_matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """`matmul` for any x and weight, by way of dequantised columns."""
    y = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    width = max(1, SCRATCH_BYTES // (x.element_size() * weight.in_features))
    for first in range(0, weight.out_features, width):
        columns = y[:, first : first + width]
        scratch = torch.empty(weight.in_features, columns.shape[1], dtype=x.dtype, device=x.device)
        dequantize_(weight, scratch, first)
        torch.mm(x, scratch, out=columns)
    return y if weight.bias is None else y.add_(weight.bias)


def _group_a_block(weight: GptqWeight) -> bool:
    """Whether no block of WORD_ROWS word rows holds rows of two groups."""
    block = WORD_ROWS * (32 // weight.bits)
    return weight.group_size % block == 0 or weight.group_size == weight.in_features
