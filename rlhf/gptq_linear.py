"""Linear layers over 4-bit weights, in place of nn.Linear and transformers' Conv1D."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels import GptqWeight, gptq_matmul, join_gptq_weights

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class QuantizedLinear(nn.Module):
    """y = x W + b with W quantised by GPTQ; x is [..., in_features].

    Its tensors are frozen parameters, so that the engine can keep them on the host, and all of them integers: scales
    and bias go by their bits, because a model's dtype is not theirs, and no cast may change them.
    """

    def __init__(self, weight: GptqWeight):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        self._dtypes = {name: tensor.dtype for name, tensor in weight.tensors().items()}
        for name in ("qweight", "scales", "zeros", "perm", "bias"):
            tensor = getattr(weight, name)
            if tensor is not None:
                bits = tensor.view(_BITS.get(tensor.dtype, tensor.dtype))
                tensor = nn.Parameter(bits, requires_grad=False)
            self.register_parameter(name, tensor)

    @property
    def gptq_weight(self) -> GptqWeight:
        tensors = {
            name: None if parameter is None else parameter.data.view(self._dtypes[name])
            for name, parameter in self._parameters.items()
        }
        return GptqWeight(**tensors, bits=self.bits, group_size=self.group_size, in_features=self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return gptq_matmul(x, self.gptq_weight)

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
