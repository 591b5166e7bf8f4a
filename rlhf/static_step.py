"""One decoding step with fixed shapes, recorded as a CUDA graph and replayed.

At one row a step of a 7B model is some thousand kernels of a few microseconds each, which the host cannot launch as
fast as the GPU runs them. A graph launches them all at once. What it needs: inputs in buffers of their own, attention
over all allocated columns (a mask hides those that are not used), and nothing that the host would have to wait for.

The CPU's tests run all but the recording, tests/gpu/test_decoding_graph.py that too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .. import engine
from .kv_cache import KVCache

# Whose forward passes never wait for the GPU in a step. Experts do: they look up which rows were sent to which.
GRAPHED = frozenset({"bloom", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})

Forward = Callable[[torch.Tensor, KVCache, torch.Tensor | None, torch.Tensor], torch.Tensor]


def can_record(model: nn.Module, device: torch.device) -> bool:
    """Whether steps of `model` can be replayed: on a GPU, of a known kind, its weights where they are for good,
    or until a `gathered` context ends, inside of which all steps then are.

    Of eager attention, which BLOOM has, transformers makes the mask from a number on the host: no graph captures it."""
    config = model.config.get_text_config(decoder=True)
    if device.type != "cuda" or config.model_type not in GRAPHED or config._attn_implementation == "eager":
        return False
    try:
        return engine.is_gathered(model)  # else the engine moves its weights
    except ValueError:
        return True


class StaticStep:
    """A step of all rows that `cache` has allocated; valid while `cache.version` stays what it was.

    `forward(ids [R, 1], cache, mask [R, columns], positions [R, 1])` gives logits [R, V].
    """

    def __init__(self, forward: Forward, cache: KVCache, device: torch.device) -> None:
        rows, columns = cache.allocated
        self.version = cache.version
        self._cache = cache
        self._forward = forward
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._columns = torch.arange(columns, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits [B, V] of the rows that are in use, whose next tokens are ids [B, 1] at positions `lengths`. Valid
        until the next call."""
        count = len(lengths)
        self._ids[:count] = ids
        self._positions.zero_()  # a row that is not used writes its column 0, which a new row overwrites
        self._positions[:count, 0] = torch.tensor(lengths).to(self._positions.device)
        if self._ids.device.type != "cuda":  # tests of everything but the recording
            self._logits = self._run()
        elif self._graph is None:
            self._record()
        else:
            self._graph.replay()
        return self._logits[:count]

    def _run(self) -> torch.Tensor:
        self._cache.plan_static(self._positions[:, 0])
        return self._forward(self._ids, self._cache, self._columns <= self._positions, self._positions)

    def _record(self) -> None:
        device = self._ids.device
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: a server's do.
        recording = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        # Before it, twice without recording, as torch asks for: libraries allocate and choose kernels then. On the very
        # stream, which is the same for all graphs of the process: cuBLAS keeps 32 MiB for each that it has seen, for
        # good. Running a step again writes the same keys and values.
        recording.capture_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(recording.capture_stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream(device).wait_stream(recording.capture_stream)
        with recording:
            self._logits = self._run()
        self._graph.replay()
