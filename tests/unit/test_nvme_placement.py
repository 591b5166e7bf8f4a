"""Weights, masters, moments and gradients on a drive: the bits of the device, the memory of a ring, and its errors."""

import errno
import gc
import os
import threading

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, fit, gathered_weights, initialized, state_of
from megalith.engine import direct_io
from megalith.engine.lanes import LaneError, random_delay
from megalith.engine.shard import engine_of
from megalith.engine.streaming_sizes import PIECE_MULTIPLE, SLOTS, slot_itemsizes
from test_any_model import Skipping, X
from tiny import batches, make_model


def smallest_ring(precision="fp32"):
    return SLOTS * PIECE_MULTIPLE * sum(slot_itemsizes(engine.Precision(precision)).values())


def language_loss(model, step):
    rows = batches(60)[step]
    return model(input_ids=rows, labels=rows).loss


def llama():
    """Chunks of two pieces of the smallest ring, and of a part of one."""
    return make_model("llama", num_hidden_layers=3, intermediate_size=64)


def four_blocks():
    return make_model("llama", num_hidden_layers=4)


def on_drive(folder, precision="fp32", **options):
    defaults = {"placement": "nvme", "nvme_dir": folder, "nvme_ring": smallest_ring(precision), "nvme_checksums": True}
    return {"precision": precision, "max_chunk_numel": 10**6, **defaults, **options}


VARIANTS = [
    {},
    {"host_budget": "40MB", "prefetch": 0},  # the gradients wait on the host
    {"param_offload": 0.0, "prefetch": 3},
    {"optimizer_offload": 0.0},
    {"param_offload": 0.5, "optimizer_offload": 0.3},
    {"zero_stage": 1},
    {"max_chunk_numel": 100},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_drive_changes_no_bit(precision, tmp_path):
    def train(**options):
        model, optimizer = initialized(llama, **options)
        for micro_steps in (1, 1, 3, 2, 1):
            for step in range(micro_steps):
                optimizer.backward(language_loss(model, step) / micro_steps)
            optimizer.step()
        return state_of(model), optimizer.grad_norm

    expected, norm = train(precision=precision)
    for variant in VARIANTS:
        budget = {"host_budget": direct_budget(precision)} | variant
        ours, our_norm = train(**on_drive(tmp_path, precision, **budget))
        assert differing(ours, expected) == [], variant
        assert our_norm == pytest.approx(norm, rel=1e-12)


def direct_budget(precision):
    """Just the staging buffers and what is on the host: no room for gradients."""
    return 2**25 + smallest_ring(precision) + 10**6


def test_fifty_steps_with_delays_on_every_lane_and_the_drive(tmp_path):
    expected, reference = initialized(llama, precision="bf16", max_grad_norm=0.5)
    fit(expected, reference, language_loss, 50)
    options = on_drive(tmp_path, "bf16", max_grad_norm=0.5, lane_delay=random_delay(3, 0.0005), nvme_checksums=False)
    model, optimizer = initialized(llama, **options)
    fit(model, optimizer, language_loss, 50)
    assert differing(state_of(model), state_of(expected)) == []


def test_the_gradients_are_where_there_is_room(tmp_path):
    for host_budget, tier in ((direct_budget("fp32") - 10**6 + 1000, "nvme"), ("1GB", "host"), (None, "host")):
        model, optimizer = initialized(llama, **on_drive(tmp_path, host_budget=host_budget))
        fit(model, optimizer, language_loss, 1)
        report = engine.memory_report(model)
        assert [name for name in report if "gradient" in report[name] and name != "device"] == [tier]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_memory_holds_the_ring_alone_and_agrees_with_the_plan(precision, tmp_path):
    options = on_drive(tmp_path, precision, host_budget=2**25 + smallest_ring(precision) + 1000)
    plan = engine.plan(four_blocks(), **options)
    model, optimizer = initialized(four_blocks, **options)
    fit(model, optimizer, language_loss, 3)
    report = engine.memory_report(model)
    assert report["host"]["total"]["peak_bytes"] == 2**25 + smallest_ring(precision)
    for tier, payloads in plan.bytes_at_rest.items():
        for payload, nbytes in payloads.items():
            assert report[tier.value][payload.value]["bytes"] == nbytes, (tier, payload)
    for tier, nbytes in plan.peak_bytes.items():
        if nbytes:
            assert report[tier.value]["total"]["peak_bytes"] == pytest.approx(nbytes, rel=0.05), tier
    numel = plan.layout.stored_numel
    disk = sum(p["bytes"] for name, p in report["nvme"].items() if name not in ("total", "gradient"))
    assert disk == {"fp32": 12, "bf16": 12, "fp16": 14}[precision] * numel


def test_memory_is_flat_and_the_folder_is_empty_in_the_end(tmp_path):
    gc.collect()  # the files of other tests' engines are closed now, and not while they are counted
    model, optimizer = initialized(llama, **on_drive(tmp_path, "bf16", nvme_checksums=False))
    fit(model, optimizer, language_loss, 3)
    third, files = engine.memory_report(model), len(os.listdir("/proc/self/fd"))
    fit(model, optimizer, language_loss, 20)
    assert engine.memory_report(model) == third
    assert len(os.listdir("/proc/self/fd")) <= files  # fewer, where an engine of an earlier test is collected
    assert len(os.listdir(tmp_path)) == 1
    for chunk in engine_of(model).chunks:
        chunk.settle()
    del model, optimizer, chunk
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_checkpoints_from_and_to_a_drive(tmp_path):
    model, optimizer = initialized(llama, **on_drive(tmp_path / "drive", "bf16"))
    fit(model, optimizer, language_loss, 3)
    engine.save_checkpoint(tmp_path / "saved", model, optimizer, "mine")
    expected = state_of(model)
    fit(model, optimizer, language_loss, [3])
    after = state_of(model)
    for options in ({"precision": "bf16", "placement": "host"}, on_drive(tmp_path / "drive", "bf16")):
        other, others = initialized(llama, **options)
        assert engine.load_checkpoint(tmp_path / "saved", other, others) == "mine"
        assert differing(state_of(other), expected) == []
        fit(other, others, language_loss, [3])
        assert differing(state_of(other), after) == []
    engine.save_checkpoint(tmp_path / "saved", other, others)
    engine.load_checkpoint(tmp_path / "saved", model, optimizer)
    engine.save_pretrained(tmp_path / "weights", model)
    reloaded = type(model).from_pretrained(tmp_path / "weights", dtype=torch.bfloat16)
    weights = gathered_weights(model)
    assert all(torch.equal(value, weights[name]) for name, value in reloaded.named_parameters())


def test_blocks_that_are_skipped_in_turn(tmp_path):
    def train(**options):
        model, optimizer = initialized(Skipping, **options)
        fit(model, optimizer, lambda m, step: m(X, step).square().mean(), 6)
        return state_of(model)

    delayed = on_drive(tmp_path, lane_delay=random_delay(0, 0.002), max_chunk_numel=100)
    assert differing(train(**delayed), train()) == []


def test_a_frozen_model_lies_on_the_drive_with_nothing_beside(tmp_path):
    rows = batches(1)[0]
    with torch.no_grad():
        expected = llama()(rows).logits
        model, _ = engine.initialize(llama().requires_grad_(False), None, **on_drive(tmp_path))
        assert torch.equal(model(rows).logits, expected)
    assert engine.memory_report(model)["nvme"].keys() == {"weight", "total"}


def test_too_little_room_is_an_error_that_says_how_much_is_needed(tmp_path, monkeypatch):
    with pytest.raises(engine.OutOfBudgetError, match=r"nvme_ring is 1000 bytes.*\d+: raise"):
        initialized(llama, **on_drive(tmp_path, nvme_ring=1000))
    with pytest.raises(engine.OutOfBudgetError, match=r"host_budget is 1000000 bytes.*\d+ bytes"):
        initialized(llama, **on_drive(tmp_path, host_budget="1MB"))
    monkeypatch.setattr(direct_io, "free_bytes", lambda folder: 10_000)
    with pytest.raises(engine.NvmeError, match=r"rank 0: .*\d+"):
        initialized(llama, **on_drive(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_drive_that_fails_is_an_error_that_names_chunk_and_file(verb, tmp_path, monkeypatch):
    model, optimizer = initialized(llama, **on_drive(tmp_path, nvme_checksums=False))
    fit(model, optimizer, language_loss, 2)
    file = engine_of(model).chunks[0].exp_avg.store._file

    def fail(*args):
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(file, verb, fail)
    with pytest.raises((engine.NvmeError, LaneError), match=rf"{verb} of '\w+ of [\w.]+\[0\]', .*rank0.data.*injected"):
        fit(model, optimizer, language_loss, 2)


def test_a_corrupt_drive_is_found_by_its_checksum(tmp_path):
    model, optimizer = initialized(llama, **on_drive(tmp_path))
    fit(model, optimizer, language_loss, 2)
    chunk = engine_of(model).chunks[1]
    chunk.settle()
    moment = chunk.exp_avg
    with open(moment.store.path, "r+b") as file:
        file.seek(moment.store._offsets[moment.name] + 8)
        file.write(b"\xff\xff")
        os.fsync(file.fileno())
    with pytest.raises((engine.NvmeError, LaneError), match="corrupt"):
        fit(model, optimizer, language_loss, 2)


@pytest.mark.parametrize("where", ["lane", "pool"])
def test_an_engine_that_is_collected_in_the_middle_of_a_transfer_of_its_own_is_closed(where, tmp_path):
    held = list(initialized(llama, **on_drive(tmp_path, nvme_checksums=False)))
    pool, lane = engine_of(held[0]).chunks[0].exp_avg.store._pool, held[1]._updaters._host_lane
    ended = threading.Event()

    def collect():
        held.clear()
        gc.collect()
        ended.set()

    if where == "lane":
        lane.submit(collect, "collection")
    else:
        pool.submit(collect, urgent=False)
    assert ended.wait(20), "the thread waits for itself"
    for thread in threading.enumerate():
        if thread.name == "closing of an engine":
            thread.join(20)
    assert os.listdir(tmp_path) == []
