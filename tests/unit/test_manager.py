"""Several engines under one manager: one budget, one trace, and the bits of engines of their own."""

import gc

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, differing, state_of
from megalith.engine.chunk_group import ChunkGroup
from megalith.engine.lanes import random_delay
from megalith.engine.shard import engine_of
from megalith.engine.tiers import Tier
from tiny import batches, make_model


def llama(seed=0):
    return make_model("llama", seed=seed, hidden_size=64, intermediate_size=128, num_hidden_layers=4)


def start(manager=None, **options):
    """An actor that is trained, a critic that is trained, and a frozen reference."""
    options = {"max_chunk_numel": 20_000, "precision": "bf16", "max_grad_norm": 1.0} | options
    actor, critic, reference = llama(0), llama(1), llama(2).requires_grad_(False)
    trained = [engine.initialize(m, adamw(m), manager=manager, **options) for m in (actor, critic)]
    return trained, engine.initialize(reference, None, manager=manager, **options)[0]


def rounds(trained, reference, count=4, joint=False):
    """As in PPO: the reference is asked, then both are trained, one after the other or in one backward pass."""
    (actor, first), (critic, second) = trained
    losses = []

    def of_actor(rows, target):
        return (actor(rows).logits.float() - target.float()).square().mean()

    def of_critic(rows, target):
        return critic(input_ids=rows, labels=rows).loss

    phases = [(of_actor, (first,)), (of_critic, (second,))]
    if joint:
        phases = [(lambda *args: of_actor(*args) + of_critic(*args), (first, second))]
    for rows in batches(count):
        with torch.no_grad():
            target = reference(rows).logits
        for loss_of, optimizers in phases:
            loss = loss_of(rows, target)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [state_of(model) for model in (*(m for m, _ in trained), reference)]


@pytest.mark.parametrize(("share", "joint"), [(0.5, False), (0.75, False), (0.75, True), (1.5, False)])
def test_engines_share_a_budget_and_keep_their_bits(share, joint):
    trained, reference = start()
    losses, expected = rounds(trained, reference, joint=joint)
    whole = sum(engine.memory_report(m)["device"]["total"]["peak_bytes"] for m in (trained[0][0], trained[1][0]))
    manager = engine.Manager(device_budget=int(whole * share), host_budget="1GB")
    trained, reference = start(manager, placement="auto", lane_delay=random_delay(0, 0.0003))
    ours, states = rounds(trained, reference, joint=joint)
    assert ours == losses
    assert [differing(one, other) for one, other in zip(states, expected, strict=True)] == [[], [], []]
    peak = manager.ledger.report()["device"]["total"]["peak_bytes"]
    assert joint or peak <= manager.budgets[Tier.DEVICE]
    stored = {tier: report["total"]["bytes"] for tier, report in manager.ledger.report().items()}
    models = (trained[0][0], trained[1][0], reference)
    for tier, nbytes in stored.items():
        assert nbytes == sum(
            engine.memory_report(m).get(tier, {"total": {"bytes": 0}})["total"]["bytes"] for m in models
        )
    frozen = [report["total"]["bytes"] for tier, report in engine.memory_report(reference).items() if tier != "device"]
    if frozen:
        numel = sum(chunk.spec.numel for chunk in engine_of(reference).chunks)
        assert sum(frozen) <= 2 * numel, "a frozen model is its bf16 weights alone"


def test_what_the_next_models_phase_needs_is_fetched_while_this_one_computes(monkeypatch):
    trained, reference = start(engine.Manager(), placement="host", prefetch=2)
    rounds(trained, reference)
    started = []
    unshard = ChunkGroup.unshard

    def noted(group):
        if not group.is_whole:
            started.append(group)
        unshard(group)

    monkeypatch.setattr(ChunkGroup, "unshard", noted)
    actor = engine_of(trained[0][0]).groups
    with torch.no_grad():
        reference(batches(1)[0])
    assert set(started) & set(actor), "the actor's first block comes next"


def test_an_engine_that_is_gone_leaves_its_room_to_others():
    manager = engine.Manager(device_budget="1GB")
    trained, reference = start(manager, placement="auto")
    rounds(trained, reference, 1)
    assert manager.left(Tier.DEVICE) < 10**9
    del trained, reference
    gc.collect()
    assert manager.left(Tier.DEVICE) == 10**9 and manager.groups() == {}


def test_budgets_are_the_managers_alone():
    manager = engine.Manager(device_budget="300KB")
    with pytest.raises(ValueError, match="device_budget='?1000.*manager"):
        start(manager, device_budget=1000, placement="auto")
    with pytest.raises(engine.OutOfBudgetError, match="device_budget is 300000 bytes"):
        start(manager, placement="auto")
    with pytest.raises(ValueError, match="host_budget"):
        engine.Manager(host_budget="much")
