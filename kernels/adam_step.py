"""What one Adam step works on: its values, the constants that follow from them, and its tensors."""

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .moment_codes import CODE_BLOCK_NUMEL, scales_numel


class AdamScalars(NamedTuple):
    """The constants of one step as every implementation receives them: computed in float64, then rounded to float32."""

    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    decay: float  # AdamW: the factor 1 - lr * weight_decay on the weight; Adam: the weight's share in the gradient
    step_size: float  # lr / (1 - beta1 ** step)
    inverse_sqrt_bias2: float  # 1 / sqrt(1 - beta2 ** step)
    eps: float


@dataclass(frozen=True)
class AdamHyper:
    """One optimizer group's values for one step.

    `decoupled` chooses AdamW (Loshchilov and Hutter 2019, Algorithm 2); otherwise the decay is added to the gradient,
    as in `torch.optim.Adam`. `step` counts from 1 and corrects the bias of the moments (Kingma and Ba 2015,
    Algorithm 1). Raises ValueError for a value outside its range.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    step: int

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to lie in [0, 1)")
        for name in ("lr", "eps", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be finite and not negative")
        if self.step < 1:
            raise ValueError(f"step is {self.step}, but counts from 1: raise it before the update, not after")

    def scalars(self) -> AdamScalars:
        """The constants of this step, each the float32 nearest to its float64 value."""
        exact = AdamScalars(
            one_minus_beta1=1.0 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1.0 - self.beta2,
            decay=1.0 - self.lr * self.weight_decay if self.decoupled else self.weight_decay,
            step_size=self.lr / (1.0 - self.beta1**self.step),
            inverse_sqrt_bias2=1.0 / math.sqrt(1.0 - self.beta2**self.step),
            eps=self.eps,
        )
        return AdamScalars(*(ctypes.c_float(value).value for value in exact))


class AdamTensors(NamedTuple):
    """The tensors of one step, all [numel] but the scales; `fused_adam_` tells which go together. A gradient may also
    be a tuple of tensors that follow each other."""

    weight: Tensor
    grad: Tensor | tuple[Tensor, ...]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    remainder: Tensor | None = None
    master: Tensor | None = None
    scales: Tensor | None = None  # [scales_numel(numel)], where the moments are codes

    def block(self, start: int, stop: int) -> "AdamTensors":
        """Views of the elements from `start` to `stop`, where the gradient is one tensor or left out. Moments in codes
        are cut at multiples of their blocks."""
        views = AdamTensors(*(None if tensor is None else tensor[start:stop] for tensor in self))
        if self.scales is None:
            return views
        first = start // CODE_BLOCK_NUMEL * 2
        return views._replace(scales=self.scales[first : first + scales_numel(views.weight.numel())])

    @property
    def grads(self) -> tuple[Tensor, ...]:
        return self.grad if isinstance(self.grad, tuple) else (self.grad,)

    def by_grad(self) -> Iterator["AdamTensors"]:
        """The same step as one for each tensor of the gradient."""
        rest, start = self._replace(grad=None), 0
        for grad in self.grads:
            yield rest.block(start, start + grad.numel())._replace(grad=grad)
            start += grad.numel()
