"""Random delays on every lane and in the forward pass look for a missing wait: no bit of the result may change."""

import hashlib
import random
import time
from itertools import product

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.engine import streaming_sizes
from megalith.engine.lanes import random_delay
from tiny import batches, make_model, rank_rows, weights_of
from update_rates import MIXED

SEEDS = 30
OPTIONS = [
    {"zero_stage": stage, "placement": placement, "prefetch": prefetch}
    for stage, placement, prefetch in product((1, 2, 3), ("device", "host"), (0, 1, 2))
]
OPTIONS += [OPTIONS[-1] | {"rates": MIXED}, OPTIONS[3] | {"rates": MIXED}]  # the device does a part of the updates


def _digest(tensors):
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _train(rank, world_size, options, seed):
    """The digest of the weights after steps of one and two micro-batches; `seed` None is without delays."""
    # Three blocks, the first and last sharing a tied weight, so that a prefetched group waits while others are freed.
    model = make_model("llama_tied", num_hidden_layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    delay = None
    if seed is not None:
        delay = random_delay(seed * world_size + rank, 0.002)
        compute_delay = random.Random(-1 - seed * world_size - rank)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: time.sleep(compute_delay.random() * 0.001))
    model, optimizer = engine.initialize(
        model, optimizer, max_grad_norm=0.5, max_chunk_numel=4000, lane_delay=delay, **options
    )
    rows = iter(batches(4, rows=2, length=5))
    for micro_steps in (1, 2, 1):
        for _ in range(micro_steps):
            mine = rank_rows(next(rows), rank, world_size)
            (model(input_ids=mine, labels=mine).loss / micro_steps).backward()
        optimizer.step()
    with engine.gathered(model):
        digest = _digest(weights_of(model))
    return digest


def _train_all(rank, world_size, jobs):
    streaming_sizes.PIECE_MULTIPLE, streaming_sizes.DEVICE_PIECE_NUMEL = 256, 512
    return [_train(rank, world_size, options, seed) for options, seed in jobs]


def test_delays_on_every_lane_change_no_bit():
    undelayed = [(options, None) for options in OPTIONS]
    delayed = [(OPTIONS[seed % len(OPTIONS)], seed) for seed in range(SEEDS)]
    first, second = run_ranks(2, _train_all, undelayed + delayed)
    assert first == second
    expected = dict(zip(map(str, OPTIONS), first, strict=False))
    for (options, seed), digest in zip(delayed, first[len(undelayed) :], strict=True):
        assert digest == expected[str(options)], (options, seed)
    for stage in (1, 2, 3):  # nor do placement and prefetch
        assert len({expected[str(options)] for options in OPTIONS if options["zero_stage"] == stage}) == 1, stage
