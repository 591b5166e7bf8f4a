"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2). Pure state, no tensors."""

from dataclasses import asdict, dataclass


@dataclass
class DynamicLossScaler:
    scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    """Steps without an overflow after which the scale grows."""
    min_scale: float = 1.0
    good_steps: int = 0

    def update(self, found_inf: bool) -> None:
        """Called once a step, after the gradients of this step were unscaled with `scale`."""
        if found_inf:
            self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= self.growth_factor
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
