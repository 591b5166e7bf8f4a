"""Adam of what lies on the host, done by the GPU: copies and kernels on streams of their own, and the choice by what is
measured here."""

import statistics
import time

import megalith.engine as engine
import pytest
import torch
from megalith.engine import EngineConfig, Tier, Work, streaming_sizes
from megalith.engine.collectives import RankGroup
from megalith.engine.rates import agreed_update_rates
from megalith.engine.shard import engine_of
from torch import nn
from training import Recipe, train
from update_rates import ALL_DEVICE, ALL_HOST, MIXED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(streaming_sizes, "PIECE_MULTIPLE", 256)
    monkeypatch.setattr(streaming_sizes, "DEVICE_PIECE_NUMEL", 512)
    monkeypatch.setattr(streaming_sizes, "HOST_PIECE_NUMEL", 768)


KINDS = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"precision": "bf16", "state_precision": "8bit"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_who_updates_a_chunk(kind, small_pieces):
    recipe = Recipe(family="gpt2", accumulation=2)
    expected = train(recipe, device="cuda", options={"placement": "device", **kind})
    for speeds in (ALL_HOST, ALL_DEVICE, MIXED):
        for more in ({}, {"param_offload": 0.0}, {"zero_stage": 2, "prefetch": 2}):
            options = {"placement": "host", "max_chunk_numel": 3000, "rates": speeds, **kind, **more}
            ours = train(recipe, device="cuda", options=options)
            differing = [name for name in ours.final if not torch.equal(ours.final[name], expected.final[name])]
            assert differing == [], (speeds, more)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]])
def test_no_bit_depends_on_it_in_the_backward_pass(kind, small_pieces):
    recipe = Recipe(max_grad_norm=None)
    expected = train(recipe, device="cuda", options={"placement": "device", **kind})
    for speeds in (ALL_HOST, ALL_DEVICE, MIXED):
        options = {"placement": "host", "max_chunk_numel": 3000, "update_in_backward": True, "rates": speeds, **kind}
        ours = train(recipe, device="cuda", options=options)
        assert all(torch.equal(ours.final[name], expected.final[name]) for name in ours.final), speeds


class Stack(nn.Module):
    """134 million parameters in eight blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(8))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values).relu()
        return values.square().mean()


def update_seconds(**options):
    """Of the step's updates alone, the median of five; and the share of parameters that the GPU updates."""
    with torch.device("meta"):
        model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = engine.initialize(model, optimizer, placement="host", precision="bf16", **options)
    chunks, values, seconds = engine_of(model).chunks, torch.randn(64, 4096, device="cuda"), []
    for _ in range(7):
        model(values).backward()
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        for chunk in chunks:
            chunk.settle()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
    work = engine_of(model).ledger.work
    share = work[Work.DEVICE_ADAM] / (work[Work.DEVICE_ADAM] + work[Work.HOST_ADAM])
    return statistics.median(seconds[2:]), share


def test_what_is_measured_here_chooses_no_worse_than_either_alone():
    config = EngineConfig(placement="host", precision="bf16")
    measured = agreed_update_rates(None, torch.device("cuda"), config, RankGroup(0, 1, None, None))
    assert measured.have_device and not measured.host_computes
    print(f"\n{measured}")
    by_host, share_of_host = update_seconds(rates=ALL_HOST)
    by_device, share_of_device = update_seconds(rates=ALL_DEVICE)
    chosen, share = update_seconds()
    print(f"host {by_host:.4f} s, device {by_device:.4f} s, chosen {chosen:.4f} s ({share:.0%} of it by the device)")
    assert (share_of_host, share_of_device) == (0.0, 1.0)
    assert chosen <= 1.25 * min(by_host, by_device)


def test_memory_is_what_the_plan_says_with_the_ring_and_flat():
    measured = engine.measure_rates("cuda", "bf16", trial_s=0.05)
    with torch.device("meta"):
        model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    options = {"placement": "host", "precision": "bf16", "rates": measured}
    plan = engine.plan(model, optimizer, **options)
    assert sum(plan.updaters.values()) == len(plan.chunks)
    before = torch.cuda.memory_allocated()
    model, optimizer = engine.initialize(model, optimizer, **options)
    values, peaks = torch.randn(64, 4096, device="cuda"), []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        model(values).backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[3:] == pytest.approx(peaks[3:4] * 3, rel=1e-4)
    report = engine.memory_report(model)
    for tier, nbytes in plan.peak_bytes.items():  # without a step, bounds
        assert 0.8 * nbytes < report[tier.value]["total"]["peak_bytes"] <= 1.05 * nbytes
    assert Tier.DEVICE in plan.bytes_at_rest
