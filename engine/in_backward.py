"""What updates in the backward pass (update_in_backward) remember from their first one to `step()`."""

from collections import deque
from dataclasses import dataclass, field

import torch

from ..kernels import AdamHyper
from .budgets import MAX_IN_FLIGHT
from .chunk import Chunk
from .chunk_group import ChunkGroup
from .disk_tensor import DiskTensor


@dataclass
class InBackward:
    groups: list[ChunkGroup]
    squares: list[tuple[Chunk, torch.Tensor | float]] = field(default_factory=list)
    """Sums of the gradients' squares, of the chunks that were updated in this pass."""
    _hyper: list[AdamHyper] | None = None
    _order: list[Chunk] = field(default_factory=list)
    """In which chunks on a drive were updated in the last pass: those of the next one are read ahead in it."""
    _done: list[Chunk] = field(default_factory=list)
    """Those of this pass."""
    _in_flight: deque[ChunkGroup] = field(default_factory=deque)

    def __post_init__(self) -> None:
        chunks = [gradient.chunk for group in reversed(self.groups) for gradient in group.gradients]
        self._order = [chunk for chunk in chunks if isinstance(chunk.exp_avg, DiskTensor)]

    def fix(self, hyper: list[AdamHyper]) -> None:
        """The hyperparameters of all optimizer groups, at every update of a pass."""
        if self._hyper is None:
            self._hyper = hyper
        self.check(hyper)

    def check(self, hyper: list[AdamHyper]) -> None:
        """Raises RuntimeError where they are not those that the pass began with."""
        for index, (mine, given) in enumerate(zip(hyper, self._hyper, strict=True)):
            if mine != given:
                raise RuntimeError(
                    f"optimizer group {index} was changed between backward and step(), but update_in_backward=True has "
                    f"used {given} already: change it before the backward pass or after step()"
                )

    def follow(self, chunk: Chunk | None) -> list[Chunk]:
        """Chunks on a drive in the order in which their updates are expected after that of `chunk`; None: after the
        last one of the pass."""
        order = self._order
        if chunk is not None:
            self._done.append(chunk)
            if chunk not in order:
                return []
            at = order.index(chunk)
            order = order[at + 1 :] + order[:at]
        return [each for each in order if isinstance(each.exp_avg, DiskTensor)]  # the others are on the device by now

    def bound(self, group: ChunkGroup) -> None:
        """Wait until few updates are under way."""
        self._in_flight.append(group)
        while len(self._in_flight) > MAX_IN_FLIGHT:
            for chunk in self._in_flight.popleft().chunks:
                chunk.settle()

    def close(self) -> None:
        """The pass is over."""
        if self._done:
            self._order = self._done
        self._done = []
        self._hyper = None
        self.squares.clear()
