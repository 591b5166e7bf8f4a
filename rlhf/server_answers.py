"""From token ids to pieces of text: a request's choices, generated side by side by the batcher's thread and read here.

The batcher says on its own thread that there is something new; that crosses to the event loop in one place, `_wake`.
Whoever starts an Answers closes it: that cancels what is still running, and is how a client that goes away stops its
request.
"""

import asyncio
import time
from dataclasses import dataclass

from .chat_text import TextStream


@dataclass(frozen=True)
class Piece:
    """Text that one choice has gained; its last piece has a `finish_reason`, "stop" or "length"."""

    choice: int
    text: str
    finish_reason: str | None = None


class _Choice:
    """One answer: the batcher's stream of tokens and how much of it has become text."""

    def __init__(self, stream, tokenizer, stop):
        self.stream, self.read_tokens = stream, 0
        self._stop_ids = stream.answer.options.stop_ids
        self._text = TextStream(tokenizer, stop)

    def advance(self):
        """The text of the tokens that are new, and a finish reason if they were the last. Raises what ended it."""
        reason = self.stream.finish_reason  # before the tokens: it follows the last of them
        text = ""
        for token in self.stream.tokens_from(self.read_tokens):
            self.read_tokens += 1
            if token not in self._stop_ids:
                text += self._text.push(token)
            if self._text.stopped:
                self.stream.cancel()
                return text, "stop"
        if reason is None:
            return text, None
        if self.stream.error is not None:
            raise self.stream.error
        text += self._text.finish()
        return text, "stop" if self._text.stopped else reason


class Answers:
    """`prompts`: lists of token ids; `options`: for each prompt the SamplingOptions of its choices.

    Submits at once, and raises what `Batcher.submit` raises: then nothing is left running.
    """

    def __init__(self, batcher, tokenizer, prompts, options, stop=()):
        self._loop = asyncio.get_running_loop()
        self._something_new = asyncio.Event()
        self._choices = []
        self.started_at, self.first_token_at = time.monotonic(), None
        self.prompt_tokens = sum(map(len, prompts))
        try:
            for prompt, choices in zip(prompts, options, strict=True):
                for chosen in choices:
                    stream = batcher.submit(prompt, chosen, self._wake)
                    self._choices.append(_Choice(stream, tokenizer, stop))
        except BaseException:
            self.close()
            raise

    @property
    def completion_tokens(self):
        return sum(choice.read_tokens for choice in self._choices)

    @property
    def reused_prompt_tokens(self):
        """Tokens of prompts that were computed for an earlier request."""
        return sum(choice.stream.reused_prompt_tokens for choice in self._choices)

    def _wake(self):
        try:
            self._loop.call_soon_threadsafe(self._something_new.set)
        except RuntimeError:  # the loop has closed: nobody reads any more
            pass

    async def pieces(self):
        """Yield Pieces as they come, those of all choices mixed. Raises what the batcher raised."""
        running = dict(enumerate(self._choices))
        while running:
            await self._something_new.wait()
            self._something_new.clear()
            for index, choice in list(running.items()):
                text, reason = choice.advance()
                if choice.read_tokens and self.first_token_at is None:
                    self.first_token_at = time.monotonic()
                if reason:
                    del running[index]
                if text or reason:
                    yield Piece(index, text, reason)

    async def texts(self):
        """Wait for all choices; return lists of their texts and finish reasons."""
        texts, reasons = [""] * len(self._choices), [None] * len(self._choices)
        async for piece in self.pieces():
            texts[piece.choice] += piece.text
            reasons[piece.choice] = piece.finish_reason
        return texts, reasons

    def close(self):
        """Cancel what still runs; may be called twice."""
        for choice in self._choices:
            choice.stream.cancel()
