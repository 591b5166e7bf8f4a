"""Training goes on from a checkpoint to the bit, and from any layout to any other; what fails changes nothing."""

import contextlib
import errno
import itertools
import os
import random
from unittest import mock

import megalith.engine as engine
import numpy
import pytest
import torch
from launch import run_ranks
from tiny import batches, make_model, rank_rows, weights_of

STEPS = 2  # before the checkpoint, and after
DROPOUT = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def _start(options, family="gpt2", seed=0, groups=2, **changes):
    model = make_model(family, seed=seed, **changes)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    parts = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if groups == 1:
        parts = [{"params": matrices + vectors}]
    optimizer = torch.optim.AdamW(parts, lr=1e-2, eps=1e-6)
    model, optimizer = engine.initialize(model, optimizer, max_grad_norm=1.0, timeout_s=30, **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.3 * step))


def _train(model, optimizer, scheduler, rank, world_size, start, stop):
    """The losses of steps [start, stop), two micro-batches each. The rows depend on the step alone, noise from numpy
    and Python on the random state."""
    model.train()
    losses = []
    for step in range(start, stop):
        for micro_step in range(2):
            rows = rank_rows(batches(1, rows=8, length=6, seed=100 * step + micro_step)[0], rank, world_size)
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.backward(loss * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand()))
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    return losses


def _everything(model, optimizer):
    with engine.gathered(model):
        weights = weights_of(model)
    return weights, optimizer.steps_taken, optimizer.skipped_steps, optimizer.grad_norm


def _seed(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _assert_same(one, other):
    """The weights are the same to the bit, and so is the rest."""
    assert one[0].keys() == other[0].keys()
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name]), name
    assert one[1:] == other[1:]


# At one world size


def _save_and_go_on(rank, world_size, folder, options):
    """k + k steps with a restart, and 2k without: (losses, final state) of both, and the state that came back."""
    _seed(rank)
    run = _start(options, **DROPOUT)
    _train(*run, rank, world_size, 0, STEPS)
    state = {
        "scheduler": run[2].state_dict(),
        "sampler": {"position": torch.arange(5) * (rank + 1), "epoch": 3},
        "rank": rank,
        "history": [(0, 1.5), (1, numpy.float32(0.1))],
    }
    engine.save_checkpoint(folder, run[0], run[1], state)
    losses = _train(*run, rank, world_size, STEPS, 2 * STEPS)
    expected = _everything(*run[:2])

    _seed(77 + rank)
    again = _start(options, seed=5, **DROPOUT)
    back = engine.load_checkpoint(folder, *again[:2])
    again[2].load_state_dict(back["scheduler"])
    resumed_losses = _train(*again, rank, world_size, STEPS, 2 * STEPS)
    return losses, expected, resumed_losses, _everything(*again[:2]), back


SAVED = [
    {"zero_stage": stage, "placement": placement, "precision": precision}
    for stage, placement, precision in [
        (0, "device", "fp32"),
        (1, "host", "bf16"),
        (2, "device", "fp16"),
        (3, "device", "fp32"),
        (3, "host", "fp16"),
        (3, "device", "bf16"),
    ]
]


def _save_all(rank, world_size, folder):
    return [_save_and_go_on(rank, world_size, f"{folder}/{i}", options) for i, options in enumerate(SAVED)]


def test_a_restart_at_two_ranks_changes_no_bit(tmp_path):
    results = run_ranks(2, _save_all, tmp_path)
    for rank, outcomes in enumerate(results):
        for options, (losses, expected, resumed_losses, resumed, back) in zip(SAVED, outcomes, strict=True):
            assert resumed_losses == losses, options
            _assert_same(resumed, expected)
            assert back["rank"] == rank and torch.equal(back["sampler"]["position"], torch.arange(5) * (rank + 1))
            assert back["history"] == [(0, 1.5), (1, numpy.float32(0.1))] and back["sampler"]["epoch"] == 3
    for first, second in zip(*results, strict=True):
        _assert_same(first[1], second[1])
    assert sorted(os.listdir(tmp_path)) == [str(i) for i in range(len(SAVED))]


# From any layout to any other

PRECISIONS = ("fp32", "bf16", "fp16")
LAYOUTS = [
    {"zero_stage": 0},
    {"zero_stage": 1, "placement": "host"},
    {"zero_stage": 2, "max_chunk_numel": 1500},
    {"zero_stage": 3, "max_chunk_numel": 700},
    {"zero_stage": 3, "placement": "host", "param_offload": 0.5, "optimizer_offload": 0.5, "max_chunk_numel": 3000},
]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


def _save_for_others(rank, world_size, folder):
    results = {}
    for precision in PRECISIONS:
        _seed(0)
        run = _start({"precision": precision})
        _train(*run, rank, world_size, 0, STEPS)
        engine.save_checkpoint(f"{folder}/{precision}", *run[:2], {"scheduler": run[2].state_dict()})
        saved = _everything(*run[:2])
        losses = _train(*run, rank, world_size, STEPS, 2 * STEPS)
        results[precision] = saved, losses, _everything(*run[:2])
    return results


def _load_in_every_layout(rank, world_size, folder):
    results = []
    jobs = list(itertools.product(LAYOUTS, PRECISIONS))
    for layout, precision in jobs if world_size == 1 else jobs[1::2]:  # still every layout and every precision
        run = _start({"precision": precision, **layout}, seed=9)
        back = engine.load_checkpoint(f"{folder}/{precision}", *run[:2])
        run[2].load_state_dict(back["scheduler"])
        loaded = _everything(*run[:2])
        results.append((layout, precision, loaded, _train(*run, rank, world_size, STEPS, 2 * STEPS)))
    return results


def _over_ranks(per_rank):
    return [sum(losses) / len(per_rank) for losses in zip(*per_rank, strict=True)]


def test_a_checkpoint_loads_at_any_world_size_stage_placement_and_chunk_size(tmp_path):
    saved = run_ranks(2, _save_for_others, tmp_path)
    for world_size in (1, 2, 4):
        if world_size == 1:
            loaded = [_load_in_every_layout(0, 1, tmp_path)]
        else:
            loaded = run_ranks(world_size, _load_in_every_layout, tmp_path)
        for outcomes in zip(*loaded, strict=True):
            layout, precision, state, _ = outcomes[0]
            (weights, steps, skipped, _), _, _ = saved[0][precision]
            for name in weights:
                assert torch.equal(state[0][name], weights[name]), (world_size, layout, precision, name)
            assert (steps, skipped) == state[1:3]
            # The rows of all ranks together are the same, so is the mean of their losses.
            losses = _over_ranks([outcome[3] for outcome in outcomes])
            expected = _over_ranks([by_rank[precision][1] for by_rank in saved])
            assert losses == pytest.approx(expected, rel=TOLERANCE[precision]), (world_size, layout, precision)


# Failures


def _error_of(call, *args):
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _fail_to_save(rank, world_size, folder):
    model, optimizer, _ = run = _start({})
    _train(*run, rank, world_size, 0, 1)
    engine.save_checkpoint(f"{folder}/last", model, optimizer, "first")
    before = _everything(model, optimizer)
    _train(*run, rank, world_size, 1, 2)
    errors = {}
    full = mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full if rank == 1 else contextlib.nullcontext():
        errors["full disk"] = _error_of(engine.save_checkpoint, f"{folder}/last", model, optimizer)
    state = {"callback": print} if rank == 1 else None
    errors["state"] = _error_of(engine.save_checkpoint, f"{folder}/last", model, optimizer, state)
    given = optimizer if rank == 0 else None
    errors["optimizer"] = _error_of(engine.save_checkpoint, f"{folder}/last", model, given)
    rows = rank_rows(batches(1, rows=8, length=6)[0], rank, world_size)
    model(input_ids=rows, labels=rows).loss.backward()
    errors["pending"] = _error_of(engine.save_checkpoint, f"{folder}/last", model, optimizer)
    optimizer.zero_grad()
    assert engine.load_checkpoint(f"{folder}/last", model, optimizer) == "first"
    after = _everything(model, optimizer)
    _assert_same(after[:3], before[:3])
    return errors


def test_a_save_that_fails_on_one_rank_fails_on_all_and_keeps_the_last_checkpoint(tmp_path):
    for rank, errors in enumerate(run_ranks(2, _fail_to_save, tmp_path)):
        for name, (own, named) in {
            "full disk": (1, "No space left on device"),
            "state": (1, "['callback'] is a"),
            "optimizer": (1, "give the optimizer that initialize() returned"),
        }.items():
            assert errors[name] is not None and named in errors[name], (name, rank, errors[name])
            assert rank == own or f"rank {own} failed" in errors[name], (name, errors[name])
        assert "gradients wait for a step" in errors["pending"]
    assert os.listdir(tmp_path) == ["last"]


OTHERS = {
    "another width": (dict(n_embd=16), "of another shape"),
    "fewer blocks": (dict(n_layer=1), "not in the model"),
    "another family": (dict(family="opt"), "not in the checkpoint"),
    "one group": (dict(groups=1), "2 optimizer groups"),
}


def _fail_to_load(rank, world_size, folder):
    run = _start({})
    _train(*run, rank, world_size, 0, 1)
    engine.save_checkpoint(f"{folder}/last", *run[:2])
    engine.save_checkpoint(f"{folder}/cut", *run[:2])
    if rank == 0:
        os.truncate(f"{folder}/cut/rank-00001-of-00002.safetensors", 1000)
    torch.distributed.barrier()
    errors = {}

    def fail(name, run, path):
        _train(*run, rank, world_size, 1, 2)
        before, random_state = _everything(*run[:2]), torch.get_rng_state()
        errors[name] = _error_of(engine.load_checkpoint, path, *run[:2])
        _assert_same(_everything(*run[:2]), before)
        assert torch.equal(torch.get_rng_state(), random_state), name

    fail("missing", run, f"{folder}/none")
    fail("truncated", run, f"{folder}/cut")
    fail("missing on rank 1", run, f"{folder}/{('last', 'none')[rank]}")
    for name, (changes, _) in OTHERS.items():
        for stage in (1, 3):
            fail(f"{name}, stage {stage}", _start({"zero_stage": stage}, **changes), f"{folder}/last")
    return errors


def test_a_checkpoint_that_does_not_fit_is_an_error_on_every_rank_and_changes_nothing(tmp_path):
    for rank, errors in enumerate(run_ranks(2, _fail_to_load, tmp_path)):
        assert "there is no checkpoint" in errors["missing"]
        assert "missing, truncated or corrupt" in errors["truncated"]
        assert "there is no checkpoint" in errors["missing on rank 1"]
        assert rank == 1 or "rank 1 failed" in errors["missing on rank 1"]
        for name, (_, named) in OTHERS.items():
            for stage in (1, 3):
                assert named in str(errors[f"{name}, stage {stage}"]), (name, stage)
