"""Training steps side by side: tokens/s and peak memory of plain PyTorch, DDP, FSDP2, DeepSpeed and megalith.

    python -m megalith.bench.step                               # a 34M-parameter LLaMA in fp32, one and two ranks
    python -m megalith.bench.step --install_deepspeed ../peers  # once; later --deepspeed_python ../peers/bin/python
    python -m megalith.bench.step --device cuda --model llama-1b --precision bf16 --json record.json --plot record.png

Every reading is taken in fresh processes (`step_worker.py`): the same weights, tokens, loop and batch a rank for all,
and the cores divided among the ranks. The entries take turns, round after round, so that a machine that grows slower or
noisier does so for all of them, and a ratio is always that of two readings of one round. Losses are compared: an entry
that trains wrongly cannot win.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from . import report
from .launch import RankError, run_ranks

WORKER = Path(__file__).with_name("step_worker.py")
REPOSITORY = Path(__file__).resolve().parent.parent
DEEPSPEED_VARIABLE = "MEGALITH_DEEPSPEED_PYTHON"

MODELS = {  # fields of transformers.LlamaConfig
    "llama-34m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
    "llama-110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 16384,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}

# Relative difference of the loss at any step. In bf16 the peers round in different places.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Entry:
    """One row of the table. `options` is what the worker's `build_<peer>` reads beside the settings common to all."""

    name: str
    peer: str
    distributed: bool = True
    options: dict = field(default_factory=dict)


def offloaded(name: str, tier: str, update_in_backward: bool) -> Entry:
    """Nobody clips here, so that the update may go on in the backward pass; "deferred" is what clipping would have."""
    options = {"zero_stage": 3, "placement": tier, "update_in_backward": update_in_backward}
    return Entry(name, "megalith", distributed=False, options=options)


ENTRIES = (
    Entry("plain", "plain", distributed=False),
    Entry("megalith", "megalith", distributed=False, options={"zero_stage": 3}),
    Entry("megalith-beside-plain", "beside_plain", distributed=False, options={"zero_stage": 3}),
    Entry("ddp", "ddp"),
    Entry("fsdp2", "fsdp2", options={"reshard_after_forward": True}),
    Entry("fsdp2-keep", "fsdp2", options={"reshard_after_forward": False}),
    Entry("deepspeed-zero2", "deepspeed", options={"zero_stage": 2}),
    Entry("deepspeed-zero3", "deepspeed", options={"zero_stage": 3}),
    *(Entry(f"megalith-zero{stage}", "megalith", options={"zero_stage": stage}) for stage in range(4)),
    Entry("deepspeed-zero3-cpu", "deepspeed", distributed=False, options={"zero_stage": 3, "placement": "host"}),
    Entry("deepspeed-infinity", "deepspeed", distributed=False, options={"zero_stage": 3, "placement": "nvme"}),
    *(offloaded(f"megalith-{tier}-deferred", tier, update_in_backward=False) for tier in ("host", "nvme")),
    *(offloaded(f"megalith-{tier}", tier, update_in_backward=True) for tier in ("host", "nvme")),
)


@dataclass(frozen=True)
class Bar:
    """What `entry` has to reach against `peer`: a ratio of tokens/s, and perhaps ones of peak memory a process, and of
    the part of it above the interpreter's own."""

    entry: str
    peer: str
    speed_at_least: float
    memory_at_most: float | None = 1.0
    own_memory_at_most: float | None = None
    device: str | None = None
    """Where it holds; None: anywhere."""


BESIDE_PLAIN_AT_LEAST = 0.97
"""Of plain PyTorch's tokens/s, at one rank and in one process."""

HIDDEN_AT_MOST = 1.15
"""The step with everything on a drive, over the longer of computing alone and moving the bytes alone."""

BARS = (
    Bar("megalith-zero2", "ddp", 1.0),
    Bar("megalith-zero3", "ddp", 0.85),
    Bar("megalith-zero3", "fsdp2", 1.35),
    Bar("megalith-zero3", "deepspeed-zero3", 1.4),
    Bar("megalith-host", "deepspeed-zero3-cpu", 1.8),
    Bar("megalith-nvme", "deepspeed-infinity", 1.8, own_memory_at_most=0.5),
    Bar("megalith-host-deferred", "megalith", 0.85, device="cuda"),
)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if an entry crashed, hung or trained wrongly. A missed bar or an absent peer is only printed."""
    args = parse_args(argv)
    if args.install_deepspeed:
        args.deepspeed_python = install_deepspeed(args.install_deepspeed)
    entries = [entry for entry in ENTRIES if args.only is None or entry.name in args.only]
    readings, notes, crashed = run_rounds(entries, args)
    wrong = wrong_losses(entries, readings, args)
    record = make_record(entries, readings, notes | wrong, args)
    print("\n" + report.render(record))
    if args.json:
        report.save(record, args.json)
    if args.plot:
        report.plot(record, args.plot, ["tokens_per_s", memory_metric(args.device)])
    return 1 if crashed or wrong else 0


def run_rounds(entries: list[Entry], args: argparse.Namespace) -> tuple[dict[str, list[dict]], dict[str, str], bool]:
    """Returns readings and notes by entry, and whether one crashed. One that is absent or crashed takes no turn."""
    readings = {entry.name: [] for entry in entries}
    notes = {entry.name: reason for entry in entries if (reason := absent(entry, args))}
    crashed = False
    for round_number in range(1, args.rounds + 1):
        for entry in [entry for entry in entries if entry.name not in notes]:
            print(f"round {round_number}/{args.rounds}  {entry.name:<16}", end=" ", flush=True)
            try:
                reading = measure(entry, args)
            except RankError as error:
                print(f"FAILED: {error}", flush=True)
                notes[entry.name] = "FAILED: " + str(error).splitlines()[-1]
                crashed = True
                continue
            readings[entry.name].append(reading)
            shown = ("tokens_per_s", "peak_rss_bytes", "other_load_share")
            values = (f"{report.label(m)} {report.number(m, reading['metrics'][m])}" for m in shown)
            print("   ".join(values), flush=True)
    return readings, notes, crashed


def measure(entry: Entry, args: argparse.Namespace) -> dict:
    """One reading of one entry, in fresh processes. Raises RankError."""
    options = {
        "entry": entry.name,
        "peer": entry.peer,
        "process_group": entry.distributed,
        "device": args.device,
        "model": args.model_fields,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "lr": args.lr,
        "warmup": args.warmup,
        "steps": args.steps,
        "trace": args.trace,
        "placement": "device",
        "update_in_backward": False,
        "nvme_dir": args.nvme_dir,
        **entry.options,
    }
    python = args.deepspeed_python if entry.peer == "deepspeed" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # -P: else the worker's own folder comes first among the places that anybody's imports are looked up in.
        command = [python, "-P", str(WORKER), json.dumps(options), str(result)]
        run_ranks(command, ranks_of(entry, args), timeout_s=args.timeout_s, env={"DS_ACCELERATOR": args.device})
        return json.loads(result.read_text())


def absent(entry: Entry, args: argparse.Namespace) -> str | None:
    """Why an entry cannot be measured here, or None."""
    ranks = ranks_of(entry, args)
    if entry.peer == "deepspeed" and not args.deepspeed_python:
        return "absent: no environment given, see --install_deepspeed and --deepspeed_python"
    if entry.options.get("placement") == "nvme" and not args.nvme_dir:
        return "absent: no folder on a drive given, see --nvme_dir"
    if args.device == "cuda" and ranks > torch.cuda.device_count():
        return f"absent: {ranks} ranks need {ranks} GPUs, here are {torch.cuda.device_count()}"
    return None


def ranks_of(entry: Entry, args: argparse.Namespace) -> int:
    return args.ranks if entry.distributed else 1


def wrong_losses(entries: list[Entry], readings: dict[str, list[dict]], args: argparse.Namespace) -> dict[str, str]:
    """Notes on entries whose losses leave those of the first entry with as many ranks (plain PyTorch, or DDP)."""
    reference, notes = {}, {}
    for entry in entries:
        for reading in readings[entry.name]:
            name, losses = reference.setdefault(ranks_of(entry, args), (entry.name, reading["losses"]))
            for number, (own, expected) in enumerate(zip(reading["losses"], losses, strict=True), 1):
                if not abs(own - expected) <= LOSS_TOLERANCE[args.precision] * abs(expected):  # so that NaN is wrong
                    notes.setdefault(
                        entry.name, f"WRONG LOSS at step {number}: {own:.5g}, that of {name} is {expected:.5g}"
                    )
    return notes


def make_record(
    entries: list[Entry], readings: dict[str, list[dict]], notes: dict[str, str], args: argparse.Namespace
) -> dict:
    """The record that report.py draws; its form is told there."""
    taken = [reading for entry in entries for reading in readings[entry.name]]
    deepspeed = {r["versions"]["deepspeed"] for r in taken if "deepspeed" in r["versions"]}
    settings = {
        "model": args.model,
        **args.model_fields,
        "parameters": taken[0]["model_numel"] if taken else "nothing measured",
        "precision": args.precision,
        "batch a rank": f"{args.batch_size} x {args.seq_len} tokens",
        "ranks": args.ranks,
        "steps": f"{args.steps} timed after {args.warmup}",
        "rounds": args.rounds,
        "lr": args.lr,
        "deepspeed": ", ".join(sorted(deepspeed)) or "absent",
    }
    rows = []
    for entry in entries:
        own = readings[entry.name]
        metrics = {
            metric: [reading["metrics"][metric] for reading in own] for metric in (own[0]["metrics"] if own else ())
        }
        note = f"loss {own[0]['losses'][0]:.3f} -> {own[0]['losses'][-1]:.3f}" if own else ""
        rows.append({"name": entry.name, "note": notes.get(entry.name, note), "metrics": metrics})
    sound = {name: own for name, own in readings.items() if name not in notes}
    return {
        "benchmark": "step",
        "environment": report.environment(args.device),
        "settings": settings,
        "rows": rows,
        "checks": list(checks(sound, args.device)),
    }


def checks(readings: dict[str, list[dict]], device: str):
    """The bars whose two entries were both measured: ratios of readings of the same round."""
    memory = memory_metric(device)
    for bar in BARS:
        if bar.device not in (None, device) or not (readings.get(bar.entry) and readings.get(bar.peer)):
            continue
        pairs = list(zip(readings[bar.entry], readings[bar.peer], strict=True))

        def ratios(metric, pairs=pairs):
            return [own["metrics"][metric] / peer["metrics"][metric] for own, peer in pairs]

        name = f"{bar.entry} / {bar.peer}"
        yield {"name": f"{name}, tokens/s", "values": ratios("tokens_per_s"), "at_least": bar.speed_at_least}
        if bar.memory_at_most is not None:
            yield {"name": f"{name}, peak memory", "values": ratios(memory), "at_most": bar.memory_at_most}
        if bar.own_memory_at_most is not None:
            yield {
                "name": f"{name}, peak RSS above the interpreter's",
                "values": ratios("own_rss_bytes"),
                "at_most": bar.own_memory_at_most,
            }

    if beside := readings.get("megalith-beside-plain"):
        values = [reading["metrics"]["speed_beside_plain"] for reading in beside]
        name = "megalith / plain in turns in one process, tokens/s"
        yield {"name": name, "values": values, "at_least": BESIDE_PLAIN_AT_LEAST}
    drive = readings.get("megalith-nvme"), readings.get("megalith")
    if all(drive):
        values = [
            own["metrics"]["step_s"] / max(alone["metrics"]["step_s"], own["metrics"]["drive_floor_s"])
            for own, alone in zip(*drive, strict=True)
        ]
        name = "megalith-nvme / max(megalith, drive floor), step s"
        yield {"name": name, "values": values, "at_most": HIDDEN_AT_MOST}


def memory_metric(device: str) -> str:
    return "peak_cuda_bytes" if device == "cuda" else "peak_rss_bytes"


def install_deepspeed(folder: Path) -> str:
    """Make an environment with DeepSpeed and the versions in use here, and return its interpreter.

    DeepSpeed compiles one of its operations when it first runs on a CPU, which needs a C++ compiler.
    """
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pinned = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    subprocess.run([python, "-m", "pip", "install", *pinned], check=True)
    # After torch, which its set-up asks for its version. ninja is what it compiles with.
    subprocess.run([python, "-m", "pip", "install", *pinned, "deepspeed", "ninja"], check=True)
    return python


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.step", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", default="llama-34m", help=f"{', '.join(MODELS)}; fields may follow: llama-34m,num_hidden_layers=4"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_size", type=int, default=2, help="rows a rank")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--ranks", type=int, help="of the distributed entries; 2, or as many as there are GPUs")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", choices=[entry.name for entry in ENTRIES], metavar="ENTRY")
    parser.add_argument("--timeout_s", type=float, default=600, help="for one reading")
    parser.add_argument(
        "--deepspeed_python", default=os.environ.get(DEEPSPEED_VARIABLE), help=f"or ${DEEPSPEED_VARIABLE}"
    )
    parser.add_argument("--nvme_dir", help="a folder on a local drive, for the entries that store there")
    parser.add_argument("--install_deepspeed", type=Path, metavar="DIR", help="make that environment first")
    parser.add_argument("--json", type=Path, help="where to keep the record")
    parser.add_argument("--plot", type=Path, help="a .png of the record")
    parser.add_argument("--trace", help="a folder for a Chrome trace of two steps of each rank")
    args = parser.parse_args(argv)
    for name in ("batch_size", "seq_len", "steps", "rounds", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least 1")
    resolve_device_and_model(parser, args)
    if args.install_deepspeed and args.install_deepspeed.resolve().is_relative_to(REPOSITORY):
        parser.error(f"--install_deepspeed {args.install_deepspeed}: choose a folder outside the repository")
    if args.ranks is None:
        args.ranks = 2 if args.device == "cpu" else torch.cuda.device_count()
    return args


def resolve_device_and_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set `args.model_fields`. A usage error where --device is not here, or --model is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this torch sees no GPU")
    try:
        args.model_fields = parse_model(args.model)
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")


def parse_model(text: str) -> dict:
    """`NAME[,FIELD=INT...]` -> fields of LlamaConfig. Raises ValueError."""
    name, *fields = text.split(",")
    if name not in MODELS:
        raise ValueError(f"there is no {name!r}; choose one of {', '.join(MODELS)}")
    model = dict(MODELS[name])
    for item in fields:
        key, _, value = item.partition("=")
        if key not in model or not value.isdigit():
            raise ValueError(f"cannot read {item!r}; write FIELD=INT with a field of {', '.join(model)}")
        model[key] = int(value)
    return model


if __name__ == "__main__":
    sys.exit(main())
