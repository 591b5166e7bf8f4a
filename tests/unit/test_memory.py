"""What is stored where: the report against the plan, budgets, fractions, and the lanes and tiers below."""

import re
from pathlib import Path

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, differing, fit, initialized, state_of
from megalith.engine.lanes import LaneError, ThreadLane, random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import BufferPool, HostSlab, Ledger, OutOfBudgetError, Payload, Storage, Tier
from tiny import batches, make_model


def language_loss(model, step):
    rows = batches(20)[step]
    return model(input_ids=rows, labels=rows).loss


def llama():
    return make_model("llama", num_hidden_layers=4)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_report_agrees_with_the_plan(precision, stage, placement):
    options = {"precision": precision, "zero_stage": stage, "placement": placement, "max_chunk_numel": 10**6}
    plan = engine.plan(llama(), **options)
    model, optimizer = initialized(llama, **options)
    fit(model, optimizer, language_loss, 3)
    report = engine.memory_report(model)
    for tier, payloads in plan.bytes_at_rest.items():
        for payload, nbytes in payloads.items():
            assert report[tier.value][payload.value]["bytes"] == nbytes, (tier, payload)
    for tier, nbytes in plan.peak_bytes.items():
        if nbytes:
            assert report[tier.value]["total"]["peak_bytes"] == pytest.approx(nbytes, rel=0.05), tier


@pytest.mark.parametrize("placement", ["device", "host"])
def test_memory_is_flat_from_the_third_step_on(placement):
    model, optimizer = initialized(llama, placement=placement, precision="bf16")
    fit(model, optimizer, language_loss, 3)
    third = engine.memory_report(model)
    fit(model, optimizer, language_loss, 20)
    assert engine.memory_report(model) == third


def test_fractions_are_kept_to_half_a_chunk():
    for fraction in (0.0, 0.25, 0.5, 1.0):
        options = {"placement": "host", "param_offload": fraction, "optimizer_offload": 1 - fraction}
        model, _ = initialized(llama, **options)
        report = engine.memory_report(model)
        largest = max(chunk.spec.nbytes for chunk in engine_of(model).chunks)
        for payload, wanted in (("weight", fraction), ("exp_avg", 1 - fraction)):
            on = {tier: report.get(tier, {}).get(payload, {"bytes": 0})["bytes"] for tier in ("device", "host")}
            assert abs(on["host"] - wanted * sum(on.values())) <= largest / 2


def gathers(monkeypatch, **options) -> tuple[int, dict]:
    from megalith.engine.chunk import Chunk

    count = 0
    allocate = Chunk.allocate_full

    def counted(chunk):
        nonlocal count
        count += 1
        allocate(chunk)

    model, optimizer = initialized(llama, placement="host", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "allocate_full", counted)
        fit(model, optimizer, language_loss, 4)
    return count, state_of(model)


def test_a_larger_device_budget_saves_gathers_and_changes_no_bit(monkeypatch):
    none, expected = gathers(monkeypatch)
    plan = engine.plan(llama(), placement="host", max_chunk_numel=100)
    enough = plan.peak_bytes[Tier.DEVICE] + plan.param_numel * 4 + 10**5
    some, bits = gathers(monkeypatch, device_budget=plan.peak_bytes[Tier.DEVICE] + plan.param_numel)
    least, all_bits = gathers(monkeypatch, device_budget=enough)
    assert least < some < none
    assert differing(bits, expected) == differing(all_bits, expected) == []


VARIANTS = [
    {"placement": "device"},
    {"placement": "device", "max_chunk_numel": 1},
    {"placement": "device", "zero_stage": 1, "max_chunk_numel": 10**9},
    {"placement": "host", "max_chunk_numel": 1, "prefetch": 3},
    {"placement": "host", "max_chunk_numel": 1000, "prefetch": 0},
    {"placement": "host", "max_chunk_numel": 10**9},
    {"placement": "host", "param_offload": 0.5, "optimizer_offload": 0.3, "prefetch": 3},
    {"placement": "host", "param_offload": 0.0},
    {"placement": "host", "optimizer_offload": 0.0, "device_budget": "1MB"},
    {"placement": "host", "zero_stage": 2},
]


def by_bits(options, precision, steps=5):
    model, optimizer = initialized(llama, precision=precision, **options)
    fit(model, optimizer, language_loss, steps)
    return state_of(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_where_and_how_chunks_are_stored_changes_no_bit(precision):
    expected = by_bits(VARIANTS[0], precision)
    for options in VARIANTS[1:]:
        assert differing(by_bits(options, precision), expected) == [], options


def test_random_delays_on_every_lane_change_no_bit():
    expected = by_bits({}, "bf16", steps=2)
    for seed in range(20):
        options = {"placement": "host", "prefetch": seed % 3, "lane_delay": random_delay(seed, 0.001)}
        assert differing(by_bits(options, "bf16", steps=2), expected) == [], seed


def test_work_on_a_lane_is_done_in_order():
    lane, done = ThreadLane("ordered", random_delay(0, 0.002)), []
    events = [lane.submit(lambda i=i: done.append(i), f"work {i}") for i in range(30)]
    events[-1].wait()
    assert done == list(range(30))
    lane.close()
    lane._thread.join(10)
    assert not lane._thread.is_alive()
    with pytest.raises(LaneError, match="'ordered' is closed and cannot take more"):
        lane.submit(lambda: None, "more")


def test_a_lane_that_failed_tells_every_waiter_and_refuses_later_work():
    lane, done = ThreadLane("copies"), []
    first = lane.submit(lambda: done.append(1), "first")
    failed = lane.submit(lambda: 1 / 0, "unshard block 7")
    later = lane.submit(lambda: done.append(2), "later")
    first.wait()
    for event in (failed, later, lane.submit(lambda: done.append(3), "after")):
        with pytest.raises(LaneError, match="'copies'.*unshard block 7.*division by zero") as caught:
            event.wait()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert done == [1]
    lane.close()


def test_an_error_on_a_lane_reaches_the_training_loop():
    calls = iter(range(100))

    def delay():
        if next(calls) == 3:
            raise OSError("the disk is gone")
        return 0.0

    model, optimizer = initialized(llama, placement="host", lane_delay=delay)
    with pytest.raises(LaneError, match="the disk is gone"):
        fit(model, optimizer, language_loss, 2)


def test_the_ledger_counts_to_the_byte():
    ledger = Ledger()
    ledger.add(Tier.DEVICE, Payload.WEIGHT, 100)
    ledger.add(Tier.DEVICE, Payload.GRADIENT, 50)
    ledger.add(Tier.DEVICE, Payload.GRADIENT, -50)
    assert ledger.report() == {
        "device": {
            "weight": {"bytes": 100, "peak_bytes": 100},
            "gradient": {"bytes": 0, "peak_bytes": 50},
            "total": {"bytes": 100, "peak_bytes": 150},
        }
    }
    with pytest.raises(RuntimeError, match="1 bytes more of gradient freed than stored on device"):
        ledger.add(Tier.DEVICE, Payload.GRADIENT, -1)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's list of mappings")
def test_a_slab_asks_for_huge_pages():
    slab = HostSlab(8 << 20, torch.device("cpu"))
    address = slab.take(1, torch.uint8).data_ptr()
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert "hg" in flags.split()


def test_a_host_slab_is_exact():
    slab = HostSlab(256, torch.device("cpu"))
    first, second = slab.take(32, torch.float32), slab.take(64, torch.int16)
    assert first.data_ptr() + 128 == second.data_ptr()
    assert not first.any() and not second.any()
    first.fill_(1)
    assert not second.any()
    with pytest.raises(OutOfBudgetError, match="256"):
        slab.take(1, torch.uint8)
    storage = Storage(torch.device("cpu"), Ledger())
    with pytest.raises(RuntimeError, match="host"):
        storage.zeros(Tier.HOST, Payload.WEIGHT, 1, torch.float32)


def test_buffers_are_handed_round_by_size_and_dtype():
    ledger = Ledger()
    pool = BufferPool(Storage(torch.device("cpu"), ledger), Payload.GRADIENT)
    buffer = pool.take(10, torch.float32)
    assert (buffer.shape, ledger.tier_bytes(Tier.DEVICE)) == ((10,), 40)
    pool.give_back(buffer)
    assert ledger.tier_bytes(Tier.DEVICE) == 0
    assert pool.take(10, torch.bfloat16).dtype is torch.bfloat16
    assert pool.take(11, torch.float32).shape == (11,)
    assert pool.take(10, torch.float32) is buffer
    assert pool.take(10, torch.float32) is not buffer


def test_a_frozen_model_is_offloaded_without_optimizer_memory():
    rows = batches(1)[0]
    with torch.no_grad():
        expected = llama()(rows).logits
    model, optimizer = engine.initialize(llama().requires_grad_(False), None, placement="host")
    assert optimizer is None
    assert torch.equal(model(rows).logits, expected)
    assert engine.memory_report(model)["host"].keys() == {"weight", "total"}
    partly = llama()
    partly.model.requires_grad_(False)
    partly, _ = engine.initialize(partly, adamw(partly))
    assert engine.memory_report(partly)["device"]["exp_avg"]["bytes"] == 4 * partly.lm_head.weight.numel() + 4 * 32


def test_page_locked_memory_stays_so_for_as_long_as_anything_of_it_is_used(monkeypatch):
    locked = set()

    class Cudart:
        def cudaHostRegister(self, pointer, nbytes, flags):
            locked.add(pointer)
            return 0

        def cudaHostUnregister(self, pointer):
            locked.remove(pointer)

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    taken = HostSlab(4096, torch.device("cuda")).take(1024, torch.float32)
    assert locked == {taken.data_ptr()}
    del taken
    assert not locked
