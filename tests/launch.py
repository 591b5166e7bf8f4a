"""Runs a test's function on several ranks of a gloo group, each in a process of its own."""

import contextlib
import faulthandler
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """`function(rank, world_size, *args)` on every rank; returns the ranks' results.

    `function` must be importable (defined at the top of a test module). A rank that raises fails the test with its
    traceback, one that outlives the time-out with the stacks of its threads, one that dies with its signal; no process
    is left behind.
    """
    # Ranks are forked from a server that has imported everything once.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "megalith.engine"])
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            context.Process(
                target=_rank_main, args=(rank, world_size, port, folder, timeout_s, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, timeout_s)
            failures = []
            for rank, process in enumerate(processes):
                with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, f"error-{rank}")) as file:
                    failures.append(f"rank {rank}:\n{file.read()}")
                if process.exitcode is None:
                    with open(os.path.join(folder, f"stacks-{rank}")) as file:
                        failures.append(f"rank {rank} was still running after {timeout_s} s:\n{file.read()}")
                elif process.exitcode < 0:
                    failures.append(f"rank {rank} was killed by signal {-process.exitcode}")
            assert not failures, "\n".join(failures)
            return [
                torch.load(os.path.join(folder, f"result-{rank}"), weights_only=False) for rank in range(world_size)
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list[mp.Process], timeout_s: float) -> None:
    """Until all have ended, one has failed (the others would wait for it), or the time is up."""
    remaining_s = timeout_s
    while remaining_s > 0 and any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.05)
            remaining_s -= 0.05
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.join(2)
            return


def _rank_main(
    rank: int, world_size: int, port: int, folder: str, timeout_s: float, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    stacks = open(os.path.join(folder, f"stacks-{rank}"), "w")  # for as long as the process lives
    faulthandler.dump_traceback_later(0.95 * timeout_s, file=stacks)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.save(function(rank, world_size, *args), os.path.join(folder, f"result-{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        with open(os.path.join(folder, f"error-{rank}"), "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
