"""update_in_backward: the bits of an immediate step, less memory, and an error for what it cannot undo."""

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, fit, initialized, state_of
from megalith.engine.lanes import DoneEvent, UpdateEvent, random_delay
from megalith.engine.shard import engine_of
from test_any_model import Blocks, Skipping, X, square
from test_nvme_placement import four_blocks, language_loss, llama, on_drive
from tiny import make_model


def eager(build, **options):
    return initialized(build, max_grad_norm=None, update_in_backward=True, **options)


def trained(build, loss_of, steps, **options):
    model, optimizer = initialized(build, max_grad_norm=None, **options)
    fit(model, optimizer, loss_of, steps)
    return state_of(model), optimizer.grad_norm


PLACEMENTS = {
    "device": {},
    "host": {"placement": "host", "prefetch": 2},
    "weights on the device": {"placement": "host", "param_offload": 0.0},
    "nvme": {"placement": "nvme"},
    "nvme, weights on the host": {"placement": "nvme", "param_offload": 0.0, "prefetch": 0},
    "nvme, some of it": {"placement": "nvme", "param_offload": 0.5, "optimizer_offload": 0.4},
    "nvme, budget": {"placement": "nvme", "device_budget": "1GB"},
    "nvme, stage 1": {"placement": "nvme", "zero_stage": 1},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bits_of_an_immediate_step_on_every_tier(precision, tmp_path):
    expected, norm = trained(four_blocks, language_loss, 8, precision=precision)
    for seed, (name, options) in enumerate(PLACEMENTS.items()):
        if options.get("placement") == "nvme":
            options = on_drive(tmp_path, precision, **options)
        delay = random_delay(seed, 0.0003)
        options = {"precision": precision, "update_in_backward": True, "lane_delay": delay, **options}
        state, own_norm = trained(four_blocks, language_loss, 8, **options)
        assert differing(state, expected) == [], name
        assert own_norm == pytest.approx(norm, rel=1e-12), name


def test_tied_weights_and_blocks_that_are_skipped(tmp_path):
    def skipped(model, step):
        return model(X, step).square().mean()

    for build, loss_of in ((lambda: make_model("gpt2"), language_loss), (Skipping, skipped)):
        expected, _ = trained(build, loss_of, 6)
        for seed in range(3):
            for options in ({"placement": "host"}, on_drive(tmp_path, max_chunk_numel=100)):
                delayed = {"update_in_backward": True, "lane_delay": random_delay(seed, 0.001), **options}
                assert differing(trained(build, loss_of, 6, **delayed)[0], expected) == [], options


def test_gradients_are_not_kept_and_memory_agrees_with_the_plan(tmp_path):
    for options in ({"placement": "host"}, on_drive(tmp_path, nvme_checksums=False)):
        options |= {"update_in_backward": True, "max_grad_norm": None, "max_chunk_numel": 10**6}
        plan = engine.plan(four_blocks(), **options)
        model, optimizer = initialized(four_blocks, **options)
        fit(model, optimizer, language_loss, 3)
        for chunk in engine_of(model).chunks:
            chunk.settle()
        report = engine.memory_report(model)
        assert "gradient" not in report["host"] and "gradient" not in report.get("nvme", {})
        assert report["device"]["gradient"]["bytes"] == 0
        assert report["device"]["gradient"]["peak_bytes"] < 4 * plan.layout.stored_numel
        for tier, nbytes in plan.peak_bytes.items():
            assert report[tier.value]["total"]["peak_bytes"] <= nbytes * 1.05, tier


def test_what_was_read_ahead_is_void_when_a_checkpoint_is_loaded(tmp_path):
    model, optimizer = eager(llama, **on_drive(tmp_path / "drive"))
    fit(model, optimizer, language_loss, 2)
    engine.save_checkpoint(tmp_path / "saved", model, optimizer)
    fit(model, optimizer, language_loss, [2, 3])
    expected = state_of(model)
    engine.load_checkpoint(tmp_path / "saved", model, optimizer)
    fit(model, optimizer, language_loss, [2, 3])
    assert differing(state_of(model), expected) == []


def backward(model, scale=1.0):
    (square(model, 0) * scale).backward()


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_gradient_that_is_not_finite_is_an_error_until_a_checkpoint_is_loaded(placement, tmp_path):
    model, optimizer = eager(Blocks, placement=placement)
    fit(model, optimizer, square, 1)
    engine.save_checkpoint(tmp_path / "saved", model, optimizer)
    expected = state_of(model)
    backward(model, float("nan"))
    with pytest.raises(FloatingPointError, match=r"gradient of leave\[0\], .* not finite.*load a checkpoint"):
        optimizer.step()
    assert all(value.isfinite().all() for value in state_of(model).values())
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        backward(model)
    engine.load_checkpoint(tmp_path / "saved", model, optimizer)
    assert differing(state_of(model), expected) == []
    fit(model, optimizer, square, 1)


def test_an_interrupted_backward_pass_is_an_error_until_a_checkpoint_is_loaded(tmp_path):
    model, optimizer = eager(Blocks, placement="host")
    engine.save_checkpoint(tmp_path / "saved", model, optimizer)

    def fail(gradient):
        raise KeyboardInterrupt

    handle = model.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(KeyboardInterrupt):
        backward(model)
    handle.remove()
    for use in (
        lambda: backward(model),
        optimizer.step,
        lambda: engine.save_checkpoint(tmp_path / "saved", model, optimizer),
    ):
        with pytest.raises(RuntimeError, match="interrupted.*load a checkpoint"):
            use()
    engine.load_checkpoint(tmp_path / "saved", model, optimizer)
    fit(model, optimizer, square, 1)


def test_what_cannot_be_undone_is_refused():
    model, optimizer = eager(Blocks, placement="host")
    backward(model)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(RuntimeError, match="group 0 was changed"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] /= 2
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(RuntimeError, match="second backward pass"):
        backward(model)
    model, optimizer = eager(Blocks, placement="host")
    with engine.gathered(model), pytest.raises(RuntimeError, match="gathered"):
        backward(model)


def test_options_that_it_cannot_have():
    for options, field in (({"max_grad_norm": 1.0}, "max_grad_norm"), ({"precision": "fp16"}, "'fp32' or 'bf16'")):
        with pytest.raises(ValueError, match=rf"update_in_backward=True.*{field}"):
            engine.plan(Blocks(), update_in_backward=True, **options)
    with pytest.raises(NotImplementedError, match="2 ranks"):
        engine.plan(Blocks(), world_size=2, update_in_backward=True)
    with pytest.raises(ValueError, match="update_in_backward"):
        engine.plan(Blocks(), update_in_backward=1)


def test_updates_end_before_the_step_where_the_lane_is_fast_enough():
    model, optimizer = eager(Blocks, placement="host")
    backward(model)
    assert sum(optimizer.steps_taken.values()) == len(optimizer.steps_taken), "all began in the backward pass"
    for chunk in engine_of(model).chunks:
        chunk.settle()
    before = state_of(model)
    optimizer.step()
    assert differing(state_of(model), before) == []
    assert torch.isfinite(torch.tensor(optimizer.grad_norm))


def test_weights_are_used_while_a_drive_takes_them_and_not_freed(tmp_path):
    class Write:
        is_done = False

        def done(self):
            return self.is_done

        def synchronize(self):
            self.is_done = True

        wait = synchronize

    options = on_drive(tmp_path, nvme_checksums=False, update_in_backward=True, max_grad_norm=None)
    model, optimizer = initialized(four_blocks, **options)
    fit(model, optimizer, language_loss, 2)
    group = next(each for each in engine_of(model).groups if each.is_updated_in_place and each.is_whole)
    [chunk], write = group.chunks, Write()
    chunk.settle()
    chunk.pending = UpdateEvent(DoneEvent(), [], [write])
    group.wait()
    assert group.is_updating and not write.is_done
    group.reshard()
    assert write.is_done and not group.is_updating
