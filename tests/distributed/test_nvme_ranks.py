"""A drive under two ranks: the bits of the device, and an error on both where one of them fails."""

import errno
import gc
import tempfile
from itertools import product

import megalith.engine as engine
import pytest
import torch
from launch import run_ranks
from megalith.engine import direct_io
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from test_faults import _survivors
from tiny import batches, make_model, rank_rows, weights_of

DISK = {"placement": "nvme", "nvme_ring": "400KB"}
AUTO = {"placement": "auto", "nvme_ring": "400KB", "device_budget": "400KB", "host_budget": "1100KB"}
OPTIONS = [
    {"zero_stage": stage, "precision": precision, **placement}
    for stage, precision in product((0, 1, 2, 3), ("fp32", "bf16"))
    for placement in ({}, DISK, DISK | {"host_budget": "35MB", "prefetch": 2}, AUTO)
]


def _train(rank, world_size, options, folder):
    model = make_model("llama_tied", num_hidden_layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    if "placement" in options:
        options = options | {"nvme_dir": folder, "lane_delay": random_delay(rank, 0.0005)}
    model, optimizer = engine.initialize(model, optimizer, max_grad_norm=0.5, timeout_s=30, **options)
    rows = iter(batches(6, rows=4, length=6))
    for micro_steps in (1, 2, 3):
        for _ in range(micro_steps):
            mine = rank_rows(next(rows), rank, world_size)
            (model(input_ids=mine, labels=mine).loss / micro_steps).backward()
        optimizer.step()
    with engine.gathered(model):
        return weights_of(model), optimizer.grad_norm


def _train_all(rank, world_size, folder):
    results = [_train(rank, world_size, options, folder) for options in OPTIONS]
    gc.collect()  # a process of multiprocessing ends without the interpreter's own clean-up
    return results


def test_a_drive_changes_no_bit_at_two_ranks(tmp_path):
    first, second = run_ranks(2, _train_all, str(tmp_path))
    for options, (weights, norm), theirs in zip(OPTIONS, first, second, strict=True):
        if "placement" not in options:
            expected = weights, norm
        assert norm == expected[1] == theirs[1], options
        for name in weights:
            assert torch.equal(weights[name], expected[0][name]), (options, name)
            assert torch.equal(weights[name], theirs[0][name]), (options, name)
    assert list(tmp_path.iterdir()) == []


def _start_without_room(rank, world_size, folder):
    if rank == 1:
        direct_io.free_bytes = lambda folder: 1000
    model = make_model("llama")
    with pytest.raises((RuntimeError, engine.NvmeError)) as caught:
        engine.initialize(model, torch.optim.AdamW(model.parameters()), nvme_dir=folder, **DISK)
    return str(caught.value)


def test_no_room_on_one_rank_is_an_error_on_both(tmp_path):
    mine, theirs = run_ranks(2, _start_without_room, str(tmp_path))
    assert "rank 1" in mine and "rank 1" in theirs and "1000" in theirs
    assert list(tmp_path.iterdir()) == []


def _fail_in_training(rank, world_size, folder, started):
    model = make_model("llama", num_hidden_layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drive = tempfile.mkdtemp(dir=folder)  # each rank's own
    model, optimizer = engine.initialize(model, optimizer, nvme_dir=drive, **DISK)

    def fail(*_):
        raise OSError(errno.EIO, "injected")

    for step in range(1000):
        if rank == 1 and step == 3:
            engine_of(model).chunks[1].exp_avg.store._file.read = fail
            started.set()
        rows = rank_rows(batches(1)[0], rank, world_size)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()


def test_a_drive_that_fails_on_one_rank_is_an_error_on_both_in_time(tmp_path):
    ((_, other), (_, failed)) = _survivors([("drive", _fail_in_training)], tmp_path)["drive"]
    assert "injected" in failed and "rank1.data" in failed and "LaneError" in failed
    for told in ("rank 1 failed: read of", "of model.", "rank1.data", "injected"):
        assert told in other, other
