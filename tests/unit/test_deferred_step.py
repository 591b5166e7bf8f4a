"""The updates of offloaded chunks run while the next forward pass computes: the bits of an immediate step, whoever
looks at the weights or the state first."""

import threading

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, differing, fit, gathered_weights, initialized, state_of
from megalith.engine.lanes import LaneError, random_delay
from megalith.engine.shard import engine_of
from test_any_model import Blocks, Skipping, X, square
from tiny import batches, make_model


def language_loss(model, step):
    rows = batches(60)[step]
    return model(input_ids=rows, labels=rows).loss


def llama():
    return make_model("llama", num_hidden_layers=4)


class Gate:
    """A lane delay that holds the updates back until it is opened."""

    def __init__(self):
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self):
        if threading.current_thread().name == "megalith-updates":
            assert self.opened.wait(30)
        return 0.0


def held_back(step_options=None):
    """A model after three steps, the updates of the last one not begun; the gate; and what an immediate step gives."""
    expected, reference = initialized(llama, **(step_options or {}))
    fit(expected, reference, language_loss, 3)
    gate = Gate()
    model, optimizer = initialized(llama, placement="host", lane_delay=gate, **(step_options or {}))
    fit(model, optimizer, language_loss, 2)
    engine_of(model).chunks[-1].settle()
    gate.opened.clear()
    fit(model, optimizer, language_loss, [2])
    assert any(chunk.pending is not None for chunk in engine_of(model).chunks)
    threading.Timer(0.05, gate.opened.set).start()
    return model, optimizer, expected, reference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_deferred_steps_have_the_bits_of_immediate_ones(precision):
    expected, reference = initialized(llama, precision=precision, max_grad_norm=0.5)
    fit(expected, reference, language_loss, 50)
    for seed, prefetch in enumerate((0, 4)):
        options = {"placement": "host", "prefetch": prefetch, "lane_delay": random_delay(seed, 0.0002)}
        model, optimizer = initialized(llama, precision=precision, max_grad_norm=0.5, **options)
        fit(model, optimizer, language_loss, 50)
        assert differing(state_of(model), state_of(expected)) == [], prefetch


def test_step_returns_before_the_updates_and_a_block_waits_for_its_own_alone():
    gate, order = Gate(), []
    model, optimizer = initialized(Blocks, placement="host", lane_delay=gate, prefetch=0)
    fit(model, optimizer, square, 1)
    chunks = engine_of(model).chunks
    for chunk in chunks:
        chunk.settle()
    gate.opened.clear()
    fit(model, optimizer, square, [1])
    assert all(chunk.pending is not None for chunk in chunks)
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(
            lambda *_, i=index: order.append((i, sum(chunk.pending is not None for chunk in chunks)))
        )
    gate.opened.set()
    model(X)
    waiting = [count for _, count in order]
    assert waiting == sorted(waiting, reverse=True) and waiting[0] > 0, "the first block waited for later ones' updates"


READERS = {
    "gathered": lambda model, optimizer, folder: gathered_weights(model),
    "evaluation": lambda model, optimizer, folder: model.eval()(batches(1)[0]).logits,
    "state": lambda model, optimizer, folder: state_of(model),
    "state_dict": lambda model, optimizer, folder: whole_state_dict(model),
    "save_pretrained": lambda model, optimizer, folder: saved_pretrained(model, folder),
}


def whole_state_dict(model):
    with engine.gathered(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def saved_pretrained(model, folder):
    engine.save_pretrained(folder, model)
    return dict(type(model).from_pretrained(folder).state_dict())


def assert_sees_the_same(reader, ours, theirs, folder):
    with torch.no_grad():
        seen = READERS[reader](*ours, folder / "ours")
        wanted = READERS[reader](*theirs, folder / "theirs")
    if isinstance(seen, torch.Tensor):
        assert torch.equal(seen, wanted)
    else:
        assert differing(seen, wanted) == []


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_finished_update(reader, tmp_path):
    model, optimizer, expected, reference = held_back()
    assert_sees_the_same(reader, (model, optimizer), (expected, reference), tmp_path)


def test_a_checkpoint_saved_and_loaded_between_step_and_forward(tmp_path):
    model, optimizer, expected, _ = held_back()
    engine.save_checkpoint(tmp_path / "saved", model, optimizer)
    assert differing(state_of(model), state_of(expected)) == []
    other, others, _, _ = held_back()  # its own updates are under way while it loads
    engine.load_checkpoint(tmp_path / "saved", other, others)
    assert differing(state_of(other), state_of(expected)) == []
    fit(model, optimizer, language_loss, [3])
    fit(other, others, language_loss, [3])
    assert differing(state_of(other), state_of(model)) == []


def test_a_learning_rate_changed_after_step_is_for_the_next_one():
    model, optimizer, expected, reference = held_back()
    for each, step in ((model, optimizer), (expected, reference)):
        step.param_groups[0].update(lr=0.5, betas=(0.1, 0.2), weight_decay=0.7)
        if each is model:
            assert differing(state_of(model), state_of(expected)) == []
        fit(each, step, language_loss, [3])
    assert differing(state_of(model), state_of(expected)) == []


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_that_is_skipped_leaves_the_updates_before_it_alone(max_grad_norm):
    def train(**options):
        model, optimizer = initialized(Blocks, max_grad_norm=max_grad_norm, **options)
        for step in range(4):
            loss = square(model, step)
            (loss * (float("nan") if step == 2 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == 1
        return state_of(model)

    assert differing(train(placement="host", lane_delay=random_delay(1, 0.002)), train()) == []


def test_a_second_step_without_a_forward_pass_between():
    model, optimizer, expected, _ = held_back()
    optimizer.step()
    assert differing(state_of(model), state_of(expected)) == []


@pytest.mark.parametrize("options", [{}, {"param_offload": 0.0}, {"param_offload": 0.5, "prefetch": 2}])
def test_blocks_that_are_skipped_in_turn_keep_their_updates(options):
    """A chunk that the next forward pass does not use is updated all the same, and its gradient's memory is not
    overwritten before that."""

    def train(**more):
        model, optimizer = initialized(Skipping, **more)
        fit(model, optimizer, lambda m, step: m(X, step).square().mean(), 8)
        return state_of(model)

    expected = train()
    for seed in range(2):
        delayed = train(placement="host", lane_delay=random_delay(seed, 0.003), **options)
        assert differing(delayed, expected) == [], seed


def test_accumulation_while_updates_are_pending():
    def train(**options):
        model, optimizer = initialized(llama, precision="bf16", **options)
        for micro_steps in (1, 3, 2, 1):
            for step in range(micro_steps):
                optimizer.backward(language_loss(model, step) / micro_steps)
            optimizer.step()
        return state_of(model), engine.memory_report(model)

    expected, _ = train()
    for seed in range(3):
        state, report = train(placement="host", lane_delay=random_delay(seed, 0.002))
        assert differing(state, expected) == []
        gradient = report["host"]["gradient"]
        assert gradient["bytes"] < gradient["peak_bytes"], "the float32 sums are released by the updates"


def test_an_update_that_fails_is_an_error_of_whoever_uses_the_chunk_next():
    model, optimizer = initialized(Blocks, placement="host", lane_delay=float)
    fit(model, optimizer, square, 2)
    chunk = engine_of(model).chunks[2]
    chunk.settle()
    chunk.exp_avg = chunk.exp_avg[:-1]
    with pytest.raises(LaneError, match=rf"'updates' failed at update {chunk.name.split('[')[0]}"):
        fit(model, optimizer, square, 2)


def test_a_model_with_state_on_the_host_and_weights_on_the_device_waits_too():
    gate = Gate()
    model, optimizer = initialized(Blocks, adamw, placement="host", param_offload=0.0, lane_delay=gate)
    expected, reference = initialized(Blocks, adamw)
    for each in ((model, optimizer), (expected, reference)):
        fit(*each, square, 1)
    engine_of(model).chunks[-1].settle()
    gate.opened.clear()
    for each in ((model, optimizer), (expected, reference)):
        fit(*each, square, [1]) if each[0] is expected else (square(model, 1).backward(), optimizer.step())
    threading.Timer(0.05, gate.opened.set).start()
    assert torch.equal(model(X), expected(X))
