"""Numbers of a run: `metrics.jsonl`, TensorBoard, optionally Weights & Biases, and a progress bar, all on the first
rank only.
"""

import contextlib
import json
import math
import resource
from pathlib import Path

import torch
from tqdm import tqdm


def peak_memory_bytes(device):
    """The most this rank has held: allocated on the GPU, or resident in RAM for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Tokens a second over all ranks, and TFLOPS a rank, of the steps since the last line.

    Operations are those of the model's mathematics: 2 a weight and token forward, 4 backward (2 for a frozen weight),
    and of causal attention 4 · layers · width for every pair of tokens forward, twice that backward. What gradient
    checkpointing computes again, and padding, are not counted.
    """

    def __init__(self, model, world_size):
        self._world_size = world_size
        # An embedding that is only looked up multiplies nothing; one tied to the head is the head.
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            looked_up -= {id(head.weight)}
        multiplied = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in looked_up]
        self._flops_a_token = sum((6 if p.requires_grad else 4) * p.numel() for p in multiplied)
        config = model.config.get_text_config()
        self._flops_a_pair = 12 * config.num_hidden_layers * config.hidden_size
        self._tokens = self._attended = 0

    def after_step(self, window):
        self._tokens += window.tokens
        self._attended += window.attended

    def numbers(self, elapsed_s):
        flops = self._tokens * self._flops_a_token + self._attended * self._flops_a_pair
        tokens, self._tokens, self._attended = self._tokens, 0, 0
        return {"tokens_per_s": tokens / elapsed_s, "tflops": flops / elapsed_s / self._world_size / 1e12}


class PeakMemory:
    def __init__(self, device):
        self._device = device

    def after_step(self, window):
        pass

    def numbers(self, elapsed_s):
        return {"peak_memory_bytes": peak_memory_bytes(self._device)}


def memory_table(report):
    """The lines of `engine.memory_report` that are not zero: tier, payload, MB now and at the peak."""
    rows = [
        f"{tier:<8}{payload:<12}{sizes['bytes'] / 1e6:>12.1f}{sizes['peak_bytes'] / 1e6:>12.1f}"
        for tier, payloads in report.items()
        for payload, sizes in payloads.items()
        if sizes["peak_bytes"]
    ]
    return "\n".join([f"{'tier':<8}{'payload':<12}{'MB now':>12}{'MB at peak':>12}", *rows])


def reopened(path, first_step):
    """A file of JSON rows that hold a `step`, open at its end for writing, without the rows beyond `first_step`. A
    run that was killed may have left half a row, which it writes again."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n") if first_step and path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", buffering=1, encoding="utf-8")


class MetricsLog:
    """Writes rows of numbers that hold a `step`. On other ranks than the first every method does nothing.

    `first_step`: rows of a former run beyond it are dropped, so that a resumed run's file equals that of an
    uninterrupted one.
    """

    def __init__(self, folder, enabled, first_step, total_steps, tensorboard=True, wandb_project=None, config=None):
        self._file = self._board = self._wandb = None
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=None if enabled else True, dynamic_ncols=True
        )
        if not enabled:
            return
        self._file = reopened(Path(folder) / "metrics.jsonl", first_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and one rank needs it

            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first_step or None)
        if wandb_project:
            import wandb

            self._wandb = wandb.init(project=wandb_project, dir=str(folder), config=config)

    def advance(self):
        self._bar.update()

    def write(self, row):
        """Log one row: a dict of numbers with a `step`. What is not finite is null in the file."""
        if self._file is None:
            return
        told = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(told) + "\n")
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])
        tqdm.write("  ".join(f"{name} {value:.6g}" for name, value in row.items()))

    def close(self):
        self._bar.close()
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()
