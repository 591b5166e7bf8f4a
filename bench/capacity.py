"""The largest LLaMA-shaped model that trains under a memory limit: plain PyTorch, FSDP2 with CPU offload, megalith.

    python -m megalith.bench.capacity --limit 3GB --nvme_dir /scratch --json record.json --plot record.png
    python -m megalith.bench.capacity --limit 3GB --nvme_dir /scratch --only megalith-nvme --size 1.63e9   # one size
    python -m megalith.bench.capacity --device cuda --device_budget 24GB --nvme_dir /scratch

A size fits if two real training steps end in a fresh process under the limit, and each of three losses on the same
tokens is finite and below the one before. Sizes are looked for by bisection on a ladder of models whose steps are a few
percent; the next larger one was tried and did not fit. `--limit` is a hard limit on all RAM of the process, its page
cache counted (see memory_limit.py). On a GPU it is what the machine has free unless told otherwise, and the other limit
is the card's memory: all of it, or `--device_budget`, which makes a large card stand for a small one.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.config import parse_bytes
from ..engine.direct_io import filesystem_type, free_bytes
from ..engine.machine import host_available_bytes
from . import report
from .capacity_worker import OUT_OF_MEMORY
from .launch import RankError, run_ranks
from .memory_limit import memory_limit

VOCABULARY = 32000
HEAD_NUMEL = 64
# Width of the model and of its MLP, as in the LLaMA family and its smaller relatives.
WIDTHS = (
    (128, 344), (256, 688), (512, 1376), (768, 2048), (1024, 2816), (1536, 4096), (2048, 5632), (2560, 6912),
    (3072, 8192), (4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (12288, 33024),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One row. `guess` is where the search begins: bytes a parameter of the memory that the model has to fit in."""

    name: str
    peer: str
    guess: float
    precision: str = "bf16"
    checkpoint_activations: bool = True
    placement: str | None = None
    state_precision: str = "exact"

    def first_guess(self, args: argparse.Namespace) -> float:
        """Parameters."""
        on_card = args.device == "cuda" and (self.peer == "native" or self.placement == "device")
        numel = (args.device_budget if on_card else args.limit) / self.guess
        if self.placement in ("nvme", "auto"):
            numel = min(numel, free_bytes(args.nvme_dir) / DRIVE_GUESS)
        return numel

    def engine_options(self, nvme_dir: str | None) -> dict:
        options = {"placement": self.placement, "state_precision": self.state_precision}
        if self.placement in ("nvme", "auto"):
            options["nvme_dir"] = nvme_dir
        return options


DRIVE_GUESS = 20
"""Bytes a parameter on a drive, gradients included."""

ENTRIES = (
    Entry("native-fp32", "native", 20, precision="fp32", checkpoint_activations=False),
    Entry("native-bf16-checkpointed", "native", 20),
    Entry("fsdp2-cpu-offload", "fsdp2", 20),
    *(
        Entry(f"megalith-{placement}{suffix}", "megalith", guess, placement=placement, state_precision=precision)
        for suffix, precision in (("", "exact"), ("-8bit", "8bit"))
        for placement, guess in (("device", 15), ("host", 15), ("nvme", 1.8), ("auto", 1.8))
    ),
)

NUMEL_AT_LEAST = 10.3
"""What megalith-nvme has to train of native-fp32's parameters under the same limit."""


@dataclass(frozen=True)
class Rung:
    """One model of the ladder: `fields` of LlamaConfig."""

    numel: int
    fields: dict


@dataclass(frozen=True)
class Try:
    """What came of one size. `reading` is the worker's where it fits; `reason` tells why it does not."""

    rung: Rung
    seconds: float
    reading: dict | None = None
    reason: str = ""


class EntryFailed(RuntimeError):
    """An entry failed for another reason than memory: nothing is known of its capacity."""


def ladder() -> list[Rung]:
    """Models in order of size. A width serves until it is as deep as in the LLaMA family: a layer for 64 of it."""
    rungs: list[Rung] = []
    for hidden, intermediate in WIDTHS:
        layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
        for layers in range(1, hidden // 64 + 1):
            numel = 2 * VOCABULARY * hidden + hidden + layers * layer
            # Steps below 2 % would be within what one run differs from the next.
            if not rungs or numel > 1.02 * rungs[-1].numel:
                rungs.append(Rung(numel, model_fields(hidden, intermediate, layers)))
    return rungs


def model_fields(hidden: int, intermediate: int, layers: int) -> dict:
    heads = hidden // HEAD_NUMEL
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
    }


def nearest(rungs: list[Rung], numel: float) -> int:
    return min(range(len(rungs)), key=lambda index: abs(math.log(rungs[index].numel / numel)))


def largest(fits: Callable[[int], bool], count: int, start: int) -> int:
    """The last index below `count` that fits, or -1, if all below a fitting one fit. Strides double from `start` until
    an index that fits and one that does not are known; what is between is halved."""
    low, high, stride = -1, count, 1
    index = start
    while high - low > 1:
        if fits(index):
            low = index
        else:
            high = index
        if low == -1 or high == count:
            index = min(low + stride, count - 1) if high == count else max(high - stride, 0)
            stride *= 2
        else:
            index = (low + high) // 2
    return low


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if an entry failed for another reason than memory. A missed bar is only printed."""
    args = parse_args(argv)
    named = {entry.name: entry for entry in ENTRIES}
    entries = [named[name] for name in args.only or named]
    rows, failed, kinds = [], False, set()
    for entry in entries:
        try:
            rows.append(measure_row(entry, args, kinds))
        except EntryFailed as error:
            failed = True
            rows.append({"name": entry.name, "note": f"FAILED: {error}", "metrics": {}})
        if args.json:  # a search takes long: what is known is kept
            report.save(make_record(rows, kinds, args), args.json)
    record = make_record(rows, kinds, args)
    print("\n" + report.render(record))
    if args.json:
        report.save(record, args.json)
    if args.plot:
        report.plot(record, args.plot, ["model_numel", "tokens_per_s"])
    return 1 if failed else 0


def measure_row(entry: Entry, args: argparse.Namespace, kinds: set[str]) -> dict:
    """Search an entry's capacity, or try the one size that was asked for. Raises EntryFailed."""
    rungs = [rung for rung in ladder() if args.most is None or rung.numel <= args.most]
    tries: dict[int, Try] = {}

    def fits(index: int) -> bool:
        tries[index] = attempt(entry, rungs[index], args, args.limit, args.device_budget, kinds)
        return tries[index].reading is not None

    if args.size is not None:
        index = nearest(rungs, args.size)
        best = index if fits(index) else -1
    else:
        best = largest(fits, len(rungs), nearest(rungs, entry.first_guess(args)))
    larger = min((index for index in tries if index > best), default=None)
    notes = [] if larger is None else [f"{report.number('_numel', rungs[larger].numel)} M: {tries[larger].reason}"]
    if best == len(rungs) - 1:
        notes.append("larger ones were not tried")
    if best < 0:
        return {"name": entry.name, "note": "; ".join(["nothing fits", *notes]), "metrics": {}}
    reading = tries[best].reading
    if args.verify and entry.peer == "megalith":
        notes.append(verify(entry, tries[best], args, kinds))
    notes.insert(0, "losses " + " ".join(f"{loss:.4f}" for loss in reading["losses"]))
    metrics = {"model_numel": rungs[best].numel, **reading["metrics"]}
    return {"name": entry.name, "note": "; ".join(notes), "metrics": {k: [v] for k, v in metrics.items()}}


def verify(entry: Entry, best: Try, args: argparse.Namespace, kinds: set[str]) -> str:
    """Train the size that fits once more, without limits: its losses have to be the same. Raises EntryFailed."""
    unlimited = attempt(entry, best.rung, args, None, None, set())
    if unlimited.reading is None:
        raise EntryFailed(f"{best.rung.numel} parameters fit only under the limit: {unlimited.reason}")
    if unlimited.reading["losses"] != best.reading["losses"]:
        raise EntryFailed(f"losses {best.reading['losses']}, and {unlimited.reading['losses']} without the limit")
    return "the same without the limit"


def attempt(
    entry: Entry,
    rung: Rung,
    args: argparse.Namespace,
    limit_bytes: int | None,
    device_budget: int | None,
    kinds: set[str],
) -> Try:
    """Train one size in a fresh process. Raises EntryFailed if that fails for another reason than memory."""
    start_s = time.monotonic()
    label = f"{entry.name:<26}{report.number('_numel', rung.numel):>8} M  "
    # A GPU's driver maps far more than it holds: there a resource limit on what is mapped would say nothing.
    with (
        tempfile.TemporaryDirectory() as folder,
        memory_limit(limit_bytes, or_mapped=args.device == "cpu") as limit,
    ):
        kinds.add(limit.kind)
        result, progress = Path(folder) / "result.json", Path(folder) / "progress"
        options = {
            "peer": entry.peer,
            "precision": entry.precision,
            "checkpoint_activations": entry.checkpoint_activations,
            "engine": entry.engine_options(str(args.nvme_dir)),
            "device": args.device,
            "device_budget": device_budget,
            "model": rung.fields,
            "batch_size": args.batch_size,
            "seq_len": args.seq_len,
            "lr": args.lr,
            "progress": str(progress),
        }
        worker = [sys.executable, "-P", "-m", "megalith.bench.capacity_worker", json.dumps(options), str(result)]
        try:
            run_ranks(
                limit.command(worker), 1, timeout_s=args.timeout_s, while_waiting=lambda: show(label, progress, start_s)
            )
        except RankError as error:
            # Without a group, the kernel kills when the machine has no memory left.
            killed = limit.killed() or (limit.kind == "none" and error.code == -signal.SIGKILL)
            outcome = Try(rung, time.monotonic() - start_s, reason="killed by the kernel" if killed else last(error))
            say(f"{label}{outcome.reason}  ({outcome.seconds:.0f} s)")
            if not killed and error.code != OUT_OF_MEMORY:
                print(error, flush=True)
                raise EntryFailed(f"at {report.number('_numel', rung.numel)} M: {last(error)}") from error
            return outcome
        reading = json.loads(result.read_text())
        if (peak := limit.peak_bytes()) is not None:
            reading["metrics"]["peak_memory_bytes"] = peak
    losses = reading["losses"]
    if not all(math.isfinite(a) and b < a for a, b in zip(losses, losses[1:], strict=False)):
        raise EntryFailed(f"at {report.number('_numel', rung.numel)} M the losses are {losses}")
    outcome = Try(rung, time.monotonic() - start_s, reading)
    shown = "   ".join(f"{report.label(m)} {report.number(m, v)}" for m, v in reading["metrics"].items())
    say(f"{label}fits   {shown}  ({outcome.seconds:.0f} s)")
    return outcome


def show(label: str, progress: Path, start_s: float) -> None:
    """What a try is at, on a terminal."""
    if sys.stdout.isatty() and progress.exists():
        say(f"{label}{progress.read_text()}  ({time.monotonic() - start_s:.0f} s)", end="")


def say(line: str, end: str = "\n") -> None:
    """In place of what `show` has left on the terminal's line."""
    print(f"\r{line}\033[K" if sys.stdout.isatty() else line, end=end, flush=True)


def last(error: RankError) -> str:
    return str(error).strip().splitlines()[-1]


def make_record(rows: list[dict], kinds: set[str], args: argparse.Namespace) -> dict:
    """The record that report.py draws; its form is told there."""
    numel = {row["name"]: row["metrics"]["model_numel"][0] for row in rows if "model_numel" in row["metrics"]}
    checks = []
    if args.device == "cpu" and args.size is None and {"megalith-nvme", "native-fp32"} <= numel.keys():
        ratio = numel["megalith-nvme"] / numel["native-fp32"]
        checks.append(
            {"name": "megalith-nvme / native-fp32, parameters", "values": [ratio], "at_least": NUMEL_AT_LEAST}
        )
    return {
        "benchmark": "capacity",
        "environment": report.environment(args.device),
        "settings": {
            "limit": f"{args.limit} bytes of RAM in all, by {', '.join(sorted(kinds)) or 'nothing that was measured'}",
            **({"GPU memory": f"{args.device_budget} bytes, by PyTorch's allocator"} if args.device == "cuda" else {}),
            "batch": f"{args.batch_size} x {args.seq_len} tokens",
            "vocabulary": VOCABULARY,
            "drive": f"{filesystem_type(args.nvme_dir)}, {free_bytes(args.nvme_dir)} bytes free",
            "commit": commit(),
        },
        "rows": rows,
        "checks": checks,
    }


def commit() -> str:
    """Of the code that was measured; "unknown" where it is no checkout."""
    here = Path(__file__).parent
    told = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.capacity",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", help="of RAM; 3GB by default, and with a GPU what is free")
    parser.add_argument("--device_budget", help="of GPU memory, as if the card had no more; all of it by default")
    parser.add_argument("--nvme_dir", type=Path, default=Path.cwd(), help="on the drive to offload to")
    parser.add_argument(
        "--only", nargs="+", choices=[entry.name for entry in ENTRIES], metavar="ENTRY", help="in this order"
    )
    parser.add_argument("--size", type=float, help="try the model nearest to this many parameters, and search nothing")
    parser.add_argument("--most", type=float, help="search among models of no more parameters than this")
    parser.add_argument(
        "--verify", action="store_true", help="train what megalith fits without the limit too: the same losses?"
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--timeout_s", type=float, default=3600, help="for one try")
    parser.add_argument("--json", type=Path, help="where to keep the record")
    parser.add_argument("--plot", type=Path, help="a .png of the record")
    args = parser.parse_args(argv)
    for name in ("batch_size", "seq_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least 1")
    if args.size is not None and not args.size > 0:
        parser.error(f"--size {args.size}: must be a number of parameters")
    if args.most is not None and not args.most >= ladder()[0].numel:
        parser.error(f"--most {args.most}: the smallest model has {ladder()[0].numel} parameters")
    if not os.path.isdir(args.nvme_dir):
        parser.error(f"--nvme_dir {args.nvme_dir}: no such folder")
    try:
        find_limits(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def find_limits(args: argparse.Namespace) -> None:
    """Turn the two limits into bytes. Raises ValueError."""
    args.limit = parse_bytes(args.limit, "--limit")
    args.device_budget = parse_bytes(args.device_budget, "--device_budget")
    if args.device == "cpu":
        if args.device_budget is not None:
            raise ValueError("--device_budget is for --device cuda: give --limit")
        args.limit = args.limit or 3 * 10**9
        return
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but this torch sees no GPU")
    args.device_budget = args.device_budget or torch.cuda.get_device_properties(0).total_memory
    args.limit = args.limit or int(0.95 * host_available_bytes())


if __name__ == "__main__":
    sys.exit(main())
