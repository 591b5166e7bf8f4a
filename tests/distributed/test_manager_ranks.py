"""Two engines under one manager at two ranks, in turn as in PPO: weights of each are evicted for the other, and delays
that differ from rank to rank neither hang nor change a bit."""

import random
import time

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.engine.lanes import random_delay
from megalith.engine.tiers import Work
from tiny import batches, make_model, rank_rows, weights_of

SEEDS = 6
SHARES = (0.5, 0.75)
"""Of the way from a device that frees every block after its use to one that keeps all of both models."""


def _train(rank, world_size, placement, budget, seed):
    """(weights, losses, bytes on the device at most, bytes gathered) of two models that are trained in turn,
    the first towards what the second says."""
    manager = engine.Manager(device_budget=budget, host_budget="1GB")
    # One rank is slow, so that what its lanes have under way has long ended on the other.
    delay = random_delay(seed, 0.004) if seed is not None and rank == seed % world_size else None
    compute_delay = random.Random(-1 - (seed or 0) * world_size - rank)
    options = {"max_chunk_numel": 2000, "placement": placement, "precision": "bf16", "timeout_s": 30, "prefetch": 2}
    models, optimizers = [], []
    for number in range(2):
        model = make_model("llama", seed=number, num_hidden_layers=4)
        if seed is not None:
            for layer in model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda *_: time.sleep(compute_delay.random() * 0.0005))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = engine.initialize(
            model, optimizer, manager=manager, max_grad_norm=0.5, lane_delay=delay, **options
        )
        models.append(model)
        optimizers.append(optimizer)
    losses = []
    for turn, rows in enumerate(batches(4, rows=2, length=5)):
        mine = rank_rows(rows, rank, world_size)
        with torch.no_grad():
            target = models[1](mine).logits.float()
        # In an order that changes: what was fetched for the other is evicted while its update may be under way.
        for number in (0, 1) if turn % 2 else (1, 0):
            model, optimizer = models[number], optimizers[number]
            output = model(input_ids=mine, labels=mine)
            loss = output.loss + (output.logits.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    peak = manager.ledger.report()["device"]["total"]["peak_bytes"]
    moved = manager.ledger.work[Work.COLLECTIVE]
    assert budget is None or peak <= budget
    weights = []
    for model in models:
        with engine.gathered(model):
            weights.append(weights_of(model))
    return weights, losses, peak, moved


def _train_all(rank, world_size):
    """What every variant differs in from the one without a budget, and what each has gathered."""
    differences, moved = [], {}
    for placement in ("device", "host"):
        expected, losses, least, _ = _train(rank, world_size, placement, None, None)
        *_, most, moved[placement, "all kept"] = _train(rank, world_size, placement, 10**9, None)
        for seed in (None, *range(SEEDS // 2)):
            share = SHARES[(seed or 0) % len(SHARES)]
            budget = int(least + share * (most - least))
            ours, our_losses, _, moved[placement, seed] = _train(rank, world_size, placement, budget, seed)
            for one, other in zip(ours, expected, strict=True):
                different = [name for name in one if not torch.equal(one[name], other[name])]
                if different or our_losses != losses:
                    differences.append((placement, share, seed, different))
    return differences, moved


def test_budgets_and_delays_of_two_engines_change_no_bit():
    for differences, moved in run_ranks(2, _train_all, timeout_s=90):
        assert differences == []
        for (placement, seed), nbytes in moved.items():
            if seed != "all kept":
                assert nbytes > moved[placement, "all kept"], "something was evicted, and gathered again"
