"""8-bit states at two ranks: placement changes no bit of any stage, and checkpoints go between world sizes."""

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.engine.checkpoint import read_checkpoint
from test_offload_ranks import _train
from tiny import make_model, update_error, weights_of

JOBS = [{"zero_stage": stage, "placement": placement} for stage in (0, 1, 2, 3) for placement in ("device", "host")]
OPTIONS = {"state_precision": "8bit"}


def _make(**options):
    model = make_model("gpt2", n_layer=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    return engine.initialize(model, optimizer, timeout_s=30, **OPTIONS, **options)


def _saved(folder):
    """Masters and moments in a checkpoint, whole."""
    checkpoint = read_checkpoint(folder)
    result = {}
    for fqn, shape in checkpoint.shapes.items():
        for payload in ("master", "exp_avg", "exp_avg_sq"):
            values = torch.empty(torch.Size(shape).numel())
            checkpoint.fill(payload, fqn, 0, values)
            result[payload, fqn] = values
    return result


def _at_two_ranks(rank, world_size, folder):
    trained = [_train(rank, world_size, OPTIONS | options)[:2] for options in JOBS]
    model, optimizer = _make(zero_stage=3)
    engine.load_checkpoint(folder / "one", model, optimizer)
    engine.save_checkpoint(folder / "two", model, optimizer)
    return trained


def test_stages_and_placements_agree_and_checkpoints_go_between_world_sizes(tmp_path):
    model, optimizer = _make(zero_stage=0)
    rows = torch.arange(24).view(2, 12)
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.save_checkpoint(tmp_path / "one", model, optimizer)

    first, second = run_ranks(2, _at_two_ranks, tmp_path)
    initial, stage_0 = weights_of(make_model("gpt2", n_layer=3)), first[0][0]
    for options, (weights, norms), (theirs, _) in zip(JOBS, first, second, strict=True):
        if options["placement"] == "device":
            expected, expected_norms = weights, norms
        assert norms == expected_norms, options
        for name in weights:
            assert torch.equal(weights[name], expected[name]) and torch.equal(weights[name], theirs[name]), name
        assert update_error(initial, weights, stage_0) < 0.05, options

    one, two = _saved(tmp_path / "one"), _saved(tmp_path / "two")
    assert any(values.any() for values in one.values())
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
