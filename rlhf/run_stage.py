"""Run a stage the way a user does, from a program that chains several: the demo, and the benchmark on real data."""

import importlib
import os
import shlex
import subprocess
import sys


def run_stage(stage, ranks, **options):
    """Run `megalith.rlhf.STAGE` with `--name value` for each of `options`, after printing the command.

    On one rank it runs in this process, on more under torchrun, each rank with its part of the cores. Raises
    CalledProcessError (SystemExit on one rank) when it fails.
    """
    module = f"{__package__}.{stage}"
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]
    print("\n$", shlex.join([*launcher, "-m", module, *argv]), flush=True)
    if ranks == 1:
        importlib.import_module(module).main(argv)
        return
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    command = [sys.executable, "-m", "torch.distributed.run", *launcher[1:], "-m", module, *argv]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": threads, **os.environ})
