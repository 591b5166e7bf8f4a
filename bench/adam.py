"""The fused Adam beside PyTorch's and DeepSpeed's: parameters/s and GB/s of one update over a flat shard.

    python -m megalith.bench.adam                                    # CPU, with all of torch's threads
    python -m megalith.bench.adam --deepspeed_python PYTHON          # of an environment that has DeepSpeed
    python -m megalith.bench.adam --device cuda --numel 268435456 --json record.json

The entries take turns, round after round, in one run, and a ratio is always that of two readings of one round. GB/s
counts the bytes that the update has to move: of a split master 26 a parameter (weight, remainder and both moments read
and written, a bfloat16 gradient read), 14 with 8-bit moments, of a float32 weight 28. What an entry moves besides,
casts and temporaries, is its own loss. `scale in place` is the floor: what the memory gives to the simplest pass
that reads and writes.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels import (
    CODE_BLOCK_NUMEL,
    CODE_DTYPES,
    AdamHyper,
    fused_adam_,
    native,
    scales_numel,
    split_master,
    sum_of_squares,
)
from ..kernels.adam_step import AdamTensors
from ..kernels.cpu_adam import blocked_adam_
from ..kernels.reference import adam_reference_
from . import report
from .peer import Peer
from .step import DEEPSPEED_VARIABLE

DEEPSPEED_WORKER = Path(__file__).with_name("adam_deepspeed.py")
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decoupled=True, step=3)
SPLIT_BYTES, FLOAT32_BYTES = 26, 28
CODES_BYTES = 14 + 16 / CODE_BLOCK_NUMEL  # of a split master with 8-bit moments, whose scales are read and written
CUDA_CALLS = 20  # timed together, since one call is as short as its launch
# No power of two: tensors that lie 2 ** 27 bytes and a page apart, as malloc places 2 ** 25 float32, halve the speed of
# every entry, because the same element of each competes for one place in the caches and one bank of the memory.
NUMEL = 30_000_000

# Before each reading: OpenMP's idle threads spin for some milliseconds, those of the peer's process on our cores.
PAUSE_S = 0.05

# Of parameters/s on the CPU, entry over peer.
BARS = (
    ("megalith split bf16", "torch fused fp32", 1.0),
    ("megalith split bf16", "torch operations, split bf16", 3.0),
    ("megalith split bf16", "deepspeed cpu_adam with casts", 1.8),
)


@dataclass(frozen=True)
class Entry:
    name: str
    bytes_per_element: int
    seconds: Callable[[], float]  # does one update and returns how long it took
    note: str = ""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    entries, absent = [*adam_entries(args), *bandwidth_entries(args)], []
    deepspeed = None
    if args.device == "cpu" and args.deepspeed_python:
        needs = "deepspeed, a C++ compiler and ninja"
        sizes = args.numel, args.threads
        deepspeed = Peer(args.deepspeed_python, DEEPSPEED_WORKER, *sizes, needs=needs, DS_ACCELERATOR="cpu")
    try:
        if deepspeed:
            entries += deepspeed_entries(deepspeed)
        else:
            why = "absent: see --deepspeed_python" if args.device == "cpu" else "absent: runs on the CPU only"
            absent = [{"name": name, "note": why, "metrics": {}} for name in DEEPSPEED_UPDATES]
        readings = take_turns(entries, args.rounds)
    finally:
        if deepspeed:
            deepspeed.close()
    record = make_record(entries, absent, readings, deepspeed.facts["deepspeed"] if deepspeed else "absent", args)
    print(report.render(record))
    if args.json:
        report.save(record, args.json)


def adam_entries(args: argparse.Namespace) -> list[Entry]:
    torch.manual_seed(0)
    master = torch.randn(args.numel, device=args.device).mul_(0.02)
    grad = torch.randn(args.numel, device=args.device).to(torch.bfloat16)
    factor, found_inf = torch.full((1,), 0.5, device=args.device), torch.zeros(1, device=args.device)

    def moments():
        return torch.zeros_like(master), torch.zeros_like(master)

    high, low = split_master(master)
    split = AdamTensors(high, grad, *moments(), remainder=low)
    codes = AdamTensors(
        high.clone(),
        grad,
        *(torch.zeros_like(grad, dtype=dtype) for dtype in CODE_DTYPES.values()),
        remainder=low.clone(),
        scales=torch.zeros(scales_numel(args.numel), device=args.device),
    )
    whole = AdamTensors(master.clone(), grad.float(), *moments())
    fused = (master.clone(), grad.float(), *moments(), torch.full((), 3.0, device=args.device))
    parameter = torch.nn.Parameter(master)
    parameter.grad = grad.float()
    foreach = torch.optim.AdamW([parameter], lr=HYPER.lr, weight_decay=HYPER.weight_decay, foreach=True)
    torch_operations = blocked_adam_ if args.device == "cpu" else adam_reference_

    def torch_fused():
        weight, grad, exp_avg, exp_avg_sq, step = fused
        torch._fused_adamw_(
            [weight],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            lr=HYPER.lr,
            beta1=HYPER.beta1,
            beta2=HYPER.beta2,
            weight_decay=HYPER.weight_decay,
            eps=HYPER.eps,
            amsgrad=False,
            maximize=False,
        )

    def megalith(tensors):
        return lambda: fused_adam_(
            *tensors[:4],
            HYPER,
            factor=factor,
            found_inf=found_inf,
            remainder=tensors.remainder,
            scales=tensors.scales,
        )

    def entry(name, bytes_per_element, update, note):
        return Entry(name, bytes_per_element, stopwatch(update, args.device), note)

    return [
        entry("megalith split bf16", SPLIT_BYTES, megalith(split), "unscale and clip included"),
        entry("megalith split bf16, 8-bit moments", CODES_BYTES, megalith(codes), "unscale and clip included"),
        entry("megalith fp32", FLOAT32_BYTES, megalith(whole), "unscale and clip included"),
        entry("torch fused fp32", FLOAT32_BYTES, torch_fused, "torch._fused_adamw_, no unscale, no clip"),
        entry("torch foreach fp32", FLOAT32_BYTES, foreach.step, "torch.optim.AdamW(foreach=True)"),
        entry(
            "torch operations, split bf16",
            SPLIT_BYTES,
            lambda: torch_operations(split, HYPER, factor, found_inf),
            "the oracle, in blocks that fit the cache" if args.device == "cpu" else "the oracle",
        ),
    ]


def bandwidth_entries(args: argparse.Namespace) -> list[Entry]:
    source = torch.randn(args.numel, device=args.device)
    target, half = torch.zeros_like(source), source.to(torch.bfloat16)

    def entry(name, bytes_per_element, update, note):
        return Entry(name, bytes_per_element, stopwatch(update, args.device), note)

    return [
        entry("scale in place", 8, lambda: target.mul_(1.0), "the floor: fp32, each line read and written once"),
        entry("copy", 8, lambda: target.copy_(source), "fp32; a CPU also reads the lines that it writes"),
        entry("megalith sum of squares fp32", 4, lambda: sum_of_squares(source), "in float64"),
        entry("megalith sum of squares bf16", 2, lambda: sum_of_squares(half), "in float64"),
        entry("torch norm fp32", 4, lambda: torch.linalg.vector_norm(source), "in float32"),
        entry("torch norm bf16", 2, lambda: torch.linalg.vector_norm(half), "in bfloat16"),
    ]


def stopwatch(update: Callable[[], object], device: str) -> Callable[[], float]:
    def cpu() -> float:
        start = time.perf_counter()
        update()
        return time.perf_counter() - start

    def cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CUDA_CALLS):
            update()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CUDA_CALLS

    return cpu if device == "cpu" else cuda


DEEPSPEED_UPDATES = {"deepspeed cpu_adam": "step", "deepspeed cpu_adam with casts": "step with casts"}


def deepspeed_entries(peer: Peer) -> list[Entry]:
    notes = {"step": "no unscale, no clip, no casts", "step with casts": "unscale and clip, bf16 in and out"}
    bytes_per_element = {"step": FLOAT32_BYTES, "step with casts": SPLIT_BYTES}
    return [
        Entry(name, bytes_per_element[update], lambda update=update: peer.ask(update), notes[update])
        for name, update in DEEPSPEED_UPDATES.items()
    ]


def take_turns(entries: list[Entry], rounds: int) -> dict[str, list[float]]:
    """Seconds of every entry in every round. A round before the first touches all memory and is not kept."""
    readings = {entry.name: [] for entry in entries}
    for entry in entries:
        entry.seconds()
    for _ in range(rounds):
        for entry in entries:
            time.sleep(PAUSE_S)
            readings[entry.name].append(entry.seconds())
    return readings


def make_record(
    entries: list[Entry], absent: list[dict], readings: dict, deepspeed: str, args: argparse.Namespace
) -> dict:
    """The record that report.py draws; its form is told there."""
    rows = [
        {
            "name": entry.name,
            "note": entry.note,
            "metrics": {
                "G_elements_per_s": [args.numel / 1e9 / seconds for seconds in readings[entry.name]],
                "GB_per_s": [entry.bytes_per_element * args.numel / 1e9 / seconds for seconds in readings[entry.name]],
            },
        }
        for entry in entries
    ]
    checks = [
        {
            "name": f"{own} / {peer}",
            "values": [theirs / ours for ours, theirs in zip(readings[own], readings[peer], strict=True)],
            "at_least": bar,
        }
        for own, peer, bar in BARS
        if args.device == "cpu" and peer in readings
    ]
    settings = {
        "elements": args.numel,
        "rounds": args.rounds,
        "threads": args.threads,
        "instruction set": native.best_isa() if args.device == "cpu" else "Triton",
        "deepspeed": deepspeed,
    }
    return {
        "benchmark": "adam",
        "environment": report.environment(args.device),
        "settings": settings,
        "rows": rows + absent,
        "checks": checks,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.adam", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, default=NUMEL, help="elements of the shard")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--deepspeed_python", default=os.environ.get(DEEPSPEED_VARIABLE), help=f"or ${DEEPSPEED_VARIABLE}"
    )
    parser.add_argument("--json", type=Path, help="where to keep the record")
    args = parser.parse_args(argv)
    for name in ("numel", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this torch sees no GPU")
    return args


if __name__ == "__main__":
    main()
