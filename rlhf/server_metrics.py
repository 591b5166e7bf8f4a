"""Counters of a server for Prometheus, and what it holds in memory."""

import time

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FROM_BATCHER = {
    "running": "Answers that are growing",
    "waiting": "Requests that wait for their turn",
    "rejected": "Requests refused because the queue was full",
    "reused_prompt_tokens": "Prompt tokens whose keys and values were kept from an earlier request",
    "tokens_per_s": "Tokens generated a second, over the last ten seconds",
    "kv_bytes": "Bytes of keys and values",
}


def memory_bytes(device):
    """What this process holds now: allocated on the GPU, or resident in RAM for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


class Metrics:
    """Of one server; `batcher.stats()` is read when the metrics are."""

    def __init__(self, device, batcher):
        self.registry = CollectorRegistry()
        shared = {"namespace": "megalith", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered, by route and status", ["route", "status"], **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were answered", **shared)
        self.completion_tokens = Counter("completion_tokens", "Tokens generated", **shared)
        self.cancelled = Counter("cancelled_requests", "Requests whose client went away", **shared)
        self.first_token = Histogram("first_token_seconds", "Time to first token", buckets=_SECONDS, **shared)
        self.duration = Histogram("answer_seconds", "Time to a whole answer", buckets=_SECONDS, **shared)
        Gauge("memory_bytes", "Bytes held", **shared).set_function(lambda: memory_bytes(device))
        for name, text in _FROM_BATCHER.items():
            Gauge(name, text, **shared).set_function(lambda name=name: getattr(batcher.stats(), name))

    def record(self, answers, finished):
        """Count one request's Answers when they are over; `finished`: they were not cut off."""
        self.prompt_tokens.inc(answers.prompt_tokens)
        self.completion_tokens.inc(answers.completion_tokens)
        if answers.first_token_at is not None:
            self.first_token.observe(answers.first_token_at - answers.started_at)
        if finished:
            self.duration.observe(time.monotonic() - answers.started_at)
        else:
            self.cancelled.inc()

    def text(self):
        """All of them in Prometheus' text format, as bytes."""
        return generate_latest(self.registry)


class CountedRequests:
    """ASGI middleware that counts answered requests. Paths beyond `routes` share one label: there is no end to them."""

    def __init__(self, app, metrics, routes):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope, receive, send):
        async def counted(message):
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
