"""The step time that `plan` predicts, beside that of runs here.

    python -m megalith.bench.plan --nvme_dir /scratch --json record.json

Each configuration is run and planned in fresh processes. Some steps and a measurement of the machine's rates, by all
ranks at once, take turns, so that a machine that grows slower does so for both; the prediction is from their means.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from . import report
from .launch import run_ranks
from .step import resolve_device_and_model

WITHIN = 0.2
"""Of the measured step's time."""

CONFIGURATIONS = {
    "device": (1, {}),
    "device-bf16": (1, {"precision": "bf16"}),
    "host": (1, {"placement": "host"}),
    "host-bf16": (1, {"placement": "host", "precision": "bf16"}),
    "host-states": (1, {"placement": "host", "zero_stage": 2}),
    "nvme": (1, {"placement": "nvme"}),
    "zero1-two-ranks": (2, {"zero_stage": 1}),
    "zero3-two-ranks": (2, {}),
    "zero3-host-two-ranks": (2, {"placement": "host"}),
}
"""(ranks, what differs from ZeRO-3 in fp32 on the device, clipped)."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    names = args.only or CONFIGURATIONS
    readings: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            readings[name].append(read(name, args))
            shown = "  ".join(f"{report.label(k)} {report.number(k, v)}" for k, v in readings[name][-1].items())
            print(f"round {number + 1}: {name:<22}{shown}", flush=True)
    record = make_record(readings, args)
    print("\n" + report.render(record))
    if args.json:
        report.save(record, args.json)
    return 0


def read(name: str, args: argparse.Namespace) -> dict:
    """One reading: {metric: value}. Raises RankError."""
    ranks, changes = CONFIGURATIONS[name]
    keywords = {"zero_stage": 3, "placement": "device", "precision": "fp32", "max_grad_norm": 1.0} | changes
    if keywords["placement"] == "nvme":
        keywords["nvme_dir"] = str(args.nvme_dir)
    options = {
        "ranks": ranks,
        "engine": keywords,
        "model": args.model_fields,
        **{field: getattr(args, field) for field in ("device", "batch_size", "seq_len", "warmup", "turns", "steps")},
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        worker = [sys.executable, "-P", "-m", "megalith.bench.plan_worker", json.dumps(options), str(result)]
        run_ranks(worker, ranks, timeout_s=args.timeout_s)
        return json.loads(result.read_text())["metrics"]


def make_record(readings: dict[str, list[dict]], args: argparse.Namespace) -> dict:
    rows = [
        {"name": name, "note": "", "metrics": {metric: [each[metric] for each in of_name] for metric in of_name[0]}}
        for name, of_name in readings.items()
    ]
    checks = [
        {
            "name": f"{row['name']}: |predicted / run - 1|",
            "values": [abs(ratio - 1) for ratio in row["metrics"]["predicted_to_run"]],
            "at_most": WITHIN,
        }
        for row in rows
    ]
    settings = {
        "model": args.model,
        "batch a rank": f"{args.batch_size} x {args.seq_len} tokens",
        "steps": args.turns * args.steps,
    }
    return {
        "benchmark": "plan",
        "environment": report.environment(args.device),
        "settings": settings,
        "rows": rows,
        "checks": checks,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.plan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="llama-34m", help="as in megalith.bench.step: NAME[,FIELD=INT...]")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), metavar="CONFIGURATION")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5, help="measurements of the rates")
    parser.add_argument("--steps", type=int, default=3, help="between two of them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout_s", type=float, default=600, help="for one reading")
    parser.add_argument("--nvme_dir", type=Path, default=Path.cwd(), help="a folder on a local drive")
    parser.add_argument("--json", type=Path, help="where to keep the record")
    args = parser.parse_args(argv)
    for name in ("batch_size", "seq_len", "steps", "turns", "rounds", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least 1")
    resolve_device_and_model(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(main())
