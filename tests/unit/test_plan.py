"""`plan` against the run: the same peaks on every tier, the same bytes moved; and the simulated clocks."""

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, fit, initialized
from launch import run_ranks
from megalith.engine import Rates, Tier, Work, budgets, shard
from megalith.engine.rehearsal import Clocks, SimulatedLane, SimulatedStore
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Ledger
from test_nvme_placement import smallest_ring
from tiny import batches, make_model

STEPS = 3


def llama(checkpointing=False):
    model = make_model("llama", num_hidden_layers=4)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def language_loss(model, step):
    rows = batches(STEPS)[step]
    return model(input_ids=rows, labels=rows).loss


def loss_on_meta(model):
    rows = torch.empty(batches(1)[0].shape, dtype=torch.long, device="meta")
    return model(input_ids=rows, labels=rows).loss


def assert_same_memory(planned, ran):
    """Peaks of every tier and payload within 5 %."""
    assert planned.keys() == ran.keys()
    for tier, payloads in ran.items():
        assert planned[tier].keys() == payloads.keys(), tier
        for payload, sizes in payloads.items():
            assert planned[tier][payload]["peak_bytes"] == pytest.approx(sizes["peak_bytes"], rel=0.05), (tier, payload)


def work_of(model):
    """So far, with the updates that the last step has published."""
    for chunk in engine_of(model).chunks:
        chunk.settle()
    return engine_of(model).ledger.work.copy()


COMMON = {"max_chunk_numel": 100, "max_grad_norm": 1.0}
CONFIGURATIONS = [
    {},
    {"zero_stage": 2, "precision": "fp16"},
    {"placement": "host"},
    {"placement": "host", "precision": "bf16", "checkpointing": True},
    {"placement": "host", "zero_stage": 2, "precision": "bf16"},
    {"placement": "host", "device_budget": 200_000, "prefetch": 1},  # holds some, evicts some
    {"placement": "host", "precision": "bf16", "state_precision": "8bit"},
    {"placement": "host", "param_offload": 0.5, "optimizer_offload": 0.3},
    {"placement": "nvme", "precision": "bf16"},
    {"placement": "nvme", "host_budget": 1_200_000},
    {"placement": "auto", "device_budget": 400_000, "precision": "fp16", "checkpointing": True},
]


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_peaks_and_traffic_are_those_of_the_run(options, tmp_path, monkeypatch):
    for module in (budgets, shard):
        monkeypatch.setattr(module, "STORE_RING_BYTES", 2**16)
    options = COMMON | options
    checkpointing = options.pop("checkpointing", False)
    if options.get("placement") == "nvme":
        options |= {"nvme_dir": str(tmp_path), "nvme_ring": smallest_ring(options.get("precision", "fp32"))}
    planned = engine.plan(llama(checkpointing), step=loss_on_meta, **options).forecast
    model, optimizer = initialized(lambda: llama(checkpointing), **options)
    fit(model, optimizer, language_loss, STEPS - 1)
    before = work_of(model)
    fit(model, optimizer, language_loss, [STEPS - 1])
    assert_same_memory(planned.memory, engine.memory_report(model))
    moved = work_of(model) - before
    for work in (Work.LINK_OUT, Work.DEVICE_ADAM, Work.HOST_ADAM):
        assert planned.work.get(work, 0) == pytest.approx(moved[work], rel=0.05), work


def two_ranks(options):
    model, optimizer = initialized(llama, **options)
    fit(model, optimizer, language_loss, STEPS)
    return engine.memory_report(model)


def test_peaks_are_those_of_two_ranks():
    variants = [{"placement": "host", "precision": "bf16"}, {"zero_stage": 1}, {}]
    reports = run_ranks(2, several, [COMMON | options for options in variants])
    for options, report in zip(variants, reports[0], strict=True):
        planned = engine.plan(llama(), world_size=2, step=loss_on_meta, **COMMON, **options).forecast
        assert_same_memory(planned.memory, report)


def several(rank, world_size, variants):
    return [two_ranks(options) for options in variants]


RATES = Rates(
    compute_flops=1e9,
    memory_bytes=1e9,
    call_s=0.0,
    host_adam_numel=1e6,
    device_adam_numel=1e7,
    link_in_bytes=1e8,
    link_out_bytes=1e8,
)


def test_a_lane_overlaps_until_somebody_waits():
    clocks, ledger = Clocks(), Ledger()
    lane, store = SimulatedLane("copies", clocks), SimulatedStore(clocks, ledger)
    clocks.spend(1.0)
    first = lane.submit(lambda: clocks.spend(2.0), "first")
    second = lane.submit(lambda: (first.wait(), clocks.spend(3.0)), "second")
    clocks.spend(1.0)
    assert (clocks.now["compute"], first.when, second.when) == (2.0, 3.0, 6.0)
    assert not second.done()
    second.wait()
    first.wait()
    assert clocks.now["compute"] == 6.0 and second.done()
    assert clocks.busy == {"compute": 2.0, "copies": 5.0}
    store.read("a", torch.empty(10))
    assert ledger.work[Work.DISK_READ] == 40


def test_streaming_hides_behind_enough_compute_and_binds_otherwise():
    def planned(**changes):
        plan = engine.plan(
            llama(), step=loss_on_meta, rates=Rates(**(vars(RATES) | changes)), placement="host", on_gpu=True, **COMMON
        )
        return plan.forecast, plan.forecast.bound, str(plan)

    hidden, bound, text = planned(host_adam_numel=1e12, link_in_bytes=1e12, link_out_bytes=1e12)
    assert bound == "compute" and hidden.step_s == pytest.approx(hidden.busy_s["compute"], rel=0.01)
    assert "bound by compute" in text and "link out" in text
    exposed, bound, _ = planned(link_in_bytes=1e5)
    weights = sum(parameter.nbytes for parameter in llama().parameters())
    assert bound == "copies" and exposed.step_s > weights / 1e5


def test_attention_and_functions_have_rates_of_their_own():
    def step_s(**changes):
        rates = Rates(**(vars(RATES) | changes))
        return engine.plan(llama(), step=loss_on_meta, rates=rates, **COMMON).forecast.step_s

    fast = step_s(attention_flops=1e15, function_bytes=1e15)
    assert step_s(attention_flops=1e6, function_bytes=1e15) > 2 * fast
    assert step_s(attention_flops=1e15, function_bytes=1e6) > 2 * fast
    assert step_s() == step_s(attention_flops=RATES.compute_flops, function_bytes=RATES.memory_bytes)


def test_175b_on_32_gpus_is_planned_without_memory():
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=50257, n_embd=12288, n_layer=2, n_head=96, n_positions=2048)
        )
    options = {"precision": "bf16", "placement": "host", "world_size": 32, "on_gpu": True}
    ids = torch.empty(1, 2048, dtype=torch.long, device="meta")
    plan = engine.plan(model, step=lambda m: m(input_ids=ids, labels=ids).loss, **options)
    block = 12 * 12288**2
    assert plan.forecast.work[Work.HOST_ADAM] == pytest.approx((2 * block + 52_305 * 12288) / 32, rel=0.01)
    assert plan.problems({Tier.DEVICE: 80 * 10**9}) == []
    [problem] = plan.problems({Tier.DEVICE: 10**9})
    assert "activations" in problem


def test_the_model_is_only_read_and_bad_input_is_told():
    model = llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model)
    plan = engine.plan(model, optimizer, step=loss_on_meta, placement="host", **COMMON)
    assert plan.forecast.step_s is None and plan.forecast.activation_peak_bytes > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    engine.initialize(model, optimizer, placement="host")  # nothing of the rehearsal is left on it
    assert engine.plan(llama(), rates=RATES).forecast is None
    with pytest.raises(ValueError, match="collective_bytes"):
        engine.plan(llama(), world_size=2, step=loss_on_meta, rates=RATES, **COMMON)
    with pytest.raises(engine.OutOfBudgetError, match="host_budget"):
        engine.plan(llama(), step=loss_on_meta, placement="host", host_budget=1000)
    with pytest.raises(RuntimeError, match="cannot be rehearsed without data"):
        engine.plan(llama(), step=lambda model: loss_on_meta(model) * loss_on_meta(model).item())


def test_checkpointing_saves_activations():
    def activations(checkpointing):
        return engine.plan(llama(checkpointing), step=loss_on_meta, **COMMON).forecast.activation_peak_bytes

    assert activations(True) < 0.75 * activations(False)
