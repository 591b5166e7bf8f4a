"""An exponential moving average of a model's weights, sharded and placed as its optimizer's state is."""

from collections.abc import Iterator

import torch
from torch import nn

from .chunk import Chunk
from .collectives import all_gather_
from .shard import engine_of


class WeightAverage:
    """e ← d·e + (1 - d)·w after each step, in float32, of what this rank owns of the trainable weights.

    Costs 4 bytes a trainable parameter, spread over the ranks as the optimizer's state is, and no communication.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begins at the weights as they are. Raises ValueError for a decay that is not between 0 and 1."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: must be at least 0 and below 1")
        self.decay = decay
        self._engine = engine_of(model)
        self._values = [self._master(chunk).clone() for chunk in self._chunks()]

    def _chunks(self) -> list[Chunk]:
        return [chunk for chunk in self._engine.chunks if chunk.spec.trainable]

    @staticmethod
    def _master(chunk: Chunk) -> torch.Tensor:
        return chunk.values_of("master", slice(None))

    @torch.no_grad()
    def update(self) -> None:
        """Called after the optimizer's step."""
        for chunk, average in zip(self._chunks(), self._values, strict=True):
            average.lerp_(self._master(chunk).to(average.device, average.dtype), 1 - self.decay)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, full tensor on the CPU) of every parameter, for `save_pretrained(weights=…)`: averages of those
        that are trained, the others as they are. A collective; every rank takes them all."""
        engine, averages = self._engine, iter(self._values)
        for group in engine.groups:
            engine.schedule.hold([group], "average")
            for chunk in group.chunks:
                views = chunk.views
                if chunk.spec.trainable:
                    whole = self._whole(chunk, next(averages))
                    views = {s.fqn: whole[s.offset_numel : s.stop_numel].view(s.shape) for s in chunk.spec.slots}
                for fqn, view in views.items():
                    yield fqn, view.detach().to("cpu", copy=True)
            engine.schedule.release([group], "average")

    def _whole(self, chunk: Chunk, average: torch.Tensor) -> torch.Tensor:
        start, stop = chunk.placement.owned
        whole = torch.empty(chunk.spec.numel, dtype=torch.float32, device=chunk.full.device)
        whole[start:stop].copy_(average)
        if stop - start < chunk.spec.numel:
            all_gather_(whole, self._engine.rank_group, chunk.index)
        return whole

    def state(self) -> list[torch.Tensor]:
        """This rank's part, for a checkpoint that goes on at the same world size."""
        return [values.cpu() for values in self._values]

    def load_state(self, state: list[torch.Tensor]) -> None:
        """Raises ValueError where it was saved by a run that shared the weights out otherwise."""
        if [len(values) for values in state] != [len(values) for values in self._values]:
            raise ValueError(
                "the moving average was saved at another world size or ZeRO stage: go on with the same, "
                "or without the average"
            )
        for values, saved in zip(self._values, state, strict=True):
            values.copy_(saved)
