"""Gradient accumulation where gradients leave the device: once a step where their sum has room, and the same bits."""

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, initialized, state_of
from megalith.engine import Tier, Work, budgets, shard
from megalith.engine.budgets import count_that_fit
from megalith.engine.lanes import random_delay
from megalith.engine.nvme import NvmeStore
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Payload
from test_nvme_placement import smallest_ring
from tiny import batches, make_model

MICRO_STEPS = (1, 3, 3, 2, 1)  # fewer than the step before makes one expect, and more


def llama():
    return make_model("llama", num_hidden_layers=2)


def language_loss(model, step):
    rows = batches(6)[step]
    return model(input_ids=rows, labels=rows).loss


def one_step(model, optimizer, micro_steps):
    """The work that it did."""
    before = work_of(model)
    for step in range(micro_steps):
        optimizer.backward(language_loss(model, step) / micro_steps)
    optimizer.step()
    optimizer.zero_grad()
    return work_of(model) - before


def work_of(model):
    for chunk in engine_of(model).chunks:
        chunk.settle()
    return engine_of(model).ledger.work.copy()


def trained(**options):
    model, optimizer = initialized(llama, **options)
    norms = []
    for micro_steps in MICRO_STEPS:
        one_step(model, optimizer, micro_steps)
        norms.append(optimizer.grad_norm)
    return model, norms


@pytest.fixture
def drive(tmp_path, monkeypatch):
    for module in (budgets, shard):
        monkeypatch.setattr(module, "STORE_RING_BYTES", 2**16)
    return {"placement": "nvme", "nvme_dir": str(tmp_path)}


def rest_on_device(**options):
    """Bytes in use on the device apart from sums: a budget of as much leaves none of them room."""
    model, _ = initialized(llama, **options)
    schedule = engine_of(model).schedule
    return engine_of(model).ledger.tier_bytes(Tier.DEVICE) + schedule._manager.working_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_room_for_sums_changes_no_bit(precision, drive):
    expected, norms = trained(precision=precision)
    least = rest_on_device(precision=precision, placement="host")
    drive |= {"nvme_ring": smallest_ring(precision)}
    on_drive = {"host_budget": 2**16 + smallest_ring(precision) + 10_000}  # without room for gradients on the host
    variants = [
        {"placement": "host"},
        {"placement": "host", "device_budget": least},
        {"placement": "host", "device_budget": least + 60_000},  # for some
        {"placement": "host", "optimizer_offload": 0.5, "param_offload": 0.0},
        {"placement": "host", "lane_delay": random_delay(3, 0.002), "prefetch": 2},
        {"lane_delay": random_delay(5, 0.002), **drive},
        on_drive | drive,
        {"device_budget": least} | on_drive | drive,
    ]
    for options in variants:
        model, its_norms = trained(precision=precision, **options)
        assert differing(state_of(model), state_of(expected)) == [], options
        assert its_norms == pytest.approx(norms, rel=1e-12), options
        for tier in (Tier.DEVICE, Tier.HOST):  # sums are gone
            at_rest = engine.plan(llama(), precision=precision, max_chunk_numel=100, **without_delay(options))
            expected_bytes = at_rest.bytes_at_rest.get(tier, {}).get(Payload.GRADIENT, 0)
            assert engine_of(model).ledger.bytes(tier, Payload.GRADIENT) == expected_bytes, options


def without_delay(options):
    return {name: value for name, value in options.items() if name != "lane_delay"}


def on_meta(model):
    rows = torch.empty(batches(1)[0].shape, dtype=torch.long, device="meta")
    return model(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize("where", ["host", "drive"])
def test_what_leaves_in_a_step_of_four_micro_batches_is_what_leaves_in_one(where, drive, monkeypatch):
    written = []
    write = NvmeStore.write
    monkeypatch.setattr(
        NvmeStore,
        "write",
        lambda self, name, source, *at: written.append(source.nbytes) or write(self, name, source, *at),
    )
    options = {"placement": "host"}
    if where == "drive":  # gradients too
        options = drive | {"nvme_ring": smallest_ring("fp32"), "host_budget": 2**16 + smallest_ring("fp32") + 10_000}
    model, optimizer = initialized(llama, **options)
    numel = engine_of(model).layout.stored_numel
    steps = {}
    for micro_steps in (1, 1, 4, 4):  # the first of a kind expects the other
        written.clear()
        work = one_step(model, optimizer, micro_steps)
        steps[micro_steps] = work[Work.LINK_OUT], sum(written)
    assert steps[1] == steps[4]
    assert steps[1][0] == 4 * numel
    if where == "drive":  # weights, moments and gradients; a few of those have room on the host
        assert 4 * 4 * numel - 10_000 <= steps[1][1] <= 4 * 4 * numel
    for micro_steps, (out, to_drive) in steps.items():
        options |= {"max_chunk_numel": 100, "max_grad_norm": 1.0}
        planned = engine.plan(llama(), step=on_meta, accumulation_steps=micro_steps, **options).forecast.work
        assert planned[Work.LINK_OUT] == out
        assert planned.get(Work.DISK_WRITE, 0) == pytest.approx(to_drive, rel=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_compute_again_let_their_gradients_go_once(reentrant):
    def checkpointed():
        model = llama()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model.train()

    model, optimizer = initialized(checkpointed, placement="host")
    left = [one_step(model, optimizer, micro_steps)[Work.LINK_OUT] for micro_steps in (1, 1, 3, 3)]
    numel = engine_of(model).layout.stored_numel
    assert left == [4 * numel, 4 * numel, 3 * 4 * numel, 4 * numel]  # three were not expected after one


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_that_is_called_twice_before_a_backward_pass_lets_its_gradients_go_on_the_way(world_size):
    def gradient_peak(loss_of):
        plan = engine.plan(llama(), step=loss_of, world_size=world_size, placement="host", max_chunk_numel=100)
        return plan.forecast.memory["device"]["gradient"]["peak_bytes"]

    once = gradient_peak(on_meta)
    assert gradient_peak(lambda model: on_meta(model) + on_meta(model)) == once
    if world_size == 1:
        model, optimizer = initialized(llama, placement="host")
        optimizer.backward(language_loss(model, 0) + language_loss(model, 1))
        optimizer.step()
        assert engine.memory_report(model)["device"]["gradient"]["peak_bytes"] == once


def test_the_plan_has_the_peaks_of_a_run_with_sums_on_the_device():
    for options in ({"precision": "bf16"}, {"device_budget": rest_on_device(placement="host")}):
        options = {"placement": "host", "max_chunk_numel": 100, "max_grad_norm": 1.0, **options}
        model, optimizer = initialized(llama, **options)
        for _ in range(3):
            work = one_step(model, optimizer, 3)
        planned = engine.plan(llama(), step=on_meta, accumulation_steps=3, **options).forecast
        for tier, rows in engine.memory_report(model).items():
            for payload, sizes in rows.items():
                ours = planned.memory[tier][payload]["peak_bytes"]
                assert ours == pytest.approx(sizes["peak_bytes"], rel=0.05), (options, tier, payload)
        assert planned.work[Work.LINK_OUT] == pytest.approx(work[Work.LINK_OUT], rel=0.05), options
        if "device_budget" in options:  # no room: each micro-batch's leave
            assert work[Work.LINK_OUT] == 3 * 4 * engine_of(model).layout.stored_numel
            report = engine.memory_report(model)["device"]["total"]
            assert report["peak_bytes"] <= options["device_budget"]


def test_gradients_that_are_dropped_between_micro_batches_leave_nothing_behind():
    model, optimizer = initialized(llama, placement="host", precision="bf16")
    other, its_optimizer = initialized(llama, placement="host", precision="bf16")
    for its_model, its in ((model, optimizer), (other, its_optimizer)):
        for _ in range(2):
            one_step(its_model, its, 3)
    for step in range(2):
        optimizer.backward(language_loss(model, step))
    ledger = engine_of(model).ledger
    assert ledger.bytes(Tier.DEVICE, Payload.GRADIENT) >= 4 * engine_of(model).layout.stored_numel  # they wait
    optimizer.zero_grad()
    assert ledger.bytes(Tier.DEVICE, Payload.GRADIENT) == 0
    one_step(model, optimizer, 3)
    one_step(other, its_optimizer, 3)
    assert differing(state_of(model), state_of(other)) == []


def test_the_first_that_fit_are_counted():
    assert count_that_fit([3, 4, 5], 7) == 2
    assert count_that_fit([3, 4, 5], 6) == 1
    assert count_that_fit([3, 4, 5], -1) == 0
    assert count_that_fit([], 5) == 0
