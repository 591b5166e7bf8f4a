"""Keys and values of answered prompts, kept so that the next turn of a conversation need not compute them again."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy

from .kv_cache import KVRow

MIN_COMMON = 16  # tokens: fewer are computed as fast as they are copied, and may go together with other prompts


class PrefixStore:
    """The rows used last, within a budget of bytes. Position c depends on tokens 0 to c alone, so any beginning that a
    prompt has in common with a row can be used."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._rows: OrderedDict[bytes, KVRow] = OrderedDict()  # by the bytes of int64 token ids, oldest use first

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, prompt: Sequence[int]) -> KVRow | None:
        """A view of the longest stored beginning of `prompt`, which leaves at least its last token to be computed; None
        where none has `MIN_COMMON` tokens."""
        wanted = numpy.asarray(prompt[:-1], dtype=numpy.int64)
        best, longest = None, MIN_COMMON - 1
        for key in self._rows:
            length = _common(wanted, numpy.frombuffer(key, dtype=numpy.int64))
            if length > longest:
                best, longest = key, length
        if best is None:
            return None
        self._rows.move_to_end(best)
        return self._rows[best].first(longest)

    def keep(self, tokens: Sequence[int], row: KVRow) -> None:
        """Store a copy of `row`, which holds `tokens`, in place of whatever is a beginning of it."""
        if row.nbytes > self.budget_bytes:
            return
        key = numpy.asarray(tokens[: row.length], dtype=numpy.int64).tobytes()
        for old in [old for old in self._rows if key.startswith(old)]:
            self._forget(old)
        while self.nbytes + row.nbytes > self.budget_bytes:
            self._forget(next(iter(self._rows)))
        self._rows[key] = row.clone()
        self.nbytes += row.nbytes

    def _forget(self, key: bytes) -> None:
        self.nbytes -= self._rows.pop(key).nbytes


def _common(first: numpy.ndarray, second: numpy.ndarray) -> int:
    """How many entries are equal from the start on."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
