"""Start the ranks of a benchmark as fresh processes, and never leave one behind."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class RankError(RuntimeError):
    """A rank failed or took too long; the text holds the end of what it printed. `code` is its exit status, None if it
    was still running."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = code


def run_ranks(
    command: list[str],
    world_size: int,
    *,
    timeout_s: float,
    env: dict[str, str] | None = None,
    while_waiting: Callable[[], None] = lambda: None,
) -> None:
    """Run `command` once a rank with the variables that torchrun sets; return when all have succeeded.

    The machine's cores are divided among the ranks. Raises RankError as soon as one rank fails, or after `timeout_s`.
    However it ends, every rank and whatever that had started is killed. `while_waiting` is called many times a second.
    """
    cores = len(os.sched_getaffinity(0))
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        **(env or {}),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        ranks, logs = [], []
        for rank in range(world_size):
            logs.append(Path(folder) / f"{rank}.log")
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(logs[-1], "w") as log:
                ranks.append(
                    subprocess.Popen(command, env=shared | own, stdout=log, stderr=subprocess.STDOUT, process_group=0)
                )
            cleanup.callback(kill_group, ranks[-1])
        deadline_s = time.monotonic() + timeout_s
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            if time.monotonic() > deadline_s:
                raise RankError(f"still running after {timeout_s:g} s; rank 0 printed last:\n{last_lines(logs[0])}")
            while_waiting()
            time.sleep(0.05)
        for rank, code in enumerate(codes):
            if code:
                raise RankError(f"rank {rank} exited with {code}:\n{last_lines(logs[rank])}", code)


def kill_group(process: subprocess.Popen) -> None:
    """Each rank leads a process group of its own, so that compilers and loaders that it started go with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
