"""The tensors of one quantised linear in a checkpoint, as the weight that the kernels take.

Layouts, of K inputs and N outputs with b bits in G groups (kernels/gptq_packing.py says how codes lie in words):

| written by | tensors |
|---|---|
| GPTQ-for-LLaMa until 19 March 2023 | qweight [K b / 32, N], scales [N, 1], zeros [N, 1] = scale * zero-point |
| GPTQ-for-LLaMa of late March 2023 | qweight, scales float32 [G, N], qzeros [G, N // 256 * 8 b], bias always |
| since then, AutoGPTQ and GPTQModel | qweight, scales [G, N], qzeros [G, N b / 32], g_idx [K], bias if there is one |

Their shapes decide about bits and groups, and what was declared has to agree.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import GptqWeight, pack_zeros, prepare_gptq_weight, unpack_codes, unpack_zeros
from .gptq_checkpoint import StoredTensor
from .gptq_config import GptqConfig

PARTS = ("qweight", "qzeros", "zeros", "scales", "g_idx", "bias")
_BITS = (4, 8, 3, 2)


def read_weight(
    parts: Mapping[str, StoredTensor],
    declared: GptqConfig,
    in_features: int,
    out_features: int,
    has_bias: bool,
    device: torch.device,
) -> GptqWeight:
    """The weight of a linear with these features, on `device`; `parts` are its tensors by the last part of their names.

    `has_bias`: the model's own layer has one. A bias of zeros that the model does not know is dropped, as early files
    have it everywhere. Raises InputError that names file and tensor for what is missing, does not fit or contradicts
    `declared`.
    """
    qweight = parts["qweight"]
    needed = ["scales", "zeros" if "zeros" in parts else "qzeros", *(["bias"] if has_bias else [])]
    for name in needed:
        if name not in parts:
            raise qweight.wrong(f"{name} is missing beside it")
    bits = _find_bits(qweight, declared, in_features, out_features)
    if "zeros" in parts:
        scales, zeros = _read_scaled_zeros(parts, bits, out_features)
    else:
        scales = parts["scales"].read()
        if scales.dim() != 2 or scales.shape[1] != out_features:
            raise parts["scales"].wrong(f"[groups, {out_features}] is needed")
        zeros = _read_zeros(parts["qzeros"], bits, len(scales), out_features, declared)
    g_idx = parts["g_idx"].read() if "g_idx" in parts else None
    group_size = _find_group_size(parts, g_idx, len(scales), declared, in_features)
    bias = parts["bias"].read() if "bias" in parts else None
    if bias is not None and not has_bias and not bias.any():
        bias = None
    tensors = {"scales": scales, "zeros": zeros, "g_idx": g_idx, "bias": bias}
    on_device = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    try:
        return prepare_gptq_weight(
            qweight.read().to(device), **on_device, bits=bits, group_size=group_size, in_features=in_features
        )
    except ValueError as error:
        named = next((parts[name] for name in PARTS if name in parts and str(error).startswith(name)), qweight)
        raise named.wrong(error) from None


def _find_bits(qweight: StoredTensor, declared: GptqConfig, in_features: int, out_features: int) -> int:
    if qweight.dtype != torch.int32:
        raise qweight.wrong(f"is {qweight.dtype}; only codes packed in int32 are read")
    for bits in _BITS:
        if qweight.shape == (-(-in_features * bits // 32), out_features):
            break
    else:
        awq = any(qweight.shape == (in_features, out_features * bits // 32) for bits in _BITS)
        raise qweight.wrong(
            f"no number of bits packs {in_features} inputs and {out_features} outputs like this"
            + (": it looks like AWQ's layout, which is not read" if awq else "; is this the right model?")
        )
    if declared.bits not in (None, bits):
        raise qweight.wrong(f"is packed with {bits} bits, but {declared.source} says {declared.bits}")
    return bits


def _find_group_size(
    parts: Mapping[str, StoredTensor],
    g_idx: Tensor | None,
    groups: int,
    declared: GptqConfig,
    in_features: int,
) -> int:
    """Inputs a group, from what was declared, else from g_idx, else from the number of groups."""
    if declared.group_size is not None:
        size = in_features if declared.group_size == -1 else declared.group_size
        if size < 1 or -(-in_features // size) != groups:
            raise parts["scales"].wrong(
                f"has {groups} groups for {in_features} inputs, which is not the group_size {declared.group_size} that "
                f"{declared.source} says"
            )
        return size
    if groups == 1:
        return in_features
    if g_idx is not None and not g_idx.is_floating_point() and g_idx.shape == (in_features,):
        return int(torch.bincount(g_idx.long() % groups).max())  # -1 is the last group; the range is checked later
    if in_features % groups:
        raise parts["scales"].wrong(
            f"{in_features} inputs do not divide into its {groups} groups; give the group_size (--gptq_group_size)"
        )
    return in_features // groups


def _read_zeros(qzeros: StoredTensor, bits: int, groups: int, out_features: int, declared: GptqConfig) -> Tensor:
    """Zero-points, uint8 [G, N]."""
    words = -(-out_features * bits // 32)
    if qzeros.shape != (groups, words) or qzeros.dtype != torch.int32:
        lost = out_features // 256 * 8 * bits
        cut = qzeros.shape == (groups, lost) and lost < words
        raise qzeros.wrong(
            f"int32 {[groups, words]} is needed"
            + ("; GPTQ-for-LLaMa of March 2023 lost the zero-points of all outputs beyond a multiple of 256" * cut)
        )
    packed = qzeros.read()
    checkpoint_format = _find_format(qzeros, packed, bits, out_features, declared)
    if checkpoint_format == "gptq" and "gptqmodel" not in declared.quantizer and declared.sym is not True:
        if bool((unpack_codes(packed.T.contiguous(), bits, out_features) == 2**bits - 1).any()):
            warnings.warn(
                f"{qzeros.file}: some zero-points are stored as -1. GPTQ-for-LLaMa and AutoGPTQ damaged those beside "
                f"them when they wrote such a file, and the weights of these groups are then wrong in the file itself",
                stacklevel=2,
            )
    return unpack_zeros(packed, bits, out_features, checkpoint_format)


def _find_format(qzeros: StoredTensor, packed: Tensor, bits: int, out_features: int, declared: GptqConfig) -> str:
    """v1 or v2. Symmetric files hold one constant, which tells them apart better than the label: there are files with
    the wrong one. Asymmetric files are what they are labelled, by default v1."""
    labelled = declared.checkpoint_format or "gptq"
    if declared.sym is False:
        return labelled
    middle = torch.full((1, out_features), 2 ** (bits - 1), dtype=torch.uint8)
    found = [name for name in ("gptq", "gptq_v2") if bool((packed == pack_zeros(middle, bits, name)).all())]
    if not found or found == [labelled]:
        return labelled
    if declared.checkpoint_format is not None:
        warnings.warn(
            f"{qzeros.file}: {declared.source} says {labelled}, but the zero-points are those of a symmetric "
            f"{found[0]} file; they are read as such",
            stacklevel=2,
        )
    return found[0]


def _read_scaled_zeros(parts: Mapping[str, StoredTensor], bits: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Scales [1, N] and zero-points [1, N] of the oldest layout: W = scale * code - zeros."""
    for name in ("scales", "zeros"):
        if parts[name].shape != (out_features, 1):
            raise parts[name].wrong(f"{[out_features, 1]} is needed")
    scales = parts["scales"].read().float()
    exact = parts["zeros"].read().float() / scales
    zeros = exact.round()
    if not ((exact - zeros).abs() < 0.05).all() or zeros.min() < 0 or zeros.max() >= 2**bits:
        raise parts["zeros"].wrong(f"is not scales times whole zero-points of {bits} bits")
    return scales.T.contiguous(), zeros.to(torch.uint8).T.contiguous()
