"""Answering prompts side by side: tokens/s, time to first token and peak memory of transformers' `generate`, of its
continuous batching, and of megalith's decoding: plain, served, with offloaded weights, over 4-bit weights.

    python -m megalith.bench.inference                          # a 34M-parameter LLaMA in fp32; 1, 4 and 16 prompts
    python -m megalith.bench.inference --device cuda --model llama-7b --precision bf16 --json record.json --plot r.png

Every reading is taken in a fresh process (`inference_worker.py`): the same random weights and prompts for all, the most
likely token each time, never an early end. The entries take turns, round after round, and a ratio is always that of two
readings of one round. In fp32 the tokens of all entries are compared, so that one that decodes wrongly cannot win; bf16
rounds near ties differently, and 4-bit weights are others.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import report
from .launch import RankError, run_ranks
from .step import MODELS, resolve_device_and_model

WORKER = Path(__file__).with_name("inference_worker.py")


@dataclass(frozen=True)
class Entry:
    """One row for each batch size. `options` is what the worker's builder reads beside the settings common to all."""

    name: str
    builder: str
    options: dict = field(default_factory=dict)
    same_weights: bool = True


ENTRIES = (
    Entry("transformers", "transformers", {"cache": "dynamic"}),
    Entry("transformers-static", "transformers", {"cache": "static"}),
    Entry("transformers-continuous", "transformers-continuous"),
    Entry("megalith", "megalith", {"offload": 0}),
    Entry("megalith-batcher", "megalith-batcher"),
    Entry("megalith-offload", "megalith", {"offload": 0.5}),
    Entry("megalith-4bit", "megalith-4bit", same_weights=False),
)
# (entry, peer, least ratio of tokens/s).
BARS = (("megalith", "transformers", 1.0), ("megalith-batcher", "transformers-continuous", 1.0))
# On a GPU in bf16, one prompt: 4 bits over transformers' bf16, and the share of the bandwidth that its weights take.
BAR_4BIT = ("megalith-4bit", "transformers", 1.42)
ROOFLINE_SHARE = 0.6
# Of the 7B at 4 bits, beside its keys and values.
MOST_BYTES_7B = 4.0e9
BATCHED_AT_LEAST = 4.0  # tokens/s of the batcher with the most prompts, against its own with one


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if an entry crashed, hung or decoded wrongly. A missed bar is only printed."""
    args = parse_args(argv)
    rows = [(e, size) for size in args.batch_sizes for e in ENTRIES if args.only is None or e.name in args.only]
    readings, notes = run_rounds(rows, args)
    notes |= wrong_tokens(rows, readings, args.precision)
    record = make_record(rows, readings, notes, args)
    print("\n" + report.render(record))
    if args.json:
        report.save(record, args.json)
    if args.plot:
        memory = "peak_cuda_bytes" if args.device == "cuda" else "peak_rss_bytes"
        report.plot(record, args.plot, ["tokens_per_s", "first_token_s", memory])
    return 1 if notes else 0


def label(entry: Entry, batch_size: int) -> str:
    return f"{entry.name} x{batch_size}"


def run_rounds(rows: list[tuple[Entry, int]], args: argparse.Namespace) -> tuple[dict[str, list], dict[str, str]]:
    """Returns readings and notes by row. An entry that crashed takes no further turn."""
    readings, notes = {label(*row): [] for row in rows}, {}
    for round_number in range(1, args.rounds + 1):
        for row in [row for row in rows if label(*row) not in notes]:
            print(f"round {round_number}/{args.rounds}  {label(*row):<28}", end=" ", flush=True)
            try:
                reading = measure(*row, args)
            except RankError as error:
                print(f"FAILED: {error}", flush=True)
                notes[label(*row)] = "FAILED: " + str(error).splitlines()[-1]
                continue
            readings[label(*row)].append(reading)
            shown = ("tokens_per_s", "first_token_s", "other_load_share")
            print("   ".join(f"{report.label(m)} {report.number(m, reading['metrics'][m])}" for m in shown), flush=True)
    return readings, notes


def measure(entry: Entry, batch_size: int, args: argparse.Namespace) -> dict:
    """One reading, in a fresh process. Raises RankError."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = json.dumps(worker_options(entry, batch_size, args))
        # -P: else the worker's own folder comes first among the places that anybody's imports are looked up in.
        run_ranks([sys.executable, "-P", str(WORKER), options, str(result)], 1, timeout_s=args.timeout_s)
        return json.loads(result.read_text())


def worker_options(entry: Entry, batch_size: int, args: argparse.Namespace) -> dict:
    return {
        "builder": entry.builder,
        "device": args.device,
        "model": args.model_fields,
        "precision": args.precision,
        "batch_size": batch_size,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        **entry.options,
    }


def wrong_tokens(rows: list[tuple[Entry, int]], readings: dict[str, list], precision: str) -> dict[str, str]:
    """Notes on rows whose tokens are not those of the first row with as many prompts."""
    reference, notes = {}, {}
    if precision != "fp32":
        return notes
    for entry, batch_size in [row for row in rows if row[0].same_weights]:
        name = label(entry, batch_size)
        for reading in readings[name]:
            first, expected = reference.setdefault(batch_size, (name, reading["tokens"]))
            if reading["tokens"] != expected:
                notes[name] = f"WRONG TOKENS: not those of {first}"
    return notes


def make_record(
    rows: list[tuple[Entry, int]], readings: dict[str, list], notes: dict[str, str], args: argparse.Namespace
) -> dict:
    """The record that report.py draws; its form is told there."""
    table = []
    for row in rows:
        own = readings[label(*row)]
        metrics = {name: [reading["metrics"][name] for reading in own] for name in (own[0]["metrics"] if own else ())}
        table.append({"name": label(*row), "note": notes.get(label(*row), ""), "metrics": metrics})
    sound = {name: own for name, own in readings.items() if name not in notes and own}
    return {
        "benchmark": "inference",
        "environment": report.environment(args.device),
        "settings": {
            "model": args.model,
            **args.model_fields,
            "precision": args.precision,
            "prompt tokens": f"{args.prompt_tokens // 2} to {args.prompt_tokens}",
            "new tokens": args.new_tokens,
            "rounds": args.rounds,
        },
        "rows": table,
        "checks": list(checks(sound, args)),
    }


def checks(readings: dict[str, list], args: argparse.Namespace):
    """The bars whose two rows were both measured: ratios of readings of the same round."""

    def ratio(own: str, peer: str, bound: float):
        if own in readings and peer in readings:
            pairs = zip(readings[own], readings[peer], strict=True)
            values = [a["metrics"]["tokens_per_s"] / b["metrics"]["tokens_per_s"] for a, b in pairs]
            yield {"name": f"{own} / {peer}, tokens/s", "values": values, "at_least": bound}

    for own, peer, bound in BARS:
        for size in args.batch_sizes:
            yield from ratio(f"{own} x{size}", f"{peer} x{size}", bound)
    if args.device == "cuda" and args.precision == "bf16":
        yield from ratio(f"{BAR_4BIT[0]} x1", f"{BAR_4BIT[1]} x1", BAR_4BIT[2])
        yield from gpu_checks([reading["metrics"] for reading in readings.get("megalith-4bit x1", [])], args)
    most = max(args.batch_sizes)
    if most >= 32:  # the bar is for 32 clients
        yield from ratio(f"megalith-batcher x{most}", "megalith-batcher x1", BATCHED_AT_LEAST)


def gpu_checks(metrics: list[dict], args: argparse.Namespace):
    """What 4-bit weights have to reach with one prompt: the speed and the memory that their bytes allow."""
    if not metrics:
        return
    shares = [m["decoded_tokens_per_s"] * m["weights_read_bytes"] / 1e9 / m["copy_GB_per_s"] for m in metrics]
    yield {"name": "megalith-4bit x1, of the roofline", "values": shares, "at_least": ROOFLINE_SHARE}
    if args.model.startswith("llama-7b"):
        beside = [(m["peak_cuda_bytes"] - m["kv_bytes"]) / 1e9 for m in metrics]
        yield {
            "name": "megalith-4bit x1, peak GB beside the KV cache",
            "values": beside,
            "at_most": MOST_BYTES_7B / 1e9,
        }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.inference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", default="llama-34m", help=f"{', '.join(MODELS)}; fields may follow: llama-34m,num_hidden_layers=4"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="prompts at a time")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="of the longest; the shortest has half of them")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[entry.name for entry in ENTRIES], metavar="ENTRY")
    parser.add_argument("--timeout_s", type=float, default=600, help="for one reading")
    parser.add_argument("--json", type=Path, help="where to keep the record")
    parser.add_argument("--plot", type=Path, help="a .png of the record")
    args = parser.parse_args(argv)
    for name, least in (("prompt_tokens", 2), ("new_tokens", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least {least}")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch_sizes {min(args.batch_sizes)}: has to be at least 1")
    resolve_device_and_model(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
