"""placement="auto" after two steps: spare device memory takes optimizer shards, within the budget and with the bits of
a run in which nothing moves; what needs more room later gets it back."""

import itertools
from collections import Counter

import megalith.engine as engine
import numpy as np
import pytest
import torch
from against_torch import adamw, differing, fit, gathered_weights, initialized, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.engine import budgets, planner, shard
from megalith.engine.chunk import Chunk
from megalith.engine.lanes import random_delay
from megalith.engine.machine import GpuMeter
from megalith.engine.migration import Candidate, choose_demotions, choose_promotions
from megalith.engine.nvme import NvmeStore
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Storage, Tier, Work
from megalith.engine.trace import AccessTrace, Need
from test_nvme_placement import smallest_ring
from tiny import batches, make_model

STORE_RING_BYTES = 2**16


@pytest.fixture(autouse=True)
def small_store_ring(monkeypatch):
    for module in (budgets, shard):
        monkeypatch.setattr(module, "STORE_RING_BYTES", STORE_RING_BYTES)


def llama(checkpointing=False):
    model = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=6)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def language_loss(model, step):
    rows = batches(60)[step % 60]
    return model(input_ids=rows, labels=rows).loss


def build(checkpointing=False, **options):
    return initialized(lambda: llama(checkpointing), **({"max_chunk_numel": 20_000} | options))


def train_steps(model, optimizer, micro_steps):
    """One step for each number of micro-batches."""
    for count in micro_steps:
        for number in range(count):
            optimizer.backward(language_loss(model, number) / count)
        optimizer.step()
        optimizer.zero_grad()


def device_bytes(model):
    return engine.memory_report(model)["device"]["total"]


def budget_for(share, options, micro_steps):
    """A part of what it takes to have everything on the device."""
    model, optimizer = build(**options)
    train_steps(model, optimizer, micro_steps)
    return int(device_bytes(model)["peak_bytes"] * share)


def work_of(model):
    for chunk in engine_of(model).chunks:
        chunk.settle()
    return engine_of(model).ledger.work.copy()


def count_drive(monkeypatch):
    """Bytes read and written so far."""
    count = Counter()
    for name in ("read", "write"):
        transfer = getattr(NvmeStore, name)

        def counted(self, buffer, values, *args, transfer=transfer):
            count["bytes"] += values.nbytes
            return transfer(self, buffer, values, *args)

        monkeypatch.setattr(NvmeStore, name, counted)
    return count


RUNS = {
    "fp32": ({}, {"prefetch": 0}, 0.4, [1] * 6),
    "fp32 on drives": ({}, {"nvme": True}, 0.6, [1] * 6),
    "bf16": ({"precision": "bf16"}, {"lane_delay": random_delay(3, 0.0005)}, 0.5, [1] * 6),
    "bf16 on drives": ({"precision": "bf16"}, {"nvme": True, "lane_delay": random_delay(4, 0.0003)}, 0.5, [1] * 6),
    "fp16": ({"precision": "fp16"}, {}, 0.6, [1] * 6),
    "8bit": ({"precision": "bf16", "state_precision": "8bit"}, {"prefetch": 2}, 0.7, [1] * 6),
    "8bit on drives": ({"precision": "bf16", "state_precision": "8bit"}, {"nvme": True}, 0.6, [1] * 6),
    "bf16, updates in the backward pass": (
        {"precision": "bf16", "update_in_backward": True, "max_grad_norm": None},
        {"nvme": True, "lane_delay": random_delay(5, 0.0003)},
        0.6,
        [1] * 6,
    ),
    "bf16, activations": ({"precision": "bf16", "offload_activations": True, "checkpointing": True}, {}, 0.5, [1] * 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_promoted_chunks_keep_every_bit_and_the_budget(name, tmp_path):
    options, extra, share, micro_steps = RUNS[name]
    expected, reference = build(**options)
    train_steps(expected, reference, micro_steps)
    budget = budget_for(share, options, micro_steps)
    if extra.pop("nvme", False):
        ring = smallest_ring(options.get("precision", "fp32"))
        extra = extra | {"nvme_dir": str(tmp_path), "nvme_ring": ring, "host_budget": STORE_RING_BYTES + ring + 150_000}
    model, optimizer = build(placement="auto", device_budget=budget, **options, **extra)
    migration = engine_of(model).migration
    train_steps(model, optimizer, micro_steps[:2])
    at_two, promoted = device_bytes(model)["bytes"], migration.promotion
    assert promoted.chunks > 0 and at_two > promoted.device_bytes
    train_steps(model, optimizer, micro_steps[2:])
    assert migration.promotion == promoted
    assert differing(state_of(model), state_of(expected)) == []
    assert device_bytes(model)["peak_bytes"] <= budget


@pytest.mark.parametrize("on_drive", [False, True])
def test_a_step_moves_less_by_what_the_promotion_says(on_drive, tmp_path, monkeypatch):
    options = {"precision": "bf16", "prefetch": 0}
    budget, drive = budget_for(0.6, options, [1] * 3), count_drive(monkeypatch)
    if on_drive:
        ring = smallest_ring("bf16")
        options |= {"nvme_dir": str(tmp_path), "nvme_ring": ring, "host_budget": STORE_RING_BYTES + ring + 100_000}
    model, optimizer = build(placement="auto", device_budget=budget, **options)
    moved = []
    for _ in range(4):
        before, on_the_drive = work_of(model), drive["bytes"]
        train_steps(model, optimizer, [1])
        work = work_of(model) - before
        moved.append(drive["bytes"] - on_the_drive if on_drive else work[Work.LINK_IN] + work[Work.LINK_OUT])
    saved = engine_of(model).migration.promotion.saved_bytes
    # Before there was a trace, and after the move; the move's own traffic is in the second step.
    assert moved[0] - moved[3] == pytest.approx(saved, rel=0.1) and saved > 0


def test_the_plan_has_the_promotion_of_the_run():
    options = {"placement": "auto", "precision": "bf16", "device_budget": 1_700_000, "max_grad_norm": 1.0}
    options["max_chunk_numel"] = 20_000
    ids = torch.empty(batches(1)[0].shape, dtype=torch.long, device="meta")
    plan = engine.plan(llama(), step=lambda model: model(input_ids=ids, labels=ids).loss, **options)
    model, optimizer = build(**options)
    fit(model, optimizer, language_loss, 2)
    before = work_of(model)
    fit(model, optimizer, language_loss, [2])
    ran = engine_of(model).migration.promotion
    assert plan.forecast.promotion == ran and ran.chunks > 0
    assert f"takes weights and state of {ran.chunks} of the {ran.of_chunks} chunks" in str(plan)
    report = engine.memory_report(model)
    assert plan.forecast.memory.keys() == report.keys()
    for tier, payloads in report.items():
        for payload, sizes in payloads.items():
            assert plan.forecast.memory[tier][payload]["peak_bytes"] == pytest.approx(sizes["peak_bytes"], rel=0.05)
    ran = work_of(model) - before
    for work in (Work.LINK_OUT, Work.DEVICE_ADAM, Work.HOST_ADAM):
        assert plan.forecast.work[work] == pytest.approx(ran[work], rel=0.05), work
    options["device_budget"] *= 3
    alone = engine.plan(llama(), step=lambda model: model(input_ids=ids, labels=ids).loss, **options)
    assert plan.forecast.activation_peak_bytes == alone.forecast.activation_peak_bytes


def test_what_needs_more_later_gets_it_back(tmp_path):
    """Sums of micro-batches are float32, twice what was measured."""
    micro_steps = [1, 1, 1, 2, 2, 1]
    expected, reference = build(precision="bf16")
    train_steps(expected, reference, micro_steps)
    ring = smallest_ring("bf16")
    drive = {"nvme_dir": str(tmp_path), "nvme_ring": ring, "host_budget": STORE_RING_BYTES + ring + 150_000}
    budget = budget_for(0.5, {"precision": "bf16"}, [2])
    for extra in ({}, drive, {"lane_delay": random_delay(6, 0.0005)}):
        model, optimizer = build(placement="auto", precision="bf16", device_budget=budget, **extra)
        migration = engine_of(model).migration
        home, first = device_bytes(model)["bytes"], engine_of(model).chunks[0]
        versions = [first.version]  # which tell what was read ahead that it is void
        train_steps(model, optimizer, micro_steps[:3])
        versions.append(first.version)
        before = migration.promotion.chunks
        train_steps(model, optimizer, micro_steps[3:4])
        after = migration.promotion.chunks
        assert after < before
        peak = device_bytes(model)["peak_bytes"]
        train_steps(model, optimizer, micro_steps[4:])
        assert device_bytes(model)["peak_bytes"] == peak and migration.promotion.chunks == after
        assert differing(state_of(model), state_of(expected)) == []
        migration.send_all_home()
        engine_of(model).schedule.reshard_all()
        assert device_bytes(model)["bytes"] == home
        assert versions == sorted({*versions, first.version})[:2]
        assert differing(state_of(model), state_of(expected)) == []


@pytest.mark.parametrize(
    ("owner", "name", "fails_at"),
    [(Storage, "device_zeros", 0), (Storage, "device_zeros", 4), (Chunk, "_copy_in", 0), (Chunk, "_copy_in", 6)],
)
def test_a_move_that_fails_leaves_nothing_half_moved(owner, name, fails_at, monkeypatch):
    expected, reference = build(precision="bf16")
    fit(expected, reference, language_loss, 5)
    budget = budget_for(0.6, {"precision": "bf16"}, [1])
    model, optimizer = build(placement="auto", precision="bf16", device_budget=budget)
    fit(model, optimizer, language_loss, 1)
    engine_of(model).schedule.reshard_all()
    before = device_bytes(model)["bytes"]
    works, calls = getattr(owner, name), itertools.count()

    def fails(*args):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError("no memory")
        return works(*args)

    def begin(move):
        monkeypatch.setattr(owner, name, fails)
        move()

    migration = engine_of(model).migration
    monkeypatch.setattr(migration, "move", lambda move=migration.move: begin(move))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fit(model, optimizer, language_loss, [1])
    monkeypatch.undo()
    assert migration.promotion.chunks == 0 and next(calls) > fails_at
    engine_of(model).schedule.reshard_all()
    assert device_bytes(model)["bytes"] == before
    for step in (2, 3, 4):
        fit(model, optimizer, language_loss, [step])
    assert differing(state_of(model), state_of(expected)) == []


def test_checkpoints_and_weights_of_promoted_chunks(tmp_path):
    options = {"placement": "auto", "precision": "bf16", "device_budget": budget_for(0.6, {"precision": "bf16"}, [1])}
    expected, reference = build(precision="bf16")
    model, optimizer = build(**options)
    for each, step in ((expected, reference), (model, optimizer)):
        fit(each, step, language_loss, 4)
    assert engine_of(model).migration.promotion.chunks > 0
    assert differing(gathered_weights(model), gathered_weights(expected)) == []
    engine.save_checkpoint(tmp_path / "saved", model, optimizer)
    engine.save_pretrained(tmp_path / "pretrained", model)
    plain = type(model).from_pretrained(tmp_path / "pretrained")
    assert differing(dict(plain.named_parameters()), gathered_weights(expected)) == []
    others = [build(precision="bf16"), build(**options)]
    fit(*others[1], language_loss, 3)  # its own chunks are promoted when it loads
    for other, its in others:
        engine.load_checkpoint(tmp_path / "saved", other, its)
        fit(other, its, language_loss, [4, 5])
    fit(expected, reference, language_loss, [4, 5])
    for other, _ in others:
        assert differing(state_of(other), state_of(expected)) == []


def test_an_engine_that_joins_later_finds_the_room_that_the_plan_had():
    def start(manager, seed):
        model = make_model("llama", seed=seed, hidden_size=64, intermediate_size=128, num_hidden_layers=6)
        options = {} if manager is None else {"manager": manager, "placement": "auto"}
        options |= {"precision": "bf16", "max_chunk_numel": 20_000, "max_grad_norm": 1.0}
        return engine.initialize(model, adamw(model), **options)

    plain = [start(None, seed) for seed in (0, 1)]
    budget = int(device_bytes(plain[0][0])["bytes"] * 1.1)
    manager = engine.Manager(device_budget=budget, host_budget="1GB")
    shared = [start(manager, 0)]
    for each in (plain[0], shared[0]):
        fit(*each, language_loss, 3)
    alone = engine_of(shared[0][0]).migration.promotion
    assert alone.chunks > 0
    shared.append(start(manager, 1))
    assert engine_of(shared[0][0]).migration.promotion.chunks == 0
    for step in range(3, 7):
        for each in (*plain, *shared):
            fit(*each, language_loss, [step])
    for ours, theirs in zip(shared, plain, strict=True):
        assert differing(state_of(ours[0]), state_of(theirs[0])) == []
    assert manager.ledger.report()["device"]["total"]["peak_bytes"] <= budget


class Card:
    """A GPU's memory, of which everything but the engine uses some."""

    def __init__(self, room, others):
        self.room, self.others, self.peak, self.overshoot = room, others, 0, 0

    def take_other_bytes(self, stored_bytes):
        peak, self.peak = max(self.peak, self.others), 0
        return peak

    def room_bytes(self):
        return self.room

    def take_overshoot(self):
        taken, self.overshoot = self.overshoot, 0
        return taken


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_without_a_budget_the_room_is_what_the_card_has_beside_all_else(micro_steps, monkeypatch):
    expected, reference = build(precision="bf16")
    train_steps(expected, reference, [micro_steps] * 5)
    whole = device_bytes(expected)["peak_bytes"]
    promoted = []
    for others in (0, whole // 2):
        card = Card(whole * 3 // 2, others)
        monkeypatch.setattr(shard, "make_meter", lambda device, card=card: card)
        monkeypatch.setattr(shard, "read_machine", lambda device, group: budgets.Machine(False, whole // 3, 10**9))
        model, optimizer = build(placement="auto", precision="bf16")
        train_steps(model, optimizer, [micro_steps] * 3)
        assert engine_of(model).schedule.device_budget == card.room - others * 5 // 4
        assert device_bytes(model)["peak_bytes"] <= card.room - others
        promoted.append(engine_of(model).migration.promotion)
        card.overshoot = 100_000  # a longer batch
        train_steps(model, optimizer, [micro_steps])
        less = promoted[-1].device_bytes - engine_of(model).migration.promotion.device_bytes
        assert 60_000 < less < 400_000
        assert engine_of(model).schedule.device_budget == card.room - others * 5 // 4 - 100_000
        train_steps(model, optimizer, [micro_steps])
        assert differing(state_of(model), state_of(expected)) == []
    assert promoted[0].chunks == promoted[0].of_chunks > promoted[1].chunks > 0


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_longer_batch_finds_room_before_it_is_computed(micro_steps, monkeypatch):
    expected, reference = build(precision="bf16")
    whole = device_bytes(expected)["peak_bytes"]
    card = Card(whole * 3 // 2, others := whole // 8)
    monkeypatch.setattr(shard, "make_meter", lambda device: card)
    monkeypatch.setattr(shard, "read_machine", lambda device, group: budgets.Machine(False, whole // 3, 10**9))
    model, optimizer = build(placement="auto", precision="bf16")
    seen = []  # (budget, what is promoted, what the device holds) whenever the first block computes

    def look(*args):
        migration, schedule = engine_of(model).migration, engine_of(model).schedule
        seen.append((schedule.device_budget, migration.promotion.device_bytes, device_bytes(model)["bytes"]))

    model.model.layers[0].register_forward_pre_hook(look)

    def run(rows, trains=True):
        for each, step in ((model, optimizer), (expected, reference)):
            with torch.set_grad_enabled(trains):
                for _ in range(micro_steps):
                    loss = each(input_ids=rows, labels=rows).loss
                    if trains:
                        step.backward(loss / micro_steps)
            if trains:
                step.step()
                step.zero_grad()

    rows = batches(1)[0]
    width = rows.shape[1]
    for _ in range(3):
        run(rows)
    planned = seen[-1]
    assert planned[0] == card.room - others * 5 // 4 and planned[1] > 0
    run(torch.cat([rows, rows[:, : width // 4]], 1))
    run(torch.cat([rows] * 8, 1), trains=False)
    assert seen[-1][:2] == planned[:2], "what was left for computing is enough"
    seen.clear()
    run(torch.cat([rows] * 3, 1))
    more = 2 * (others * 5 // 4)
    assert abs(planned[0] - seen[0][0] - more) < 4
    assert seen[0][1] < planned[1] and seen[0][2] <= seen[0][0], "before it computes"
    assert len({each[:2] for each in seen}) == 1, "once"
    again = seen[-1][:2]
    run(torch.cat([rows] * 3, 1))
    assert seen[-1][:2] == again
    assert differing(state_of(model), state_of(expected)) == []


def test_the_meter_of_a_gpu_takes_peaks_for_what_they_are(monkeypatch):
    now = {"allocated": 10, "peak": 12, "reserved": 15, "max_reserved": 16}
    for name, key in (
        ("memory_allocated", "allocated"),
        ("max_memory_allocated", "peak"),
        ("memory_reserved", "reserved"),
        ("max_memory_reserved", "max_reserved"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, key=key: now[key])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    meter = GpuMeter(torch.device("cuda"))
    assert meter.room_bytes() == 50 + 15 - 5, "a twentieth is kept back"
    assert meter.take_other_bytes(4) == 6, "below a peak of earlier: what there is now"
    now.update(allocated=11, peak=30)
    assert meter.take_other_bytes(6) == 26, "of the peak, the engine had 4 at least"
    assert meter.take_other_bytes(6) == 5
    now.update(allocated=9, peak=20)  # by the user, who resets it
    assert meter.take_other_bytes(6) == 14
    now.update(peak=70, max_reserved=85)
    assert meter.room_bytes() == 50 + 15 - 15
    assert (meter.take_overshoot(), meter.take_overshoot()) == (20, 0)


def test_room_stays_for_gathered_weights_and_what_is_computed_with_them(monkeypatch):
    """As in the answers of PPO, before the first step."""
    promoted = []
    for computed in (0, 2_400_000):
        card = Card(4_500_000, 0)
        monkeypatch.setattr(shard, "make_meter", lambda device, card=card: card)
        monkeypatch.setattr(shard, "read_machine", lambda device, group: budgets.Machine(False, 900_000, 10**9))
        model, optimizer = build(placement="auto", precision="bf16")
        with engine.gathered(model):
            card.peak = computed
        fit(model, optimizer, language_loss, 3)
        with engine.gathered(model):
            assert device_bytes(model)["bytes"] + computed * 5 // 4 <= card.room
        promoted.append(engine_of(model).migration.promotion.chunks)
    assert promoted[0] > promoted[1] > 0


def test_what_moments_need_is_measured_anew_where_the_order_or_the_placement_changed():
    trace = AccessTrace()

    def run(uses, gradient_bytes):
        for use in uses:
            trace.visit(use)
            trace.measure(Need(frozenset({use}), gradient_bytes))

    run("abab", 5)
    run("ab", 3)
    assert max(need.gradient_bytes for need in trace.needs.values()) == 5, "the most that was seen"
    run("acab", 3)  # after "ba", "b" is expected, and "ab" follows anew
    assert ("a", "c") in trace.needs and trace.needs["b", "a"].gradient_bytes == 5
    assert trace.needs["a", "b"].gradient_bytes == 3, "the order has changed before it"
    trace.age(2)
    assert trace.needs["b", "a"].gradient_bytes == 7
    run("a", 1)
    assert trace.needs["b", "a"] == Need(frozenset("a"), 1)
    trace.age(-9)
    assert min(need.gradient_bytes for need in trace.needs.values()) == 0


def test_a_plan_for_a_gpu_without_a_budget_has_its_activations_beside_the_promoted(monkeypatch):
    ids = torch.empty(batches(1)[0].shape, dtype=torch.long, device="meta")

    def planned(gpu_bytes):
        machine = budgets.Machine(True, gpu_bytes * 6 // 10, 10**9, gpu_bytes)
        monkeypatch.setattr(planner, "read_machine", lambda device, group: machine)
        options = {"placement": "auto", "precision": "bf16", "max_chunk_numel": 20_000}
        plan = engine.plan(llama(), step=lambda model: model(input_ids=ids, labels=ids).loss, **options)
        return plan.forecast, plan.problems({Tier.DEVICE: gpu_bytes})

    for gpu_bytes, all_of_it in ((2_500_000, False), (3_600_000, False), (10_000_000, True)):
        forecast, problems = planned(gpu_bytes)
        assert problems == []
        promotion = forecast.promotion
        assert promotion is None if all_of_it else promotion.chunks > 0


# The policy


def best(candidates, excess):
    """The most that any choice saves."""
    choices = []
    for chosen in itertools.product((False, True), repeat=len(candidates)):
        some = list(itertools.compress(candidates, chosen))
        if (excess + sum(each.added_bytes for each in some) <= np.maximum(excess, 0)).all():
            choices.append(sum(each.saved_bytes for each in some))
    return max(choices)


def candidates_of(rows):
    return [Candidate(key, saved, np.array(added, dtype=np.int64)) for key, (saved, added) in enumerate(rows)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=7), st.integers(-30, 3))
def test_promotions_save_at_least_half_of_the_best_choice(rows, excess):
    candidates = candidates_of((saved, [added]) for saved, added in rows)
    excess = np.array([excess])
    chosen = choose_promotions(candidates, excess)
    saved = sum(candidates[key].saved_bytes for key in chosen)
    assert 2 * saved >= best(candidates, excess)
    assert len(set(chosen)) == len(chosen)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(-40, 0))
def test_promotions_of_equal_chunks_are_as_good_as_can_be(added, count, excess):
    candidates = candidates_of([(3, [added])] * count)
    chosen = choose_promotions(candidates, np.array([excess]))
    assert chosen == list(range(min(count, -excess // added))), "the first in order"


vectors = st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(-4, 9), min_size=3, max_size=3)), max_size=6)
excesses = st.lists(st.integers(-30, 5), min_size=3, max_size=3)


@settings(max_examples=200, deadline=None)
@given(vectors, excesses)
def test_no_moment_is_ever_above_the_room(rows, excess):
    candidates, excess = candidates_of(rows), np.array(excess)
    chosen = [candidates[key] for key in choose_promotions(candidates, excess)]
    assert (excess + sum(each.added_bytes for each in chosen) <= np.maximum(excess, 0)).all()
    assert sum(each.saved_bytes for each in chosen) <= best(candidates, excess)


@settings(max_examples=200, deadline=None)
@given(vectors, excesses)
def test_demotions_are_enough_and_no_more(rows, excess):
    promoted, excess = candidates_of(rows), np.array(excess)
    chosen = [promoted[key] for key in choose_demotions(promoted, excess)]
    left = excess - sum(each.added_bytes for each in chosen)
    if (left <= 0).all():
        assert not any((left + each.added_bytes <= 0).all() for each in chosen)
    else:
        assert len(chosen) == len(promoted)
