"""`offload_activations`: the same bits, the bytes that the plan says, and nothing kept that is not needed."""

import gc
import weakref

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, fit, initialized, state_of
from megalith.engine import Rates, Tier, Work
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Payload
from tiny import batches, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS = 5
INPUT_BYTES = 4 * 12 * 32 * 4  # rows, tokens, width, float32


def llama(reentrant=False):
    model = make_model("llama", num_hidden_layers=LAYERS)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def language_loss(model, step):
    rows = batches(6)[step]
    return model(input_ids=rows, labels=rows).loss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, shared=None):
        return x + torch.tanh(self.linear(x)) * (1 if shared is None else shared)


class Plain(nn.Module):
    """Blocks in the user's own loop, checkpointed by torch's function one by one or `together`. With `shares`, all are
    given one more tensor, and with `pairs` each another one."""

    def __init__(self, reentrant=False, together=1, shares=False, pairs=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 1)
        self._reentrant, self._together, self._shares, self._pairs = reentrant, together, shares, pairs

    def forward(self, x):
        x = self.first(x)
        shared = (x.sigmoid(),) if self._shares else ()
        for start in range(0, len(self.blocks), self._together):
            if self._pairs:
                shared = (x * 0.5,)

            def segment(x, *shared, blocks=self.blocks[start : start + self._together]):
                for block in blocks:
                    x = block(x, *shared)
                return x

            x = checkpoint(segment, x, *shared, use_reentrant=self._reentrant)
        return self.head(x)


def plain_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(16, 32, generator=generator)).square().mean()


def trained(build, loss_of, **options):
    model, optimizer = initialized(build, **options)
    fit(model, optimizer, loss_of, 3)
    for step in (3, 4):  # micro-steps
        optimizer.backward(loss_of(model, step))
    optimizer.step()
    return model


CASES = {  # and the copies out and in of a forward and backward pass: two that have left are on the device yet
    "transformers": (lambda: llama(False), language_loss, (4, 2)),
    "transformers, reentrant": (lambda: llama(True), language_loss, (4, 2)),
    "torch": (lambda: Plain(False), plain_loss, (5, 3)),
    "torch, reentrant": (lambda: Plain(True), plain_loss, (5, 3)),
    "torch, two blocks each": (lambda: Plain(False, together=2), plain_loss, (3, 1)),
    "torch, reentrant, two blocks each": (lambda: Plain(True, together=2), plain_loss, (2, 0)),
    "torch, shared": (lambda: Plain(False, shares=True), plain_loss, (5, 3)),
    "torch, reentrant, shared": (lambda: Plain(True, shares=True), plain_loss, (5, 3)),
    "torch, pairs": (lambda: Plain(False, pairs=True), plain_loss, (10, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_bit_changes_and_delays_change_none(name):
    build, loss_of, copies = CASES[name]
    expected = state_of(trained(build, loss_of))
    variants = [{"placement": "device"}, {"placement": "host"}]
    variants += [{"prefetch": seed % 3, "lane_delay": random_delay(seed, 0.003)} for seed in range(4)]
    for options in variants:
        model = trained(build, loss_of, offload_activations=True, **options)
        assert differing(state_of(model), expected) == [], options
        assert engine_of(model).schedule.activations.arena.used_bytes == 0
        if options.get("placement") == "device":
            nbytes = 16 * 32 * 4 if "torch" in name else INPUT_BYTES
            work = engine_of(model).ledger.work  # of five passes
            assert (work[Work.LINK_OUT], work[Work.LINK_IN]) == tuple(5 * count * nbytes for count in copies)


def block_inputs(model):
    """Weak references to the memory of what the blocks of a LLaMA are given."""
    refs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0].untyped_storage())))
    return refs


def alive(refs):
    return [ref() is not None for ref in refs]


def test_device_memory_is_let_go_in_the_forward_pass_and_host_memory_after_the_backward_pass():
    gc.disable()  # nothing may need it
    try:
        model, optimizer = initialized(llama, offload_activations=True)
        arena, refs = engine_of(model).schedule.activations.arena, block_inputs(model)
        for step in range(3):
            refs.clear()
            loss = language_loss(model, step)
            # Two that are leaving at most, and the last one, which stays.
            assert alive(refs) == [False] * (LAYERS - 3) + [True] * 3
            assert arena.used_bytes == (LAYERS - 1) * INPUT_BYTES
            if step == 1:
                del loss  # without a backward pass
            else:
                optimizer.backward(loss)
                del loss
                optimizer.step()
                assert not any(alive(refs))
            assert arena.used_bytes == 0
        report = engine.memory_report(model)["host"]["activation"]
        assert report["bytes"] == report["peak_bytes"] == 8 * INPUT_BYTES  # taken once, for later steps too
    finally:
        gc.enable()


def test_memory_is_released_after_a_backward_pass_that_raised():
    model, optimizer = initialized(llama, offload_activations=True)
    expected = trained(llama, language_loss)
    arena, refs = engine_of(model).schedule.activations.arena, block_inputs(model)

    def raises(gradient):
        raise ValueError("in the backward pass")

    handle = model.model.layers[2].register_forward_hook(lambda _, args, output: output.register_hook(raises) and None)
    loss = language_loss(model, 0)
    with pytest.raises(ValueError, match="in the backward pass"):
        optimizer.backward(loss)
    handle.remove()
    optimizer.zero_grad()
    del loss
    gc.collect()  # of the traceback
    assert arena.used_bytes == 0 and not any(alive(refs))
    fit(model, optimizer, language_loss, 3)
    for step in (3, 4):
        optimizer.backward(language_loss(model, step))
    optimizer.step()
    assert differing(state_of(model), state_of(expected)) == []


def test_nothing_is_saved_without_gradients_or_in_evaluation():
    model, _ = initialized(llama, offload_activations=True)
    with torch.no_grad():
        language_loss(model, 0)
    model.eval()
    language_loss(model, 0)  # transformers checkpoints only what trains
    assert "host" not in engine.memory_report(model)


def test_a_graph_that_is_retained_can_be_used_twice():
    model, optimizer = initialized(llama, offload_activations=True)
    plain, its_optimizer = initialized(llama)
    for trained_model, its in ((model, optimizer), (plain, its_optimizer)):
        loss = language_loss(trained_model, 0)
        loss.backward(retain_graph=True)
        loss.backward()
        its.step()
    assert differing(state_of(model), state_of(plain)) == []


def test_the_base_model_alone_is_watched_too():
    """As losses call it that make no logits of a whole batch."""

    def loss_of(model, step):
        return model.model(batches(6)[step])[0].square().mean()

    models = [trained(llama, loss_of, offload_activations=offloads) for offloads in (False, True)]
    assert differing(*map(state_of, models)) == []
    assert engine_of(models[1]).ledger.work[Work.LINK_OUT] == 5 * (LAYERS - 1) * INPUT_BYTES


def test_bad_input_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="offload_activations=1: must be True or False"):
        initialized(llama, offload_activations=1)
    with pytest.raises(ValueError, match="has no blocks"):
        initialized(lambda: nn.Linear(3, 3), offload_activations=True)
    model, _ = initialized(lambda: llama(None), offload_activations=True)
    for _ in range(2):  # and nothing is left behind by the first
        with pytest.raises(RuntimeError, match="no block is checkpointed.*gradient_checkpointing_enable"):
            language_loss(model, 0)
    model, _ = initialized(llama, offload_activations=True)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="of somebody else"):
        language_loss(model, 0)
    language_loss(model, 0).backward()


class InPlace(Plain):
    """Changes what was saved: of the block before the last, whose copy may be under way, or of the last."""

    where = 4

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            given = x
            x = checkpoint(block, x, use_reentrant=False)
            if number == self.where:
                given.add_(1)
        return self.head(x)


@pytest.mark.parametrize("where", [4, 5])
def test_a_saved_input_that_is_changed_is_an_error_as_in_torch(where, monkeypatch):
    monkeypatch.setattr(InPlace, "where", where)
    for offloads in (False, True):
        model, _ = initialized(InPlace, offload_activations=offloads)
        with pytest.raises(RuntimeError, match="inplace operation"):
            plain_loss(model, 0).backward()


def on_meta(model):
    rows = torch.empty(batches(1)[0].shape, dtype=torch.long, device="meta")
    return model(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize("options", [{}, {"placement": "host", "precision": "bf16", "prefetch": 2}])
def test_the_plan_has_the_same_bytes_and_traffic(options):
    planned = engine.plan(llama(), step=on_meta, offload_activations=True, **options).forecast
    kept = engine.plan(llama(), step=on_meta, **options).forecast
    model, optimizer = initialized(llama, offload_activations=True, **({"max_chunk_numel": 2**26} | options))
    fit(model, optimizer, language_loss, 3)
    ran = engine.memory_report(model)
    assert planned.memory["host"]["activation"] == ran["host"]["activation"]
    assert planned.memory["host"]["total"]["peak_bytes"] == ran["host"]["total"]["peak_bytes"]
    saved = kept.activation_peak_bytes - planned.activation_peak_bytes
    nbytes = INPUT_BYTES // (2 if options.get("precision") == "bf16" else 1)
    # In the last block, on the way back: its input, and two that are leaving.
    assert saved == pytest.approx((LAYERS - 3) * nbytes, abs=nbytes)
    for work, count in ((Work.LINK_OUT, LAYERS - 1), (Work.LINK_IN, LAYERS - 3)):
        assert planned.work[work] - kept.work.get(work, 0) == count * nbytes
        if "placement" not in options:
            assert engine_of(model).ledger.work[work] == 3 * count * nbytes


def test_copies_hide_behind_blocks_that_compute():
    """On the simulated clocks: blocks take far longer than copies."""
    rates = Rates(
        compute_flops=1e9,
        memory_bytes=1e9,
        call_s=0.0,
        host_adam_numel=1e12,
        device_adam_numel=1e12,
        link_in_bytes=2e7,
        link_out_bytes=2e7,
    )

    def planned(prefetch):
        plan = engine.plan(llama(), step=on_meta, rates=rates, on_gpu=True, offload_activations=True, prefetch=prefetch)
        return plan.forecast

    hidden, exposed = planned(1), planned(0)
    fetches = (LAYERS - 3) * INPUT_BYTES / 2e7
    assert hidden.busy_s["activations"] == pytest.approx(fetches + (LAYERS - 1) * INPUT_BYTES / 2e7)
    assert hidden.step_s - hidden.busy_s["compute"] < 0.1 * fetches
    assert exposed.step_s - exposed.busy_s["compute"] > 0.9 * fetches


def test_places_are_used_again_in_any_order_and_size():
    from megalith.engine.host_arena import ALIGNMENT_BYTES, HostArena
    from megalith.engine.tiers import Ledger

    ledger = Ledger()
    arena = HostArena(torch.device("cpu"), ledger, Payload.ACTIVATION)
    for sizes in ([1000, 3000, 500], [3000, 1000], [7000], [200] * 9):
        places = [arena.take(size) for size in sizes]
        for number, place in enumerate(places):
            place.bytes.fill_(number)
        assert all((place.bytes == number).all() for number, place in enumerate(places))
        assert arena.used_bytes == sum(sizes)
        for place in places[1:] + places[:1]:  # not in reverse
            arena.give_back(place)
    assert arena.used_bytes == 0
    assert ledger.bytes(Tier.HOST, Payload.ACTIVATION) == 8 * 4 * ALIGNMENT_BYTES  # all fitted into the first
    big = arena.take(2**27)
    assert big.bytes.numel() == 2**27
    assert ledger.bytes(Tier.HOST, Payload.ACTIVATION) == 8 * 4 * ALIGNMENT_BYTES + 2**27
