"""8-bit states at two ranks: placement changes no bit of any stage, and checkpoints go between world sizes."""

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.engine import Work
from megalith.engine.checkpoint import read_checkpoint
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from test_offload_ranks import _train
from tiny import batches, make_model, rank_rows, update_error, weights_of

JOBS = [{"zero_stage": stage, "placement": placement} for stage in (0, 1, 2, 3) for placement in ("device", "host")]
OPTIONS = {"state_precision": "8bit"}


def _make(**options):
    model = make_model("gpt2", n_layer=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    return engine.initialize(model, optimizer, timeout_s=30, **OPTIONS, **options)


def _saved(folder):
    """Masters and moments in a checkpoint, whole."""
    checkpoint = read_checkpoint(folder)
    result = {}
    for fqn, shape in checkpoint.shapes.items():
        for payload in ("master", "exp_avg", "exp_avg_sq"):
            values = torch.empty(torch.Size(shape).numel())
            checkpoint.fill(payload, fqn, 0, values)
            result[payload, fqn] = values
    return result


def _on_drives(rank, world_size, folder):
    """The outcome of each of these, and the bytes that left the device in steps of one and of three micro-batches."""
    drive = {"placement": "nvme", "nvme_dir": folder, "nvme_ring": "8MB"}
    results = []
    for stage in (2, 3):
        variants = [{}, drive | {"lane_delay": random_delay(rank, 0.002)}]
        if stage == 3:
            variants += [drive, drive | {"lane_delay": random_delay(2 + rank, 0.002), "prefetch": 2}]
            variants += [{"placement": "host", "lane_delay": random_delay(4 + rank, 0.002), "prefetch": 2}]
        for options in variants:
            options = OPTIONS | {"precision": "bf16", "zero_stage": stage} | options
            results.append((stage, _train(rank, world_size, options)[:2]))
    return results, _link_out(rank, world_size)


def _link_out(rank, world_size):
    model, optimizer = _make(zero_stage=3, placement="host", max_chunk_numel=4000)
    ledger, left = engine_of(model).ledger, {}
    for micro_steps in (1, 1, 3, 3):  # the first of a kind expects the other
        before = ledger.work[Work.LINK_OUT]
        for rows in batches(micro_steps):
            mine = rank_rows(rows, rank, world_size)
            model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        left[micro_steps] = ledger.work[Work.LINK_OUT] - before
    return left, sum(chunk.placement.owned_numel for chunk in engine_of(model).chunks)


def test_drives_and_delays_change_no_bit_in_bf16_and_sums_leave_once_a_step(tmp_path):
    first, second = run_ranks(2, _on_drives, tmp_path)
    expected = {}
    for (stage, (weights, norms)), (_, (theirs, _)) in zip(first[0], second[0], strict=True):
        its_weights, its_norms = expected.setdefault(stage, (weights, norms))
        assert norms == its_norms, stage
        for name in weights:
            assert torch.equal(weights[name], its_weights[name]) and torch.equal(weights[name], theirs[name]), name
    for left, owned_numel in (first[1], second[1]):
        assert left == {1: 4 * owned_numel, 3: 4 * owned_numel}


def _at_two_ranks(rank, world_size, folder):
    trained = [_train(rank, world_size, OPTIONS | options)[:2] for options in JOBS]
    model, optimizer = _make(zero_stage=3)
    engine.load_checkpoint(folder / "one", model, optimizer)
    engine.save_checkpoint(folder / "two", model, optimizer)
    return trained


def test_stages_and_placements_agree_and_checkpoints_go_between_world_sizes(tmp_path):
    model, optimizer = _make(zero_stage=0)
    rows = torch.arange(24).view(2, 12)
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.save_checkpoint(tmp_path / "one", model, optimizer)

    first, second = run_ranks(2, _at_two_ranks, tmp_path)
    initial, stage_0 = weights_of(make_model("gpt2", n_layer=3)), first[0][0]
    for options, (weights, norms), (theirs, _) in zip(JOBS, first, second, strict=True):
        if options["placement"] == "device":
            expected, expected_norms = weights, norms
        assert norms == expected_norms, options
        for name in weights:
            assert torch.equal(weights[name], expected[name]) and torch.equal(weights[name], theirs[name]), name
        assert update_error(initial, weights, stage_0) < 0.05, options

    one, two = _saved(tmp_path / "one"), _saved(tmp_path / "two")
    assert any(values.any() for values in one.values())
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
