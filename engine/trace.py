"""The recorded order in which groups are used, and what it predicts.

What follows a use is remembered by the two uses before it. So a trace needs no notion of where an iteration begins,
several programs (training, evaluation, generation) share one trace without disturbing each other, and an order that
changes is learned anew at the place where it changed. A prediction is a hint: a wrong one costs a transfer, never a
result. It is a function of the order of uses alone, so that ranks that run the same program prefetch the same groups.
"""

from collections.abc import Hashable


class AccessTrace:
    def __init__(self) -> None:
        self._successor: dict[tuple[Hashable, Hashable], Hashable] = {}
        self._last: tuple[Hashable, Hashable] = (None, None)

    def visit(self, use: Hashable) -> None:
        """Record that `use` happens now."""
        self._successor[self._last] = use
        self._last = (self._last[1], use)

    def upcoming(self, limit: int) -> list[Hashable]:
        """The next uses as far as they can be told, nearest first, at most `limit`."""
        result: list[Hashable] = []
        context = self._last
        while len(result) < limit and context in self._successor:
            use = self._successor[context]
            result.append(use)
            context = (context[1], use)
        return result
