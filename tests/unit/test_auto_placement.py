"""placement="auto": within every budget, on the fastest memory that has room, and the bits of the device."""

import re
from functools import cache

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, fit, initialized, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.engine import budgets, shard
from megalith.engine.budgets import choose_evictions
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Tier
from test_any_model import Skipping, X
from test_nvme_placement import smallest_ring
from tiny import batches, make_model


def language_loss(model, step):
    return language_loss_of(model, batches(60)[step])


def language_loss_of(model, rows):
    return model(input_ids=rows, labels=rows).loss


def llama():
    return make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=6)


@pytest.fixture(autouse=True)
def small_store_ring(monkeypatch):
    """So that a drive's buffers are smaller than these models."""
    for module in (budgets, shard):
        monkeypatch.setattr(module, "STORE_RING_BYTES", STORE_RING_BYTES)


def bytes_on(report, tier, payload):
    return report.get(tier, {}).get(payload, {"bytes": 0})["bytes"]


STORE_RING_BYTES = 2**16
STAGING = STORE_RING_BYTES + smallest_ring()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_budget_is_kept_and_changes_no_bit(precision, tmp_path):
    def train(**options):
        model, optimizer = initialized(llama, precision=precision, max_chunk_numel=20_000, **options)
        for micro_steps in (1, 2, 1):
            for step in range(micro_steps):
                optimizer.backward(language_loss(model, step) / micro_steps)
            optimizer.step()
        return state_of(model), engine.memory_report(model), engine_of(model)

    expected, everything, _ = train()
    whole = everything["device"]["total"]["peak_bytes"]
    slow = []
    for share in (0.3, 0.5, 0.8, 1.3):
        for host_budget in (10**9, STAGING + 200_000):
            options = {"device_budget": int(whole * share), "host_budget": host_budget, "nvme_dir": str(tmp_path)}
            if share == 0.3:
                options["lane_delay"] = random_delay(1, 0.0005)
            ours, report, built = train(placement="auto", nvme_ring=smallest_ring(precision), **options)
            assert differing(ours, expected) == [], options
            assert report["device"]["total"]["peak_bytes"] <= options["device_budget"], options
            if "host" in report:
                assert report["host"]["total"]["peak_bytes"] <= host_budget, options
            slow.append([sum(bytes_on(report, tier, p) for p in ("weight", "exp_avg")) for tier in ("host", "nvme")])
            assert (slow[-1][1] > 0) == (host_budget < 10**9 and share < 1), options
    with_room = slow[0::2]
    assert [host for host, _ in with_room] == sorted((host for host, _ in with_room), reverse=True)
    assert with_room[0][0] > with_room[1][0] > with_room[2][0] > with_room[3][0] == 0, "spare device memory is used"


RANKS = [
    (2, 3, "fp32", 1),
    (2, 3, "bf16", 3),
    (4, 3, "fp32", 1),
    (2, 2, "fp32", 3),
    (2, 1, "fp32", 1),
    (4, 1, "bf16", 3),
]


@pytest.mark.parametrize(("world_size", "zero_stage", "precision", "micro_steps"), RANKS)
def test_every_budget_is_kept_at_several_ranks(world_size, zero_stage, precision, micro_steps):
    """Reductions take what each rank receives, and its part of the sum, beside whole gradients."""
    options = {"placement": "auto", "zero_stage": zero_stage, "precision": precision, "max_chunk_numel": 20_000}
    with pytest.raises(engine.OutOfBudgetError) as refusal:
        engine.plan(llama(), world_size=world_size, device_budget=1000, **options)
    least = int(re.search(r"take (\d+)", str(refusal.value))[1])
    for budget in (least, least * 5 // 4):
        planned = engine.plan(
            llama(),
            step=lambda model: language_loss_of(model, torch.empty(2, 12, dtype=torch.long, device="meta")),
            world_size=world_size,
            accumulation_steps=micro_steps,
            device_budget=budget,
            **options,
        )
        assert planned.peak_bytes[Tier.DEVICE] <= budget


def test_a_block_that_is_skipped_holds_up_no_gradient():
    """At several ranks, groups are reduced in one order."""
    options = {"placement": "auto", "world_size": 2, "max_chunk_numel": 3000}
    with pytest.raises(engine.OutOfBudgetError) as refusal:
        engine.plan(Skipping(), device_budget=10, **options)
    least = int(re.search(r"take (\d+)", str(refusal.value))[1])
    steps = iter(range(9))
    planned = engine.plan(
        Skipping(), device_budget=least, step=lambda model: model(X.to("meta"), next(steps)).square().mean(), **options
    )
    assert planned.peak_bytes[Tier.DEVICE] <= least


def test_the_host_takes_weights_before_state(tmp_path):
    plan = engine.plan(llama(), placement="host", max_chunk_numel=20_000)
    weights = plan.bytes_at_rest[Tier.HOST]
    weight_bytes = next(nbytes for payload, nbytes in weights.items() if payload.value == "weight")
    options = {"placement": "auto", "device_budget": plan.peak_bytes[Tier.DEVICE] * 4 // 3, "nvme_dir": str(tmp_path)}
    ring = {"nvme_ring": smallest_ring(), "max_chunk_numel": 20_000}
    for extra, on_drive in ((0, False), (-weight_bytes // 2, True)):
        plan = engine.plan(llama(), host_budget=STAGING + weight_bytes + extra, **options, **ring)
        tiers = {tier.value: {p.value for p in payloads} for tier, payloads in plan.bytes_at_rest.items()}
        assert ("weight" in tiers["nvme"]) == on_drive
        assert "exp_avg" in tiers["nvme"] and "exp_avg" not in tiers["host"]


def test_budgets_that_cannot_hold_it_say_what_is_missing(tmp_path):
    with pytest.raises(engine.OutOfBudgetError, match=r"device_budget is 5000 bytes, .* take \d+: raise it"):
        initialized(llama, placement="auto", device_budget=5000)
    options = {"placement": "auto", "device_budget": "2MB"}
    with pytest.raises(engine.OutOfBudgetError, match=r"host_budget is 9000 bytes, .*takes \d+: give nvme_dir"):
        initialized(llama, host_budget=9000, **options)
    with pytest.raises(engine.OutOfBudgetError, match=r"host_budget is 9000 bytes.*\d+ bytes: raise it"):
        initialized(llama, host_budget=9000, nvme_dir=str(tmp_path), nvme_ring=smallest_ring(), **options)


def test_without_budgets_it_reads_the_machine():
    model, optimizer = initialized(llama, placement="auto")
    fit(model, optimizer, language_loss, 2)
    assert engine_of(model).config.device_budget > 10**8
    assert engine.memory_report(model).keys() == {"device"}


def test_a_room_that_was_read_is_no_limit(monkeypatch):
    """Too little for the blocks in use by the plan's bounds, which suppose micro-batches: the least is put there."""
    monkeypatch.setattr(shard, "read_machine", lambda device, group: budgets.Machine(False, 5000, 10**9))
    states = []
    for placement in ("device", "auto"):
        model, optimizer = initialized(llama, placement=placement)
        fit(model, optimizer, language_loss, 2)
        states.append(state_of(model))
    assert differing(*states) == [] and "exp_avg" not in engine.memory_report(model)["device"]


PROGRAMS = {
    "mixtral": (lambda: make_model("mixtral", num_hidden_layers=3), language_loss),
    "skipped blocks": (Skipping, lambda model, step: model(X, step).square().mean()),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_orders_that_change_and_programs_that_take_turns(name, tmp_path):
    build, loss_of = PROGRAMS[name]

    def train(**options):
        model, optimizer = initialized(build, **options)
        seen = []
        for step in range(6):
            fit(model, optimizer, loss_of, [step])
            if step % 2:
                with torch.no_grad():
                    seen.append(float(loss_of(model.eval(), step)))
                model.train()
        return state_of(model), seen, engine.memory_report(model)

    expected, losses, everything = train()
    least = engine.plan(build(), placement="host", max_chunk_numel=100).peak_bytes[Tier.DEVICE] * 4 // 3
    whole = everything["device"]["total"]["peak_bytes"]
    for budget in (least, (least + whole) // 2, whole * 2):
        options = {"placement": "auto", "device_budget": budget, "host_budget": STAGING + 20_000, "prefetch": 2}
        options |= {"nvme_dir": str(tmp_path), "nvme_ring": smallest_ring(), "prefetch": 1}
        ours, our_losses, report = train(**options)
        assert differing(ours, expected) == [] and our_losses == losses, budget
        assert report["device"]["total"]["peak_bytes"] <= budget


# The policy, played over a trace with one group in use at a time.


def fetched_bytes(trace, sizes, budget, evict):
    """What is read in when `trace` (a group's number at each moment) is played; `evict` gives what leaves."""
    inside, total = set(), 0
    for moment, group in enumerate(trace):
        if group in inside:
            continue
        needed = sum(sizes[each] for each in inside) + sizes[group] - budget
        if needed > 0:
            inside -= set(evict(moment, sorted(inside), needed))
        assert sum(sizes[each] for each in inside) + sizes[group] <= budget
        inside.add(group)
        total += sizes[group]
    return total


def by_policy(trace, sizes):
    def evict(moment, inside, needed):
        rest = trace[moment:]
        return choose_evictions([(g, sizes[g], rest.index(g) if g in rest else None) for g in inside], needed)

    return evict


def least_bytes(trace, sizes, budget):
    """The optimum, by trying every set that can be kept at every moment."""

    @cache
    def best(moment, inside):
        if moment == len(trace):
            return 0
        group = trace[moment]
        if group in inside:
            return best(moment + 1, inside)
        choices = []
        members = sorted(inside)
        for mask in range(2 ** len(members)):
            kept = frozenset(each for bit, each in enumerate(members) if mask >> bit & 1)
            if sum(sizes[each] for each in kept) + sizes[group] <= budget:
                choices.append(sizes[group] + best(moment + 1, kept | {group}))
        return min(choices)

    return best(0, frozenset())


traces = st.lists(st.integers(0, 4), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(traces, st.integers(1, 5))
def test_groups_of_one_size_are_evicted_as_well_as_can_be(trace, room):
    sizes = [1] * 5
    assert fetched_bytes(trace, sizes, room, by_policy(trace, sizes)) == least_bytes(trace, sizes, room)


@settings(max_examples=150, deadline=None)
@given(traces, st.lists(st.integers(1, 4), min_size=5, max_size=5), st.integers(4, 12))
def test_groups_of_any_size_are_evicted_within_half_of_the_optimum(trace, sizes, budget):
    ours = fetched_bytes(trace, sizes, budget, by_policy(trace, sizes))
    assert ours <= 1.5 * least_bytes(trace, sizes, budget)


@given(st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 20)), max_size=6), st.integers(-3, 40))
def test_what_is_evicted_is_enough_and_no_more(groups, needed):
    candidates = [(key, nbytes, use) for key, (nbytes, use) in enumerate(groups)]
    chosen = choose_evictions(candidates, needed)
    freed = [groups[key][0] for key in chosen]
    if sum(nbytes for nbytes, _ in groups) >= needed:
        assert sum(freed) >= needed
        assert all(sum(freed) - each < needed for each in freed)
    else:
        assert sorted(chosen) == list(range(len(groups)))
