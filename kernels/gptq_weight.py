"""One weight quantised by GPTQ (Frantar et al. 2023), in the form that the kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gptq_packing import BITS, pack_codes, packed_rows, unpack_codes

_SCALE_DTYPES = (torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class GptqWeight:
    """A weight of K = `in_features` rows and N columns:

        W[perm[k], n] = scales[k // g, n] * (code[k, n] - zeros[k // g, n])

    The same layout serves every device; a module may keep the tensors as buffers and build this from them at each call.
    """

    qweight: Tensor  # int32 [packed_rows(K, bits), N]: the codes, packed along the input (gptq_packing.py)
    scales: Tensor  # float16 or float32 [G, N], G = ceil(K / group_size)
    zeros: Tensor | None  # uint8 [G, N]: the zero-points; None: all are 2 ** (bits - 1), the symmetric case
    perm: Tensor | None  # int32 [K]: which input row k of qweight multiplies; None: the k-th
    bias: Tensor | None  # [N]
    bits: int
    group_size: int  # g: rows that share a scale; the last group may have fewer
    in_features: int

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field."""
        fields = {name: getattr(self, name) for name in ("qweight", "scales", "zeros", "perm", "bias")}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "GptqWeight":
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


def prepare_gptq_weight(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
) -> GptqWeight:
    """Turn the tensors of a checkpoint into a GptqWeight, on their device.

    `qweight` int32 [packed_rows(K, bits), N] and `scales` [G, N] are the checkpoint's own, `zeros` uint8 [G, N] what
    `unpack_zeros` makes of its qzeros (None: symmetric), and a `group_size` of -1 is one group. `g_idx` [K] gives each
    input row its group; negative entries count from the last. Where it is not k // group_size (act-order), the rows are
    sorted by group here, once, and `perm` tells the kernels how to permute the input. bfloat16 scales become float32.
    Raises ValueError that names the tensor of a wrong dtype or shape, or with an entry out of range.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, but has to be one of {BITS}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size is {group_size}, but has to be at least 1, or -1 for one group")
    group_size = in_features if group_size == -1 else min(group_size, in_features)
    groups = -(-in_features // group_size)
    if qweight.dim() != 2:
        raise ValueError(f"qweight has shape {list(qweight.shape)}, but two dimensions are needed")
    columns = qweight.shape[1]
    _check("qweight", qweight, (torch.int32,), [packed_rows(in_features, bits), columns])
    _check("scales", scales, (*_SCALE_DTYPES, torch.bfloat16), [groups, columns])
    if zeros is not None:
        _check("zeros", zeros, (torch.uint8,), [groups, columns])
        if bool((zeros == 1 << bits - 1).all()):
            zeros = None
    if bias is not None:
        _check("bias", bias, (*_SCALE_DTYPES, torch.bfloat16), [columns])
    perm = None if g_idx is None else _order(g_idx, group_size, in_features, groups)
    if perm is not None:
        codes = unpack_codes(qweight, bits, in_features)
        qweight = pack_codes(codes[perm], bits)
        perm = perm.int()
    return GptqWeight(
        qweight=qweight.contiguous(),
        scales=(scales.float() if scales.dtype == torch.bfloat16 else scales).contiguous(),
        zeros=None if zeros is None else zeros.contiguous(),
        perm=perm,
        bias=bias,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


def join_gptq_weights(weights: Sequence[GptqWeight]) -> GptqWeight:
    """One weight with the columns of all, e.g. query, key and value. Raises ValueError where they do not share their
    bits, group size, input order, and the presence of a bias."""
    first = weights[0]
    for other in weights[1:]:
        for name in ("bits", "group_size", "in_features"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"{name} is {getattr(first, name)} and {getattr(other, name)}: these cannot be joined")
        both = first.perm is not None and other.perm is not None
        if first.perm is not other.perm and not (both and torch.equal(first.perm, other.perm)):
            raise ValueError("the weights permute their input differently: these cannot be joined")
        if (other.bias is None) != (first.bias is None):
            raise ValueError("some weights have a bias and some have not: these cannot be joined")
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        middle = 1 << first.bits - 1
        zeros = torch.cat(
            [torch.full_like(w.scales, middle, dtype=torch.uint8) if w.zeros is None else w.zeros for w in weights],
            dim=1,
        )
    scale_dtype = torch.float32 if any(w.scales.dtype == torch.float32 for w in weights) else torch.float16
    return replace(
        first,
        qweight=torch.cat([w.qweight for w in weights], dim=1),
        scales=torch.cat([w.scales.to(scale_dtype) for w in weights], dim=1),
        zeros=zeros,
        bias=None if first.bias is None else torch.cat([w.bias for w in weights]),
    )


def _order(g_idx: Tensor, group_size: int, in_features: int, groups: int) -> Tensor | None:
    """The rows in the order of their groups, or None where they already lie so."""
    if g_idx.shape != (in_features,) or g_idx.is_floating_point():
        raise ValueError(
            f"g_idx is {g_idx.dtype} of shape {list(g_idx.shape)}, but integers [{in_features}] are needed"
        )
    g_idx = g_idx.long()
    if g_idx.numel() and not -groups <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"g_idx reaches from {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups} groups")
    g_idx = torch.where(g_idx < 0, g_idx + groups, g_idx)
    regular = torch.arange(in_features, device=g_idx.device) // group_size
    if torch.equal(g_idx, regular):
        return None
    perm = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[perm], regular):
        sizes = torch.bincount(g_idx, minlength=groups)
        odd = int((sizes != torch.bincount(regular, minlength=groups)).nonzero()[0])
        raise ValueError(f"g_idx gives {int(sizes[odd])} rows to group {odd}, where group_size is {group_size}")
    return perm


def _check(name: str, tensor: Tensor, dtypes: tuple, shape: list[int]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, but has to be {' or '.join(map(str, dtypes))}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but {shape} is needed")
