"""Runs a stage through the commands that users type, and reads what it wrote."""

import json
import os
import signal
import subprocess
import sys

import pytest


def torchrun(stage, *argv, timeout_s=240):
    """Run `megalith.rlhf.STAGE` on two ranks; returns (exit status, output). No process outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, "-m", f"megalith.rlhf.{stage}", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {timeout_s} s:\n{process.communicate()[0]}")
    return process.returncode, output


TIMED = {"tokens_per_s", "tflops", "step_time_s", "peak_memory_bytes"}


def metrics(folder):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]
