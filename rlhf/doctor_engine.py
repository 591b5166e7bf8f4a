"""The doctor's comparison of engines: every strategy, at one rank and at two, has the same curve of metrics."""

import json
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import doctor_tasks
from .doctor_run import Setting, build_learner, train
from .strategy import Ranks

TASK = doctor_tasks.count(vocab=8, new_tokens=4, iterations=3, episodes=64)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_cpu")
COMPARED = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg")


def curves(seed, ranks, progress=None):
    """{strategy: [number of COMPARED, iteration by iteration]}. A collective."""
    found = {}
    for strategy in STRATEGIES:
        rows = train(TASK, build_learner(TASK, seed, ranks, Setting(strategy=strategy)), progress)
        found[strategy] = [row[name] for row in rows for name in COMPARED]
    return found


def largest_difference(seed, ranks, progress):
    """The largest difference of any number from that of ddp on one rank, relative to 1 or to the number, whichever is
    larger; over all strategies at one rank, and at two in processes of their own."""
    alone = curves(seed, ranks, progress)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (seed, folder), nprocs=2)
        together = json.loads(Path(folder, "curves.json").read_text())
    expected = alone["ddp"]
    progress(TASK.iterations * len(STRATEGIES))
    return max(
        abs(number - other) / max(1.0, abs(other))
        for found in (alone, together)
        for numbers in found.values()
        for number, other in zip(numbers, expected, strict=True)
    )


def _rank(rank, seed, folder):
    """One of two ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    found = curves(seed, Ranks(rank, 2, torch.device("cpu")))
    if rank == 0:
        Path(folder, "curves.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
