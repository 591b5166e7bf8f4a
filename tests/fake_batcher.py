"""A batcher without a model, for tests of what surrounds one: it answers with given texts, at a given pace."""

import threading
import time

from megalith.rlhf.batching import AnswerStream, BatchingStats, QueueFullError
from megalith.rlhf.decoding import Answer


class FakeBatcher:
    """`reply(prompt text) -> text` or an exception; all requests advance one token each `pause_s`."""

    def __init__(self, tokenizer, reply, pause_s=0.0, max_queue=64):
        self._tokenizer, self._reply, self._pause_s, self._max_queue = tokenizer, reply, pause_s, max_queue
        self.streams, self._growing, self._is_open = [], {}, True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, prompt, options, on_progress=None):
        reply = self._reply(self._tokenizer.decode(prompt, skip_special_tokens=True))
        with self._lock:
            if len(self._growing) >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests wait already, which is the limit")
            stream = AnswerStream(Answer(list(prompt), options, options.seed or 0), on_progress)
            self.streams.append(stream)
            self._growing[stream] = reply if isinstance(reply, Exception) else iter(self._tokens_of(reply))
        return stream

    def _tokens_of(self, text):
        return [*self._tokenizer(text, add_special_tokens=False).input_ids, self._tokenizer.eos_token_id]

    def _run(self):
        while self._is_open:
            with self._lock:
                growing = list(self._growing.items())
            for stream, reply in growing:
                self._step(stream, reply)
                if stream.finish_reason:
                    with self._lock:
                        del self._growing[stream]
            time.sleep(self._pause_s or 0.0005)

    def _step(self, stream, reply):
        if isinstance(reply, Exception):
            stream.notify("error", reply)
        elif stream.is_cancelled:
            stream.notify("cancelled")
        else:
            stream.answer.tokens.append(next(reply))
            stream.notify(stream.answer.finish_reason)

    def running(self):
        return len(self._growing)

    def stats(self):
        numbers = dict.fromkeys(BatchingStats.__dataclass_fields__, 0)
        return BatchingStats(**{**numbers, "running": self.running(), "finished": {}})

    def close(self, timeout_s=None):
        self._is_open = False
        self._thread.join()
