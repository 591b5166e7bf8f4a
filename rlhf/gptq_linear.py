"""Linear layers over 4-bit weights, in place of nn.Linear and transformers' Conv1D."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels import GptqWeight, gptq_matmul, join_gptq_weights


class QuantizedLinear(nn.Module):
    """y = x W + b with W quantised by GPTQ; x is [..., in_features]."""

    def __init__(self, weight: GptqWeight):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        for name in ("qweight", "scales", "zeros", "perm", "bias"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def gptq_weight(self) -> GptqWeight:
        return GptqWeight(
            self.qweight,
            self.scales,
            self.zeros,
            self.perm,
            self.bias,
            self.bits,
            self.group_size,
            self.in_features,
        )

    def forward(self, x: Tensor) -> Tensor:
        return gptq_matmul(x, self.gptq_weight)

    def _apply(self, fn, recurse=True):
        # Kernels take scales in float16 or float32, and those of the file are exact: no .to(dtype) changes them.
        dtype, scales = self.scales.dtype, self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class JointLinear(nn.Module):
    """Linears that are called in turn with the same input (query, key, value; gate, up), computed by one matmul.

    The first of its parts to be called with an input computes them all, and the others take theirs. An input is known
    by being the same tensor, and is let go with the last part taken: a model that calls them otherwise gets the same
    values, only slower.
    """

    def __init__(self, weights: Sequence[GptqWeight]):
        super().__init__()
        self.joint = QuantizedLinear(join_gptq_weights(weights))
        self.sizes = [weight.out_features for weight in weights]
        self._held: tuple[Tensor, dict[int, Tensor]] | None = None

    def take(self, part: int, x: Tensor) -> Tensor:
        held = self._held  # read once: another thread's call may replace it
        if held is None or held[0] is not x or part not in held[1]:
            held = x, dict(enumerate(self.joint(x).split(self.sizes, dim=-1)))
            self._held = held
        y = held[1].pop(part)
        if not held[1]:
            self._held = None
        return y


class JointLinearPart(nn.Module):
    """One of the linears of a JointLinear, under the name that it has in the model."""

    def __init__(self, owner: JointLinear, part: int):
        super().__init__()
        self.owner, self.part = owner, part
        self.in_features, self.out_features = owner.joint.in_features, owner.sizes[part]

    def forward(self, x: Tensor) -> Tensor:
        return self.owner.take(self.part, x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, part={self.part}"


def join_projections(named: dict[str, GptqWeight]) -> dict[str, nn.Module]:
    """Modules for the projections of one parent, those in `named` joined where their weights allow it."""
    weights = list(named.values())
    try:
        owner = JointLinear(weights)
    except ValueError:  # other bits, groups, input order or biases
        return {name: QuantizedLinear(weight) for name, weight in named.items()}
    return {name: JointLinearPart(owner, part) for part, name in enumerate(named)}
