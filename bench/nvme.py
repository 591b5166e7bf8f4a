"""Throughput of the NVMe store beside plain large direct reads and writes of the same file system, side by side.

    python -m megalith.bench.nvme --folder /scratch --bytes 4GB --json record.json

Plain is a pool of threads that do nothing but `preadv` and `pwritev` on aligned memory. The store moves whole buffers,
several in flight, into aligned tensors (as the engine does) and into ones that are not. The two take turns, round after
round: a ratio is that of two readings of one round. `mixed` reads one half of the bytes while it writes the other.
"""

import argparse
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..engine.config import parse_bytes
from ..engine.direct_io import DirectFile, aligned_empty, filesystem_type
from ..engine.nvme import NvmeStore
from . import report

PIECE_BYTES = 2**22
THREADS = 8
BUFFERS = 8
MODES = ("read", "write", "mixed")
AT_LEAST = 0.8


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    buffer_bytes = args.bytes // BUFFERS // PIECE_BYTES * PIECE_BYTES
    readings: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = NvmeStore(folder, 0, {f"buffer{i}": buffer_bytes for i in range(BUFFERS)})
        file = DirectFile(os.path.join(folder, "plain.data"), buffer_bytes * BUFFERS)
        movers = {
            "plain": lambda mode: move_plain(file, mode),
            "megalith": move_store(store, [aligned_empty(buffer_bytes) for _ in range(BUFFERS)]),
            "megalith unaligned": move_store(store, [aligned_empty(buffer_bytes + 1)[1:] for _ in range(BUFFERS)]),
        }
        for move in (movers["plain"], movers["megalith"]):
            move("write")  # the first write of preallocated space is slower, and no step after the first one sees it
        for number in range(1, args.rounds + 1):
            for name, move in movers.items():
                for mode in MODES:
                    own = readings.setdefault(name, {}).setdefault(f"{mode}_mb_per_s", [])
                    own.append(buffer_bytes * BUFFERS / 1e6 / timed(move, mode))
                shown = "   ".join(f"{report.label(m)} {report.number(m, v[-1])}" for m, v in readings[name].items())
                print(f"round {number}/{args.rounds}  {name:<20}{shown}", flush=True)
        direct = store.direct
        store.close()
        file.close()
    record = make_record(readings, direct, buffer_bytes, args)
    print("\n" + report.render(record))
    if args.json:
        report.save(record, args.json)
    return 0


def move_plain(file: DirectFile, mode: str) -> None:
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for index, offset in enumerate(range(0, file.nbytes, PIECE_BYTES)):
        writes = mode == "write" or (mode == "mixed" and index % 2)
        jobs.put((file.pwrite if writes else file.pread, offset))

    def work():
        memory = aligned_empty(PIECE_BYTES).numpy()
        while not jobs.empty():
            try:
                call, offset = jobs.get_nowait()
            except queue.Empty:
                return
            call(memory, offset)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain_mixed_bytes_per_s(folder: str | os.PathLike, nbytes: int, rounds: int) -> float:
    """What plain large direct reads and writes side by side reach on the drive of `folder`: the median."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        file = DirectFile(os.path.join(inside, "plain.data"), nbytes)
        move_plain(file, "write")
        readings = [timed(lambda mode: move_plain(file, mode), "mixed") for _ in range(rounds)]
        file.close()
    return nbytes / statistics.median(readings)


def move_store(store: NvmeStore, tensors: list[torch.Tensor]) -> Callable[[str], None]:
    def move(mode: str) -> None:
        handles = []
        for index, tensor in enumerate(tensors):
            writes = mode == "write" or (mode == "mixed" and index % 2)
            handles.append((store.write if writes else store.read)(f"buffer{index}", tensor))
        for handle in handles:
            handle.wait()

    return move


def timed(move: Callable[[str], None], mode: str) -> float:
    start_s = time.perf_counter()
    move(mode)
    return time.perf_counter() - start_s


def make_record(readings: dict, direct: bool, buffer_bytes: int, args: argparse.Namespace) -> dict:
    checks = [
        {
            "name": f"megalith / plain, {mode}",
            "values": [
                own / plain
                for own, plain in zip(
                    readings["megalith"][f"{mode}_mb_per_s"], readings["plain"][f"{mode}_mb_per_s"], strict=True
                )
            ],
            "at_least": AT_LEAST,
        }
        for mode in MODES
    ]
    return {
        "benchmark": "nvme",
        "environment": report.environment("cpu"),
        "settings": {
            "file system": filesystem_type(args.folder),
            "direct I/O": direct,
            "buffers": f"{BUFFERS} of {buffer_bytes} bytes",
            "threads": f"{THREADS}, {PIECE_BYTES} bytes a call",
            "rounds": args.rounds,
        },
        "rows": [{"name": name, "note": "", "metrics": metrics} for name, metrics in readings.items()],
        "checks": checks,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.nvme", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to measure")
    parser.add_argument("--bytes", default="1GiB", help="moved in a reading; twice that is taken on the drive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to keep the record")
    args = parser.parse_args(argv)
    try:
        args.bytes = parse_bytes(args.bytes, "--bytes")
    except ValueError as error:
        parser.error(str(error))
    if args.bytes < BUFFERS * PIECE_BYTES:
        parser.error(f"--bytes {args.bytes}: at least {BUFFERS * PIECE_BYTES}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, and has to be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
