"""The recorded order in which groups are used, and what it predicts.

What follows a use is remembered by the two uses before it. So a trace needs no notion of where an iteration begins,
several programs (training, evaluation, generation) share one trace without disturbing each other, and an order that
changes is learned anew at the place where it changed. A prediction is a hint: a wrong one costs a transfer, never a
result. It is a function of the order of uses alone, so that ranks that run the same program prefetch the same groups.

What each moment needs on the device is measured beside it, for `migration`.
"""

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class Need:
    """What a moment, which lasts from one use of weights to the next, needs on the device beside what is at rest
    there. The most that was seen."""

    groups: frozenset[Hashable] = frozenset()
    """Whose whole weights are in use, or prefetched."""
    gradient_bytes: int = 0
    other_bytes: int = 0
    """Of all that is not stored by an engine, where that is measured."""
    is_old: bool = False
    """Of another placement: the next measurement replaces it."""


class AccessTrace:
    def __init__(self) -> None:
        self.needs: dict[Hashable, Need] = {}
        """By moment: the two uses with which it begins, or what else was given to `begin`."""
        self._successor: dict[tuple[Hashable, Hashable], Hashable] = {}
        self._last: tuple[Hashable, Hashable] = (None, None)
        self._moment: Hashable = self._last

    def visit(self, use: Hashable) -> None:
        """Record that `use` happens now: the next moment begins."""
        expected = self._successor.get(self._last)
        if expected is not None and expected != use:
            self.needs.pop((self._last[1], expected), None)  # the order has changed here
        self._successor[self._last] = use
        self._last = (self._last[1], use)
        self.begin(self._last)

    def begin(self, moment: Hashable) -> None:
        self._moment = moment

    def measure(self, need: Need) -> None:
        """Enter what the present moment needs."""
        known = self.needs.get(self._moment)
        if known is not None and not known.is_old:
            need = Need(
                known.groups | need.groups,
                max(known.gradient_bytes, need.gradient_bytes),
                max(known.other_bytes, need.other_bytes),
            )
        self.needs[self._moment] = need

    def age(self, gradient_bytes: int) -> None:
        """Chunks have moved, and with them gradients: what they add to those on the device between their landing and
        the step is added to every moment, until it is measured again."""
        for need in self.needs.values():
            need.gradient_bytes = max(need.gradient_bytes + gradient_bytes, 0)
            need.is_old = True

    def upcoming(self, limit: int) -> list[Hashable]:
        """The next uses as far as they can be told, nearest first, at most `limit`."""
        result: list[Hashable] = []
        context = self._last
        while len(result) < limit and context in self._successor:
            use = self._successor[context]
            result.append(use)
            context = (context[1], use)
        return result
