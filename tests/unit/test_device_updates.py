"""Adam of what lies on the host, done by the device piece by piece: the host's bits, whoever does which chunk."""

import threading
import time

import megalith.engine as engine
import pytest
from against_torch import differing, fit, initialized, state_of
from megalith.engine import Tier, Work, streaming_sizes
from megalith.engine.lanes import LaneError, random_delay
from megalith.engine.shard import engine_of
from test_any_model import Blocks, Skipping, X, square
from test_deferred_step import READERS, assert_sees_the_same
from test_nvme_placement import on_drive
from test_plan import assert_same_memory, loss_on_meta, work_of
from tiny import batches, make_model
from update_rates import ALL_DEVICE, MIXED


def llama():
    return make_model("llama", num_hidden_layers=2)


def language_loss(model, step):
    rows = batches(20)[step]
    return model(input_ids=rows, labels=rows).loss


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks of a few thousand parameters go through the ring in many pieces."""
    monkeypatch.setattr(streaming_sizes, "PIECE_MULTIPLE", 256)
    monkeypatch.setattr(streaming_sizes, "DEVICE_PIECE_NUMEL", 512)


def trained(build, micro_steps=(1, 3, 2, 1), loss_of=language_loss, **options):
    """The model after some steps of several micro-batches."""
    model, optimizer = initialized(build, **{"placement": "host", "max_chunk_numel": 3000, **options})
    for count in micro_steps:
        for step in range(count):
            optimizer.backward(loss_of(model, step) / count)
        optimizer.step()
        optimizer.zero_grad()
    return model


def shares(model):
    """Parameters that the host and the device have updated so far."""
    work = work_of(model)
    return work[Work.HOST_ADAM], work[Work.DEVICE_ADAM]


KINDS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "loss_scale": 256.0},
    "bf16, 8 bit": {"precision": "bf16", "state_precision": "8bit"},
    "no clipping": {"max_grad_norm": None},
}
PLACEMENTS = (
    {},
    {"param_offload": 0.0, "prefetch": 2},
    {"param_offload": 0.5, "optimizer_offload": 0.6},
    {"zero_stage": 2},
)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_who_updates_a_chunk(kind):
    expected = state_of(trained(llama, placement="device", **KINDS[kind]))
    for seed, options in enumerate(PLACEMENTS):
        for speeds in (ALL_DEVICE, MIXED):
            delay = random_delay(seed, 0.0003)
            model = trained(llama, lane_delay=delay, rates=speeds, **KINDS[kind], **options)
            assert differing(state_of(model), expected) == [], (options, speeds)
            by_host, by_device = shares(model)
            if "optimizer_offload" not in options:
                assert by_device > 0 and (by_host == 0) == (speeds is ALL_DEVICE), options


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16, 8 bit"])
def test_no_bit_depends_on_it_in_the_backward_pass(kind):
    options = KINDS[kind] | {"max_grad_norm": None, "micro_steps": (1,) * 5}
    expected = state_of(trained(llama, placement="device", **options))
    for seed, more in enumerate(({}, {"param_offload": 0.0}, {"param_offload": 0.5, "optimizer_offload": 0.6})):
        for speeds in (ALL_DEVICE, MIXED):
            delayed = {"lane_delay": random_delay(seed, 0.0003), "update_in_backward": True}
            model = trained(llama, rates=speeds, **delayed, **options, **more)
            assert differing(state_of(model), expected) == [], (more, speeds)
            assert shares(model)[1] > 0


def test_parameters_without_a_gradient_and_chunks_on_a_drive(tmp_path):
    def skipped(model, step):
        return model(X, step).square().mean()

    small = {"max_chunk_numel": 300, "loss_of": skipped, "micro_steps": (1, 2, 1, 1)}
    expected = state_of(trained(Skipping, placement="device", **small))
    for seed in range(3):
        delayed = small | {"lane_delay": random_delay(seed, 0.001), "rates": ALL_DEVICE}
        assert differing(state_of(trained(Skipping, **delayed)), expected) == []
    expected = state_of(trained(llama, placement="device", precision="bf16"))
    drive = on_drive(tmp_path, "bf16", param_offload=0.0, optimizer_offload=0.5, max_chunk_numel=3000)
    for speeds in (ALL_DEVICE, MIXED):
        model = trained(llama, rates=speeds, **drive)
        assert differing(state_of(model), expected) == []
        by_host, by_device = shares(model)
        assert by_host > 0 and by_device > 0, "what is on a drive is the host's"


class Gate:
    """A lane delay that holds one lane back until it is opened."""

    def __init__(self, lane):
        self._thread_name = f"megalith-{lane}"
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self):
        if threading.current_thread().name == self._thread_name:
            assert self.opened.wait(30)
        return 0.0


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_what_has_come_back_to_the_host(reader, tmp_path):
    expected, reference = initialized(llama, max_chunk_numel=3000)
    gate = Gate("states out")
    model, optimizer = initialized(llama, placement="host", max_chunk_numel=3000, rates=ALL_DEVICE, lane_delay=gate)
    fit(expected, reference, language_loss, 2)
    fit(model, optimizer, language_loss, 1)
    for chunk in engine_of(model).chunks:
        chunk.settle()
    gate.opened.clear()
    fit(model, optimizer, language_loss, [1])
    assert any(chunk.pending is not None for chunk in engine_of(model).chunks)
    threading.Timer(0.05, gate.opened.set).start()
    assert_sees_the_same(reader, (model, optimizer), (expected, reference), tmp_path)


def test_a_gradient_is_kept_until_the_device_has_read_it():
    gate = Gate("states in")
    model, optimizer = initialized(
        llama, placement="host", precision="bf16", max_chunk_numel=3000, rates=ALL_DEVICE, lane_delay=gate
    )

    def kept_bytes():
        return engine.memory_report(model)["host"]["gradient"]["bytes"]

    at_rest = kept_bytes()
    gate.opened.clear()
    for step in range(3):  # whose sum is in float32, in memory of its own
        optimizer.backward(language_loss(model, step))
    optimizer.step()
    time.sleep(0.05)
    assert kept_bytes() == at_rest + 4 * sum(chunk.placement.owned_numel for chunk in engine_of(model).chunks)
    gate.opened.set()
    for chunk in engine_of(model).chunks:
        chunk.settle()
    assert kept_bytes() == at_rest


def failing(name):
    """A lane delay that raises on the third piece of the lane of that name."""
    count = 0

    def delay():
        nonlocal count
        if threading.current_thread().name == f"megalith-{name}":
            count += 1
            if count == 3:
                raise OSError("the link is down")
        return 0.0

    return delay


@pytest.mark.parametrize("lane", ["states in", "device updates", "states out"])
def test_a_failure_on_the_way_is_an_error_of_whoever_uses_the_chunk_next(lane):
    model, optimizer = initialized(
        Blocks, placement="host", max_chunk_numel=300, rates=ALL_DEVICE, lane_delay=failing(lane)
    )
    with pytest.raises(
        LaneError, match=rf"'{lane}' failed at (state of|update) (enter|layers|leave).*the link is down"
    ):
        fit(model, optimizer, square, 3)


STEPS = 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"precision": "bf16", "state_precision": "8bit", "param_offload": 0.0},
        {"precision": "bf16", "update_in_backward": True, "max_grad_norm": None},
        {"zero_stage": 1, "device_budget": "4MB"},
    ],
)
@pytest.mark.parametrize("speeds", [ALL_DEVICE, MIXED], ids=["all", "mixed"])
def test_memory_and_traffic_are_those_of_the_plan_to_the_byte(options, speeds):
    options = {"placement": "host", "max_chunk_numel": 3000, "max_grad_norm": 1.0, "prefetch": 0, **options}
    plan = engine.plan(llama(), step=loss_on_meta, rates=speeds, **options)
    model, optimizer = initialized(llama, rates=speeds, **options)
    fit(model, optimizer, language_loss, STEPS - 1)
    before = work_of(model)
    fit(model, optimizer, language_loss, [STEPS - 1])
    moved = work_of(model) - before
    for work in (Work.LINK_IN, Work.LINK_OUT, Work.DEVICE_ADAM, Work.HOST_ADAM):
        assert plan.forecast.work.get(work, 0) == moved[work], work
    assert before[Work.DEVICE_ADAM] == (STEPS - 1) * moved[Work.DEVICE_ADAM], "every step chooses anew, and the same"
    report = engine.memory_report(model)
    if not options.get("update_in_backward"):  # where lanes tell when a gradient is released
        assert_same_memory(plan.forecast.memory, report)
    assert report["device"]["staging"]["bytes"] == plan.bytes_at_rest[Tier.DEVICE][engine.tiers.Payload.STAGING] > 0
    by_device, count = plan.updaters[Tier.DEVICE], sum(plan.updaters.values())
    assert f"the device does it for {by_device} of {count} chunks" in str(plan)
    assert (by_device == count) == (speeds is ALL_DEVICE)
    assert {"states in", "states out", "device updates"} <= plan.forecast.busy_s.keys()


@pytest.mark.parametrize(("precision", "gradient_bytes"), [("fp32", 4), ("bf16", 2)])
def test_the_traffic_by_hand(precision, gradient_bytes):
    """Beside that of the host's Adam: master and moments, 12 bytes a parameter, in and out, and the gradient in."""
    model, optimizer = initialized(llama, placement="host", precision=precision, rates=ALL_DEVICE, prefetch=0)
    plain, others = initialized(llama, placement="host", precision=precision, prefetch=0)
    for each, step in ((model, optimizer), (plain, others)):
        fit(each, step, language_loss, 2)
    own, host = work_of(model), work_of(plain)
    stored = 2 * sum(chunk.placement.owned_numel for chunk in engine_of(model).chunks)
    learnt = 2 * sum(parameter.numel() for parameter in llama().parameters())
    assert own[Work.LINK_OUT] - host[Work.LINK_OUT] == 12 * stored
    assert own[Work.LINK_IN] - host[Work.LINK_IN] == 12 * stored + gradient_bytes * learnt
    assert own[Work.DEVICE_ADAM] == host[Work.HOST_ADAM] == learnt


def test_a_budget_counts_the_ring_and_one_that_is_too_small_goes_without():
    def ring_bytes(**options):
        plan = engine.plan(llama(), rates=ALL_DEVICE, max_chunk_numel=3000, **{"placement": "host", **options})
        return plan.bytes_at_rest.get(Tier.DEVICE, {}).get(engine.tiers.Payload.STAGING, 0), plan

    ring, _ = ring_bytes()
    assert ring == 3 * 512 * 16 and ring_bytes(device_budget="4MB")[0] == ring
    assert 0 < ring_bytes(device_budget=300_000)[0] <= 300_000 / 16
    assert ring_bytes(device_budget=100_000)[0] == 0, "not even a sixteenth of it holds three pieces"
    for budget in (300_000, 600_000, 4_000_000):
        auto, plan = ring_bytes(placement="auto", device_budget=budget, host_budget="1GB")
        at_rest = sum(plan.bytes_at_rest[Tier.DEVICE].values())
        assert at_rest + plan.gradient_peak_bytes < budget
        on_host = Tier.HOST in plan.bytes_at_rest
        assert (auto > 0) == on_host, "where all fits on the device, nothing goes through a ring"
