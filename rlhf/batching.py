"""Continuous batching: requests of many threads, answered by one thread that owns the model.

    batcher = Batcher(model)
    stream = batcher.submit(prompt_ids, SamplingOptions(stop_ids=(2,)))
    for token in stream: ...
    batcher.close()

Each turn of the thread's loop runs a piece of the prompts that wait, then one step of all answers that grow: a long
prompt delays the others by a piece of it, not by all of it.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from .decoding import Answer, Decoder, check_prompt
from .kv_cache import BLOCK, KVCache, bytes_per_token
from .prefixes import PrefixStore
from .sampling import MAX_SEED, SamplingOptions
from .streams import AnswerStream, ClosedError, QueueFullError


@dataclass(frozen=True, kw_only=True)
class BatchingOptions:
    """Limits of a Batcher. Raises ValueError that names the field."""

    max_batch: int = 32
    """Answers that grow at a time."""
    max_queue: int = 256
    """Requests that may wait for their turn."""
    kv_budget_bytes: int | None = None
    """For keys and values, those of kept prefixes included; None takes half of the memory that is free at start."""
    prefix_share: float = 0.25
    """The part of it that keeps the keys and values of answered requests, for prompts that go on from them."""
    prefill_chunk: int = 512
    """Prompt tokens that are computed between two steps."""

    def __post_init__(self) -> None:
        for field in ("max_batch", "max_queue", "prefill_chunk"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r}: must be a whole number, at least 1")
        if self.kv_budget_bytes is not None and self.kv_budget_bytes < 1:
            raise ValueError(f"kv_budget_bytes={self.kv_budget_bytes!r}: must be above 0")
        if not 0 <= self.prefix_share < 1:
            raise ValueError(f"prefix_share={self.prefix_share!r}: must be at least 0 and below 1")


@dataclass(frozen=True)
class BatchingStats:
    """Counts since the start, and what is going on now."""

    waiting: int
    running: int
    finished: dict[str, int]
    """By finish reason."""
    rejected: int
    """Because the queue was full."""
    prompt_tokens: int
    reused_prompt_tokens: int
    """Those of them whose keys and values were kept from an earlier request."""
    new_tokens: int
    tokens_per_s: float
    """New tokens of the last ten seconds."""
    first_token_s: float
    """Sum over requests of the time from `submit` to the first token."""
    first_tokens: int
    kv_bytes: int
    prefix_bytes: int
    """Part of kv_bytes."""


class Batcher:
    """Answers requests with `model`, which nobody else may use until `close` has returned."""

    def __init__(self, model: nn.Module, options: BatchingOptions | None = None) -> None:
        self._model = model.eval()
        self._options = options or BatchingOptions()
        self._device = model.get_input_embeddings().weight.device
        self._bytes_per_token = bytes_per_token(model)
        budget = self._options.kv_budget_bytes or free_bytes(self._device) // 2
        self._budget_bytes = int(budget * (1 - self._options.prefix_share))
        self._prefixes = PrefixStore(budget - self._budget_bytes)
        self._decoder = Decoder(model)
        self._running: dict[int, AnswerStream] = {}  # by id() of the answer
        self._prefilling: _Prefill | None = None
        self._waiting: deque[AnswerStream] = deque()
        self._state = threading.Condition()
        self._is_closed = False
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._first_token_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # (when, new tokens) of the last ten seconds
        self._thread = threading.Thread(target=self._run, name="megalith-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        on_progress: Callable[[], object] | None = None,
    ) -> AnswerStream:
        """Ask for an answer to `prompt` (token ids). Returns at once.

        `on_progress` is called without arguments, by the batcher's thread, whenever the answer has grown or ended: it
        must return at once. With asyncio: `lambda: loop.call_soon_threadsafe(event.set)`.

        Raises ValueError for a prompt that can never be answered, QueueFullError, and ClosedError after `close`.
        """
        prompt = list(prompt)
        check_prompt(self._model, prompt, options.max_new_tokens)
        needed_bytes = self._bytes_needed([len(prompt) + options.max_new_tokens])
        if needed_bytes > self._budget_bytes:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={options.max_new_tokens} need {needed_bytes} "
                f"bytes for keys and values, and there are {self._budget_bytes}: shorten one of them"
            )
        seed = torch.randint(MAX_SEED, ()).item() if options.seed is None else options.seed
        stream = AnswerStream(Answer(prompt, options, seed), on_progress)
        with self._state:
            if self._is_closed:
                raise ClosedError("the batcher is closed")
            if len(self._waiting) >= self._options.max_queue:
                self._totals["rejected"] += 1
                raise QueueFullError(f"{len(self._waiting)} requests wait already, which is the limit")
            self._waiting.append(stream)
            self._totals["prompt_tokens"] += len(prompt)
            self._state.notify()
        return stream

    def stats(self) -> BatchingStats:
        with self._state:
            now_s = time.perf_counter()
            self._forget_old(now_s)
            span_s = min(10.0, now_s - self._recent[0][0]) if self._recent else 0.0
            return BatchingStats(
                waiting=len(self._waiting) + (self._prefilling is not None),
                running=len(self._running),
                finished=dict(self._finished),
                rejected=self._totals["rejected"],
                prompt_tokens=self._totals["prompt_tokens"],
                reused_prompt_tokens=self._totals["reused_prompt_tokens"],
                new_tokens=self._totals["new_tokens"],
                tokens_per_s=sum(count for _, count in self._recent) / max(span_s, 1.0),
                first_token_s=self._first_token_s,
                first_tokens=self._totals["first_tokens"],
                kv_bytes=self._totals["kv_bytes"] + self._prefixes.nbytes,
                prefix_bytes=self._prefixes.nbytes,
            )

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more requests, answer those that are there, and end the thread. What is not answered after
        `timeout_s` ends with ClosedError."""
        with self._state:
            self._is_closed = True
            self._state.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._state:
                streams = [*self._waiting, *self._running.values()]
                streams += [self._prefilling.stream] if self._prefilling else []
            for stream in streams:
                stream.cancel()
            self._thread.join()
            for stream in streams:
                if stream.finish_reason == "cancelled":
                    stream.error = ClosedError("the batcher was closed before the answer was complete")

    # The thread

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._has_work or self._is_closed)
                if self._is_closed and not self._waiting and not self._has_work:
                    return
            try:
                self._drop_cancelled()
                self._prefill()
                if self._decoder.answers:
                    self._decoder.step()
                    self._deliver(self._decoder.answers)
            except Exception as error:  # whatever it was, the next requests deserve a fresh start
                self._fail(error)

    @property
    def _has_work(self) -> bool:
        return self._prefilling is not None or bool(self._running)

    def _prefill(self) -> None:
        """Run up to `prefill_chunk` tokens of prompts: short ones together, a long one in pieces."""
        left = self._options.prefill_chunk
        while left > 0:
            if self._prefilling is None:
                group = self._admit(left)
                if not group:
                    return
                if len(group) > 1:
                    answers = [stream.answer for stream in group]
                    self._start(group, lambda answers=answers: self._decoder.prefill(answers))
                    left -= len(group) * max(len(answer.prompt) for answer in answers)
                    continue
                self._begin(group[0])
            current = self._prefilling
            answer, done = current.stream.answer, current.done
            ids = answer.prompt[done : done + left]
            logits = self._decoder.extend(current.cache, ids)
            left -= len(ids)
            if current.done < len(answer.prompt):
                return
            with self._state:
                self._prefilling = None
            self._start([current.stream], lambda c=current, x=logits: self._decoder.join(c.stream.answer, c.cache, x))

    def _admit(self, left: int) -> list[AnswerStream]:
        """Take the next request that waits, if there is room for it; and those behind it that need not go alone, while
        together they have at most `left` tokens, padding included."""
        group: list[AnswerStream] = []
        everyone = list(self._decoder.answers)
        longest = 0
        with self._state:
            while self._waiting and len(everyone) < self._options.max_batch:
                answer = self._waiting[0].answer
                everyone.append(answer)
                if (
                    self._bytes_needed([len(a.prompt) + a.options.max_new_tokens for a in everyone])
                    > self._budget_bytes
                ):
                    break
                longest = max(longest, len(answer.prompt))
                fits = longest * (len(group) + 1) <= left and self._prefixes.find(answer.prompt) is None
                if fits or not group:
                    group.append(self._waiting.popleft())
                if not fits:
                    break
        return group

    def _begin(self, stream: AnswerStream) -> None:
        """Begin a prompt on its own, with what is kept of its beginning."""
        cache = KVCache(self._model.config)
        with self._state:
            self._prefilling = _Prefill(stream, cache)
        prefix = self._prefixes.find(stream.answer.prompt)
        if prefix is not None:
            cache.append(prefix)
            stream.reused_prompt_tokens = prefix.length
            self._totals["reused_prompt_tokens"] += prefix.length

    def _start(self, streams: Sequence[AnswerStream], join: Callable[[], None]) -> None:
        """Let the answers of `streams` join the batch, by calling `join`, with their first token."""
        with self._state:
            self._running.update({id(stream.answer): stream for stream in streams})
        join()
        now_s = time.perf_counter()
        with self._state:
            self._first_token_s += sum(now_s - stream.submitted_s for stream in streams)
            self._totals["first_tokens"] += len(streams)
        self._deliver([stream.answer for stream in streams])

    def _deliver(self, answers: Sequence[Answer]) -> None:
        """Tell the streams of `answers` of one more token, and let go of those that have ended."""
        now_s = time.perf_counter()
        with self._state:
            self._totals["new_tokens"] += len(answers)
            self._totals["kv_bytes"] = self._decoder.cache.nbytes
            self._recent.append((now_s, len(answers)))
            self._forget_old(now_s)
        for answer in list(answers):
            if answer.finish_reason:
                self._finish(answer, answer.finish_reason)
            else:
                self._running[id(answer)].notify(None)

    def _finish(self, answer: Answer, reason: str) -> None:
        index = next(i for i, other in enumerate(self._decoder.answers) if other is answer)
        self._prefixes.keep(answer.prompt + answer.tokens, self._decoder.cache.read(index))
        self._decoder.drop(index)
        with self._state:
            stream = self._running.pop(id(answer))
            self._finished[reason] += 1
            self._totals["kv_bytes"] = self._decoder.cache.nbytes
        stream.notify(reason)

    def _drop_cancelled(self) -> None:
        with self._state:
            gone = [stream for stream in self._waiting if stream.is_cancelled]
            for stream in gone:
                self._waiting.remove(stream)
            if self._prefilling is not None and self._prefilling.stream.is_cancelled:
                gone.append(self._prefilling.stream)
                self._prefilling = None
            self._finished += Counter(cancelled=len(gone))
        for stream in gone:
            stream.notify("cancelled")
        for stream in [stream for stream in self._running.values() if stream.is_cancelled]:
            self._finish(stream.answer, "cancelled")

    def _fail(self, error: Exception) -> None:
        """End everything that was being computed with `error`."""
        with self._state:
            streams = list(self._running.values())
            streams += [self._prefilling.stream] if self._prefilling else []
            self._running.clear()
            self._prefilling = None
            self._finished["error"] += len(streams)
            self._totals["kv_bytes"] = 0
        self._decoder = Decoder(self._model)
        for stream in streams:
            stream.notify("error", error)

    def _bytes_needed(self, lengths: Sequence[int]) -> int:
        """Of a cache whose rows may become `lengths` long, in whole blocks."""
        columns = -(-max(lengths) // BLOCK) * BLOCK
        return len(lengths) * columns * self._bytes_per_token

    def _forget_old(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - 10:
            self._recent.popleft()


@dataclass
class _Prefill:
    """A prompt that is being computed, in a cache of its own."""

    stream: AnswerStream
    cache: KVCache

    @property
    def done(self) -> int:
        """Tokens of the prompt that are in the cache."""
        return sum(self.cache.lengths)


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
