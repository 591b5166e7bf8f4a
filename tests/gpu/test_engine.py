"""The engine on CUDA: streams, page-locked slabs, the Triton kernels. One GPU is enough."""

import gc

import megalith.engine as engine
import pytest
import torch
from megalith.engine import machine
from megalith.engine.shard import engine_of
from tiny import make_model, update_error
from training import Recipe, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

RECIPES = {
    "plain": Recipe(),
    "accumulation": Recipe(family="gpt2", accumulation=3),
    "checkpoint": Recipe(reentrant_checkpoint=False),
    "reentrant checkpoint": Recipe(reentrant_checkpoint=True),
    "generate": Recipe(family="llama_tied", generates=True),
    "experts": Recipe(family="mixtral"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_device_and_host_placement_match_plain_pytorch(name):
    recipe = RECIPES[name]
    expected = train(recipe, device="cuda")
    outcomes = [
        train(recipe, device="cuda", options={"placement": placement, "prefetch": prefetch, "max_chunk_numel": 5000})
        for placement, prefetch in (("device", 1), ("host", 0), ("host", 2))
    ]
    for ours in outcomes:
        assert update_error(ours.initial, ours.final, expected.final) < 1e-5
        assert ours.generated == expected.generated
        assert all(torch.equal(ours.final[fqn], outcomes[0].final[fqn]) for fqn in ours.final)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_placements_agree_to_the_bit_in_every_precision(precision):
    outcomes = [
        train(Recipe(), device="cuda", options={"precision": precision, **placement})
        for placement in (
            {"placement": "device"},
            {"placement": "host"},
            {"placement": "host", "param_offload": 0.5, "optimizer_offload": 0.5},
        )
    ]
    for ours in outcomes[1:]:
        assert all(torch.equal(ours.final[fqn], outcomes[0].final[fqn]) for fqn in ours.final)


def test_host_placement_keeps_device_memory_to_what_the_plan_says_and_flat():
    recipe = Recipe()
    torch.cuda.empty_cache()
    with torch.device("meta"):
        model = make_model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"placement": "host", "precision": "bf16", "rates": engine.measure_rates("cuda", "bf16", trial_s=0.05)}
    plan = engine.plan(model, optimizer, **options)
    before = torch.cuda.memory_allocated()
    model, optimizer = engine.initialize(model, optimizer, **options)
    rows = torch.randint(0, 97, (2, 16), device="cuda")
    peaks = []
    for _ in range(recipe.steps + 3):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[3:] == pytest.approx(peaks[3:4] * len(peaks[3:]), rel=1e-4)  # small tensors of lanes come and go
    report = engine.memory_report(model)
    for tier, nbytes in plan.peak_bytes.items():
        assert report[tier.value]["total"]["peak_bytes"] == pytest.approx(nbytes, rel=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_offloaded_activations_change_no_bit_and_lower_the_peak(reentrant):
    rows = torch.randint(0, 97, (8, 512), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def train_one(**options):
        model = make_model("llama", hidden_size=256, num_hidden_layers=24, max_position_embeddings=512)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        model, optimizer = engine.initialize(model, optimizer, precision="bf16", max_grad_norm=1.0, **options)
        peaks = []
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(input_ids=rows, labels=rows).loss.backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            optimizer.step()
            optimizer.zero_grad()
        assert peaks[-1] == pytest.approx(peaks[-2], rel=1e-4)
        with engine.gathered(model):
            return [parameter.clone() for parameter in model.parameters()], peaks[-1]

    kept, _ = train_one()
    _, kept_peak = train_one(placement="host")  # where gradients leave too, and the peak is that of the inputs
    for options in ({}, {"placement": "host"}, {"placement": "host", "prefetch": 3}):
        offloaded, peak = train_one(offload_activations=True, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(offloaded, kept, strict=True)), options
        if options == {"placement": "host"}:
            saved = (24 - 4) * 8 * 512 * 256 * 2
            assert kept_peak - peak > 0.9 * saved


def train_auto(precision, **options):
    """The model, its final weights, the peak of each step, and the most that the engine stored in them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = make_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    options = {"precision": precision, "max_grad_norm": 1.0, "max_chunk_numel": 200_000} | options
    model, optimizer = engine.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), **options)
    rows = torch.randint(0, 97, (4, 32), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    peaks = []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    stored = engine.memory_report(model)["device"]["total"]["peak_bytes"]
    with engine.gathered(model):
        return model, [parameter.clone() for parameter in model.parameters()], peaks, stored


@pytest.mark.parametrize("on_drive", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_spare_memory_takes_optimizer_shards_within_the_budget_and_changes_no_bit(precision, on_drive, tmp_path):
    _, expected, _, whole = train_auto(precision)
    options = {"nvme_dir": str(tmp_path), "nvme_ring": "12MB", "host_budget": "140MB"} if on_drive else {}
    promoted = 0
    for share in (0.5, 0.7, 0.9):
        budget = int(whole * share)
        model, weights, peaks, stored = train_auto(precision, placement="auto", device_budget=budget, **options)
        promoted += engine_of(model).migration.promotion.chunks
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, expected, strict=True))
        assert stored <= budget
        assert peaks[4:] == pytest.approx(peaks[3:-1], rel=0.01)
    assert promoted > 0


def test_without_a_budget_the_card_is_used_up_to_what_activations_and_the_margin_leave(monkeypatch):
    gc.collect()  # engines of earlier tests
    needed = -torch.cuda.memory_allocated()
    _, expected, peaks, _ = train_auto("bf16")
    needed += max(peaks)
    promoted = 0
    for part in (0.7, 0.8, 0.9, 2.0):
        gc.collect()
        room = torch.cuda.memory_allocated() + int(needed * part)
        monkeypatch.setattr(machine.GpuMeter, "room_bytes", lambda self, room=room: room)
        model, weights, ours, _ = train_auto("bf16", placement="auto")
        promoted += engine_of(model).migration.promotion.chunks if part < 1 else 0
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, expected, strict=True))
        assert max(ours[2:]) <= room
    assert promoted > 0
