"""The engine on CUDA: streams, page-locked slabs, the Triton kernels. One GPU is enough."""

import megalith.engine as engine
import pytest
import torch
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
    assert peaks[3:] == peaks[3:4] * len(peaks[3:])
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
        assert peaks[-1] == peaks[-2]
        with engine.gathered(model):
            return [parameter.clone() for parameter in model.parameters()], peaks[-1]

    kept, kept_peak = train_one()
    for options in ({}, {"placement": "host"}, {"placement": "host", "prefetch": 3}):
        offloaded, peak = train_one(offload_activations=True, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(offloaded, kept, strict=True)), options
        if not options:
            saved = (24 - 4) * 8 * 512 * 256 * 2
            assert kept_peak - peak > 0.9 * saved
