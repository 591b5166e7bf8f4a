"""placement="auto" at two ranks: spare device memory takes the same optimizer shards on both, at the same step, and no
bit changes; a rank that has no memory for it fails both."""

import re

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, differing, state_of
from launch import run_ranks
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Storage
from tiny import batches, make_model, rank_rows

MICRO_STEPS = [1, 1, 1, 2, 2, 1]
"""The sums of micro-batches need more than was measured."""
VARIANTS = [
    (0.85, {"precision": "fp32"}),
    (0.6, {"precision": "bf16", "prefetch": 2}),
    (0.7, {"precision": "bf16", "state_precision": "8bit"}),
    (0.65, {"precision": "bf16", "zero_stage": 2}),
]


def build(seed=None, rank=0, **options):
    model = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    if seed is not None:  # one rank's lanes are slow
        options["lane_delay"] = random_delay(seed, 0.001) if rank == seed % 2 else None
    options = {"max_grad_norm": 0.5, "timeout_s": 30, "max_chunk_numel": 20_000} | options
    return engine.initialize(model, adamw(model), **options)


def train_steps(model, optimizer, rank, micro_steps, first=0):
    """The chunks that are promoted after each step."""
    history = []
    for step, count in enumerate(micro_steps, first):
        for number in range(count):
            rows = rank_rows(batches(16)[2 * step + number], rank, 2)
            (model(input_ids=rows, labels=rows).loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([chunk.index for chunk in engine_of(model).chunks if chunk.is_promoted])
    return history


def peak(model):
    return engine.memory_report(model)["device"]["total"]["peak_bytes"]


def _train(rank, world_size):
    histories = []
    for seed, (share, options) in enumerate(VARIANTS):
        plain = build(**options)
        train_steps(*plain, rank, MICRO_STEPS[:2])
        budget = int(peak(plain[0]) * share)
        train_steps(*plain, rank, MICRO_STEPS[2:], first=2)
        ours = build(seed, rank, placement="auto", device_budget=budget, **options)
        histories.append(train_steps(*ours, rank, MICRO_STEPS))
        assert differing(state_of(ours[0]), state_of(plain[0])) == [], options
    return histories


def test_both_ranks_promote_the_same_and_keep_every_bit():
    one, other = run_ranks(2, _train)
    assert one == other
    for (_, options), history in zip(VARIANTS, one, strict=True):
        assert history[0] == [] and history[1] and history[1] == history[2], options
        if options["precision"] == "bf16":
            assert len(history[3]) < len(history[2]), options


def _keep_budgets(rank, world_size):
    peaks = []
    for options in ({"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp32", "zero_stage": 1}):
        with pytest.raises(engine.OutOfBudgetError) as refusal:
            build(placement="auto", device_budget=1000, **options)
        least = int(re.search(r"take (\d+)", str(refusal.value))[1])
        model, optimizer = build(placement="auto", device_budget=least, **options)
        for step in range(4):
            rows = rank_rows(batches(16)[step], rank, 2)
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()  # which says nothing of what was called
            loss.backward()
            optimizer.step()
        peaks.append((peak(model), least))
    return peaks


def test_the_least_budget_is_kept():
    for peaks in run_ranks(2, _keep_budgets):
        assert all(ours <= budget for ours, budget in peaks), peaks


def _fail(rank, world_size):
    plain = build(precision="bf16")
    train_steps(*plain, rank, [1, 1, 1])
    model, optimizer = build(precision="bf16", placement="auto", device_budget=peak(plain[0]) * 2 // 3)
    train_steps(model, optimizer, rank, [1])
    allocate = Storage.device_zeros

    def failing(self, numel, dtype):
        raise torch.OutOfMemoryError("no memory")

    if rank == 1:
        Storage.device_zeros = failing
    rows = rank_rows(batches(16)[2], rank, 2)
    model(input_ids=rows, labels=rows).loss.backward()
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match="no memory"):
        optimizer.step()
    Storage.device_zeros = allocate
    assert not any(chunk.is_promoted for chunk in engine_of(model).chunks)
    rows = rank_rows(batches(16)[4], rank, 2)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    assert differing(state_of(model), state_of(plain[0])) == []


def test_a_rank_without_memory_fails_both_and_nothing_is_moved():
    run_ranks(2, _fail)
