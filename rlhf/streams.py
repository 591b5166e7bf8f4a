"""An answer that one thread writes and others read while it grows."""

import threading
import time
from collections.abc import Callable, Iterator

from .decoding import Answer


class QueueFullError(RuntimeError):
    """As many requests wait as may; the message has their number."""


class ClosedError(RuntimeError):
    """The batcher takes no more requests, or ended before this one was answered."""


class AnswerStream:
    """A request's answer, as it grows. Tokens are appended by the batcher's thread and may be read by any."""

    def __init__(self, answer: Answer, on_progress: Callable[[], object] | None) -> None:
        self.answer = answer
        self.finish_reason: str | None = None
        """ "stop", "length", "cancelled", "error", or None while the answer grows."""
        self.error: Exception | None = None
        self.reused_prompt_tokens = 0
        self.is_cancelled = False
        self.submitted_s = time.perf_counter()
        self._on_progress = on_progress
        self._changed = threading.Condition()

    def cancel(self) -> None:
        """Have the answer end with the step that runs now. May be called at any time, more than once."""
        self.is_cancelled = True

    def tokens_from(self, index: int) -> list[int]:
        """The tokens so far from `index` on. Does not wait."""
        return self.answer.tokens[index:]

    def wait(self, index: int, timeout_s: float | None = None) -> list[int]:
        """Tokens from `index` on, at least one of them unless the answer has ended or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.answer.tokens) > index or self.finish_reason, timeout_s)
        return self.tokens_from(index)

    def __iter__(self) -> Iterator[int]:
        """All tokens, each as soon as it is there. Raises what ended the answer where that was an error."""
        index = 0
        while True:
            tokens = self.wait(index)
            if not tokens:
                break
            yield from tokens
            index += len(tokens)
        if self.error is not None:
            raise self.error

    def notify(self, finish_reason: str | None, error: Exception | None = None) -> None:
        """Called by the batcher's thread when there is something new."""
        with self._changed:
            self.error = error
            self.finish_reason = finish_reason
            self._changed.notify_all()
        if self._on_progress is not None:
            self._on_progress()
