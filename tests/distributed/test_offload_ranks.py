"""Host placement at two ranks, whole and in fractions, updated by the host or by the device: the bits of device
placement."""

from dataclasses import replace

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.engine import streaming_sizes
from tiny import batches, make_model, rank_rows, weights_of
from update_rates import MIXED

FRACTIONS = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (1.0, 1.0), (0.25, 0.75)]


def _train(rank, world_size, options):
    if "rates" in options and rank == 1:  # of which those of the slowest count
        options = options | {"rates": replace(options["rates"], host_adam_numel=1e10)}
    model = make_model("gpt2", n_layer=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    model, optimizer = engine.initialize(model, optimizer, max_grad_norm=0.5, timeout_s=30, **options)
    rows = iter(batches(6, rows=4, length=6))
    norms = []
    for micro_steps in (1, 2, 3):
        for _ in range(micro_steps):
            mine = rank_rows(next(rows), rank, world_size)
            optimizer.backward(model(input_ids=mine, labels=mine).loss / micro_steps)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    with engine.gathered(model):
        return weights_of(model), norms, engine.memory_report(model)


def _jobs():
    for precision, fractions in (("fp32", FRACTIONS), ("bf16", FRACTIONS), ("fp16", FRACTIONS[1:2])):
        for stage in (0, 1, 2, 3):
            base = {"precision": precision, "zero_stage": stage}
            yield base
            for weights, state in fractions:
                if stage == 3:
                    yield base | {"placement": "host", "param_offload": weights, "optimizer_offload": state}
                elif weights == 0.5:
                    yield base | {"placement": "host", "optimizer_offload": state}
            if stage > 1:
                for host_adam_numel in (1.0, 1e9):  # the device updates all, or some
                    rates = replace(MIXED, host_adam_numel=host_adam_numel)
                    yield base | {"placement": "host", "optimizer_offload": 1.0, "rates": rates}


def _train_all(rank, world_size):
    streaming_sizes.PIECE_MULTIPLE, streaming_sizes.DEVICE_PIECE_NUMEL = 256, 512  # several pieces a chunk
    return [_train(rank, world_size, options) for options in _jobs()]


def test_offloading_any_fraction_changes_no_bit():
    first, second = run_ranks(2, _train_all)
    for options, (weights, norms, report), theirs in zip(_jobs(), first, second, strict=True):
        if "placement" not in options:
            expected = weights, norms
            continue
        assert norms == expected[1] == theirs[1], options
        for name in weights:
            assert torch.equal(weights[name], expected[0][name]), (options, name)
            assert torch.equal(weights[name], theirs[0][name]), (options, name)
        host = {payload: entry["bytes"] for payload, entry in report.get("host", {}).items()}
        default = 1.0 if options["zero_stage"] == 3 else 0.0
        assert ("weight" in host) == (options.get("param_offload", default) > 0), options
        assert ("staging" in report["device"]) == ("rates" in options), options
        assert ("exp_avg" in host) == (options["optimizer_offload"] > 0), options
