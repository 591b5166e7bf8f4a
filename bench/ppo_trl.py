"""PPO beside TRL's PPOTrainer, on one CPU: the same shape, prompts and updates.

    python -m megalith.bench.ppo --recipe trl --trl_python ../peers/bin/python --json record.json

Every reading is taken in a fresh process (`ppo_worker.py`), and the two take turns, so that a ratio is always that of
two readings of one round. The interpreter of an environment with TRL is given, or in $MEGALITH_TRL_PYTHON; without one
the table says that TRL is absent.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from . import report
from .launch import run_ranks

WORKER = Path(__file__).with_name("ppo_worker.py")
TRL_VARIABLE = "MEGALITH_TRL_PYTHON"
MODEL = {  # fields of transformers.LlamaConfig: 5.5 million parameters
    "vocab_size": 1344,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 704,
    "max_position_embeddings": 256,
}
SHAPE = {"model": MODEL, "batch_size": 16, "prompt_tokens": 32, "new_tokens": 32, "epochs": 2, "lr": 1e-5}
SPEED_BAR = 1.5
TIMEOUT_S = 300


def compare(trl_python, rounds, updates, precision, shape=SHAPE):
    """The record of `rounds` rounds of `updates` updates each, after one that is not counted."""
    pythons = {"trl": trl_python, "megalith": sys.executable}
    readings = {name: [] for name in pythons}
    for number in range(1, rounds + 1):
        for name, python in pythons.items():
            if python is None:
                continue
            readings[name].append(measure(name, python, {**shape, "updates": updates, "precision": precision}))
            shown = (f"{report.label(m)} {report.number(m, v)}" for m, v in readings[name][-1]["metrics"].items())
            print(f"round {number}/{rounds}  {name:<9}", "   ".join(shown), flush=True)
    rows = []
    for name, own in readings.items():
        note = "" if own else f"absent: no environment given, see --trl_python and ${TRL_VARIABLE}"
        metrics = {metric: [r["metrics"][metric] for r in own] for metric in (own[0]["metrics"] if own else ())}
        rows.append({"name": name, "note": note, "metrics": metrics})
    return {
        "benchmark": "ppo beside TRL",
        "environment": report.environment("cpu"),
        "settings": settings_of(readings, rounds, updates, precision, shape),
        "rows": rows,
        "checks": checks_of(readings),
    }


def measure(peer, python, options):
    """One reading. Raises RankError."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # -P: else the worker's own folder comes first among the places that anybody's imports are looked up in.
        command = [python, "-P", str(WORKER), json.dumps({**options, "peer": peer}), str(result)]
        run_ranks(command, 1, timeout_s=TIMEOUT_S, env={"CUDA_VISIBLE_DEVICES": "", "WANDB_DISABLED": "true"})
        return json.loads(result.read_text())


def settings_of(readings, rounds, updates, precision, shape):
    versions = readings["trl"][0]["versions"] if readings["trl"] else {}
    return {
        **shape["model"],
        "parameters": readings["megalith"][0]["numel"],
        "precision": precision,
        "batch": shape["batch_size"],
        "tokens": f"{shape['prompt_tokens']} + {shape['new_tokens']} forced",
        "epochs": shape["epochs"],
        "updates": f"{updates} after one that is not counted",
        "rounds": rounds,
        "peer": ", ".join(f"{name} {version}" for name, version in versions.items()) or "absent",
    }


def checks_of(readings):
    """Ratios of readings of the same round."""
    pairs = list(zip(readings["megalith"], readings["trl"], strict=False))
    if not pairs:
        return []

    def ratios(metric):
        return [own["metrics"][metric] / peer["metrics"][metric] for own, peer in pairs]

    return [
        {"name": "megalith / trl, tokens/s", "values": ratios("tokens_per_s"), "at_least": SPEED_BAR},
        {"name": "megalith / trl, peak RSS", "values": ratios("peak_rss_bytes"), "at_most": 1.0},
    ]


def run(args):
    record = compare(args.trl_python or os.environ.get(TRL_VARIABLE), args.rounds, args.updates, args.precision)
    print("\n" + report.render(record), flush=True)
    if args.json:
        report.save(record, args.json)
