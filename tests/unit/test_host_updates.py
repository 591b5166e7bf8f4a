"""Adam on the host of what partly lives on the device, through page-locked pieces: the bits of Adam in place."""

import megalith.engine as engine
import pytest
from against_torch import differing, fit, initialized, state_of
from megalith.engine import Tier, Work, streaming_sizes
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Payload
from test_device_updates import KINDS, language_loss, llama, shares, trained
from test_plan import assert_same_memory, loss_on_meta, work_of
from update_rates import ALL_HOST

APART = {
    "weights": {"param_offload": 0.0},
    "stage 2": {"zero_stage": 2},
    "some weights": {"param_offload": 0.5, "optimizer_offload": 0.6},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks of a few thousand parameters go through in many pieces, and the last is a short one."""
    monkeypatch.setattr(streaming_sizes, "PIECE_MULTIPLE", 256)
    monkeypatch.setattr(streaming_sizes, "HOST_PIECE_NUMEL", 768)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_the_pieces(kind):
    expected = state_of(trained(llama, placement="device", **KINDS[kind]))
    for seed, options in enumerate(APART.values()):
        model = trained(llama, lane_delay=random_delay(seed, 0.0003), rates=ALL_HOST, **KINDS[kind], **options)
        assert differing(state_of(model), expected) == [], options
        assert "optimizer_offload" in options or shares(model)[1] == 0


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16, 8 bit"])
def test_no_bit_depends_on_them_in_the_backward_pass(kind):
    """Where gradients are the several tensors that autograd made."""
    options = KINDS[kind] | {"max_grad_norm": None, "micro_steps": (1,) * 5}
    expected = state_of(trained(llama, placement="device", **options))
    for seed, more in enumerate(({}, *APART.values())):
        delayed = {"lane_delay": random_delay(seed, 0.0003), "update_in_backward": True}
        model = trained(llama, rates=ALL_HOST, **delayed, **options, **more)
        assert differing(state_of(model), expected) == [], more


@pytest.mark.parametrize(
    ("options", "bytes_out", "bytes_in"),
    [
        ({"precision": "fp32", "param_offload": 0.0}, 4 + 4, 4),  # gradient, weight; and the weight again
        ({"precision": "bf16", "param_offload": 0.0}, 2 + 2, 2),
        ({"precision": "bf16", "param_offload": 0.0, "update_in_backward": True}, 2 + 2, 2),
    ],
)
def test_memory_and_traffic_by_hand_and_as_planned(options, bytes_out, bytes_in):
    options = {"placement": "host", "max_chunk_numel": 3000, "prefetch": 0, **options}
    plan = engine.plan(llama(), step=loss_on_meta, rates=ALL_HOST, **options)
    model, optimizer = initialized(llama, rates=ALL_HOST, **{"max_grad_norm": None, **options})
    fit(model, optimizer, language_loss, 2)
    before = work_of(model)
    fit(model, optimizer, language_loss, [2])
    moved = work_of(model) - before
    numel = sum(parameter.numel() for parameter in llama().parameters())
    stored = sum(chunk.placement.owned_numel for chunk in engine_of(model).chunks)
    assert bytes_out * numel <= moved[Work.LINK_OUT] <= bytes_out * stored
    assert bytes_in * numel <= moved[Work.LINK_IN] <= bytes_in * stored
    for work in (Work.LINK_IN, Work.LINK_OUT, Work.HOST_ADAM):
        assert plan.forecast.work.get(work, 0) == moved[work], work
    report = engine.memory_report(model)
    if not options.get("update_in_backward"):  # where lanes tell when a gradient is released
        assert_same_memory(plan.forecast.memory, report)
    itemsize = 4 if options["precision"] == "fp32" else 2
    gradient = 4 if options.get("update_in_backward") else 0
    ring = plan.bytes_at_rest[Tier.HOST][Payload.STAGING]
    assert report["host"]["staging"]["bytes"] == ring == 768 * (itemsize + gradient)


def test_what_is_all_on_the_host_needs_no_pieces():
    plan = engine.plan(llama(), rates=ALL_HOST, placement="host")
    assert Payload.STAGING not in plan.bytes_at_rest[Tier.HOST]
