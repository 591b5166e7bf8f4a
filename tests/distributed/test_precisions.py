"""Every precision at two ranks: stages agree, clipping is exact, a gradient that is not finite skips the step."""

import itertools
import math

import megalith.engine as engine
import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from safetensors.torch import load_file
from tiny import batches, make_model, rank_rows, update_error, weights_of

PRECISIONS = ("fp32", "bf16", "fp16")
STAGES = (0, 1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _start(limit=None, **options):
    model = make_model("llama_tied")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    scale = {"loss_scale": 256.0} if options["precision"] == "fp16" else {}
    return engine.initialize(model, optimizer, max_grad_norm=limit, timeout_s=30, **scale, **options)


def _loss(model, step, rank, world_size):
    rows = rank_rows(batches(1, rows=4, length=6, seed=step)[0], rank, world_size)
    return model(input_ids=rows, labels=rows).loss


def _weights(model):
    with engine.gathered(model):
        return weights_of(model)


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# Agreement of stages and placements


def _train(rank, world_size, precision, options):
    """Final weights and norms of steps with one, two and three micro-batches."""
    model, optimizer = _start(limit=0.5, precision=precision, **options)
    norms = []
    for step, micro_steps in enumerate((1, 1, 2, 3, 1)):
        for micro_step in range(micro_steps):
            optimizer.backward(_loss(model, 10 * step + micro_step, rank, world_size) / micro_steps)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return _weights(model), norms


LAYOUTS = [{"zero_stage": stage, "placement": placement} for stage in STAGES for placement in ("device", "host")]


def _train_all(rank, world_size):
    jobs = list(itertools.product(PRECISIONS, LAYOUTS))
    return [(*job, *_train(rank, world_size, *job)) for job in jobs]


def test_stages_and_placements_agree_in_every_precision():
    first, second = run_ranks(2, _train_all)
    initial = weights_of(make_model("llama_tied"))
    by_layout = {}
    for (precision, layout, weights, norms), theirs in zip(first, second, strict=True):
        assert _same(weights, theirs[2]) and norms == theirs[3], (precision, layout)
        by_layout[precision, layout["zero_stage"], layout["placement"]] = weights, norms
    for precision, tolerance in zip(PRECISIONS, (1e-6, 2e-2, 2e-3), strict=True):
        stages = [by_layout[precision, stage, "device"] for stage in STAGES]
        for stage in STAGES:
            assert _same(stages[stage][0], by_layout[precision, stage, "host"][0]), (precision, stage)
            assert stages[stage][1] == pytest.approx(by_layout["fp32", 0, "device"][1], rel=2e-2), (precision, stage)
        # Below stage 2 micro-batches are added before they are reduced over the ranks, from stage 2 on after it: in 16
        # bits that rounds elsewhere. Nothing else tells stages apart.
        assert _same(stages[0][0], stages[1][0]) and _same(stages[2][0], stages[3][0]), precision
        assert update_error(initial, stages[1][0], stages[2][0]) < tolerance, precision


# Clipping


def _first_moment_norm(folder):
    """Global 2-norm of exp_avg, read from the files of a checkpoint."""
    total = 0.0
    for path in folder.glob("*.safetensors"):
        parts = [part for name, part in load_file(path).items() if name.startswith("exp_avg/")]
        total += sum(float(part.double().square().sum()) for part in parts)
    return math.sqrt(total)


def _clip_all(rank, world_size, folder):
    results = []
    for precision in PRECISIONS:
        # Plain PyTorch with the same 16-bit weights: the mean of the ranks' gradients.
        model = make_model("llama_tied").to(DTYPES[precision])
        _loss(model, 0, rank, world_size).backward()
        gradients = [parameter.grad.float() for parameter in model.parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= world_size
        norm = float(torch.nn.utils.get_total_norm(gradients))
        for stage, placement in itertools.product(STAGES, ("device", "host")):
            for limit in (0.7 * norm, 1.5 * norm, None):
                model, optimizer = _start(limit, precision=precision, zero_stage=stage, placement=placement)
                optimizer.backward(_loss(model, 0, rank, world_size))
                optimizer.step()
                place = folder / f"{precision}-{stage}-{placement}-{limit}"
                engine.save_checkpoint(place, model, optimizer)
                used = _first_moment_norm(place) / 0.1  # exp_avg = (1 - beta1) * the clipped gradient
                results.append((precision, stage, placement, limit, norm, optimizer.grad_norm, used))
    return results


def test_clipping_is_by_the_global_norm_of_the_unscaled_mean_gradient(tmp_path):
    first, second = run_ranks(2, _clip_all, tmp_path)
    assert first == second
    for precision, stage, placement, limit, expected, norm, used in first:
        case = (precision, stage, placement, limit)
        assert norm == pytest.approx(expected, rel={"fp32": 1e-6, "bf16": 5e-3, "fp16": 1e-3}[precision]), case
        clipped = norm if limit is None else min(norm, limit)
        assert used == pytest.approx(clipped, rel=1e-5), case


# Gradients that are not finite


def _skip_all(rank, world_size):
    results = []
    for precision, stage, placement in itertools.product(PRECISIONS, STAGES, ("device", "host")):
        model, optimizer = _start(0.5, precision=precision, zero_stage=stage, placement=placement)
        skips = []
        for step, spoilt_rank, factor in [(0, None, 1.0), (1, 1, math.nan), (2, 0, math.inf), (3, None, 1.0)]:
            before, counts = _weights(model), dict(optimizer.steps_taken)
            loss = _loss(model, step, rank, world_size)
            optimizer.backward(loss * factor if rank == spoilt_rank else loss)
            optimizer.step()
            moved = not _same(_weights(model), before)
            counted = all(optimizer.steps_taken[name] == counts[name] + 1 for name in counts)
            assert counted or optimizer.steps_taken == counts
            scale = None if optimizer.scaler is None else optimizer.scaler.scale
            skips.append((moved, counted, optimizer.skipped_steps, math.isfinite(optimizer.grad_norm), scale))
        # The two steps that were skipped left nothing behind: without them the bits are the same.
        control, control_optimizer = _start(0.5, precision=precision, zero_stage=stage, placement=placement)
        for step, scale in ((0, 256.0), (3, 64.0)):
            if control_optimizer.scaler is not None:
                control_optimizer.scaler.scale = scale
            control_optimizer.backward(_loss(control, step, rank, world_size))
            control_optimizer.step()
        results.append((precision, stage, placement, skips, _same(_weights(model), _weights(control))))
    return results


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_every_rank():
    first, second = run_ranks(2, _skip_all)
    assert first == second
    for precision, stage, placement, skips, same_as_control in first:
        scales = (256.0, 128.0, 64.0, 64.0) if precision == "fp16" else (None,) * 4
        expected = [(True, True, 0, True), (False, False, 1, False), (False, False, 2, False), (True, True, 2, True)]
        expected = [(*state, scale) for state, scale in zip(expected, scales, strict=True)]
        assert skips == expected, (precision, stage, placement)
        assert same_as_control, (precision, stage, placement)


# Accumulation


def _accumulate(rank, world_size, options):
    """Weights after steps of 3, 2, 4, 1 and 3 micro-batches; before the third, two are begun and dropped. Options None:
    plain PyTorch, with all ranks' rows."""
    model = make_model("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    if options is not None:
        model, optimizer = engine.initialize(model, optimizer, timeout_s=30, **options)

    def backward(step, micro_step, micro_steps):
        for each in range(2) if options is None else [rank]:
            loss = _loss(model, 10 * step + micro_step, each, 2) / (2 * micro_steps if options is None else micro_steps)
            loss.backward()

    for step, micro_steps in enumerate((3, 2, 4, 1, 3)):
        if step == 2:
            backward(50, 0, 2)
            backward(50, 1, 2)
            optimizer.zero_grad()
        for micro_step in range(micro_steps):
            backward(step, micro_step, micro_steps)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model) if options is None else _weights(model)


def _accumulate_all(rank, world_size):
    return [_accumulate(rank, world_size, layout) for layout in LAYOUTS]


def test_accumulation_over_a_changing_number_of_micro_batches_matches_plain_pytorch():
    initial, expected = weights_of(make_model("gpt2")), _accumulate(0, 1, None)
    for layout, ours, theirs in zip(LAYOUTS, *run_ranks(2, _accumulate_all), strict=True):
        assert update_error(initial, ours, expected) < 1e-4, layout
        assert _same(ours, theirs), layout
