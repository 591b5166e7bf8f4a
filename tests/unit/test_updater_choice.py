"""Which chunks the host updates and which the device: against every other choice there is, and by hand."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from megalith.engine import EngineConfig, Precision, Rates, StatePrecision, Tier, measure_rates
from megalith.engine.budgets import Machine, plan_storage
from megalith.engine.collectives import RankGroup
from megalith.engine.layout import ParamSpec, pack
from megalith.engine.placement import place_chunks
from megalith.engine.rates import UpdateRates, agreed_update_rates
from megalith.engine.streaming_sizes import DEVICE_PIECE_NUMEL, DEVICE_SLOTS, NO_RING
from megalith.engine.updater_choice import (
    Balance,
    UpdateCost,
    choose_updaters,
    device_ring,
    planned_updaters,
    update_cost,
)

CPU = torch.device("cpu")
RATES = UpdateRates(host_adam_numel=1e9, device_adam_numel=1e12, link_in_bytes=4e10, link_out_bytes=2e10)


def ends(choice, seconds):
    """When each worker is done, of (host, device) seconds of each chunk."""
    on_host = sum(host for tier, (host, _) in zip(choice, seconds, strict=True) if tier is Tier.HOST)
    return max(on_host, sum(device for tier, (_, device) in zip(choice, seconds, strict=True) if tier is Tier.DEVICE))


def best_end(seconds):
    return min(ends(choice, seconds) for choice in itertools.product((Tier.HOST, Tier.DEVICE), repeat=len(seconds)))


def test_every_first_part_of_the_order_is_ready_within_one_chunk_of_the_best_there_is():
    """The bound of the module's docstring, for chunks whose times are in proportion to their size."""
    generator, reached = random.Random(0), 0.0
    for _ in range(60):
        rates = replace(RATES, host_adam_numel=10 ** generator.uniform(8, 10))
        numels = [generator.choice((1, 1, 1, 3, 9)) * generator.randint(1, 9) * 10**6 for _ in range(8)]
        costs = [UpdateCost(numel, (0, 0), (16 * numel, 12 * numel)) for numel in numels]
        choice = choose_updaters(costs, rates)
        seconds = [cost.seconds(rates) for cost in costs]
        host_rate, device_rate = numels[0] / seconds[0][0], numels[0] / seconds[0][1]
        for count in range(1, 9):
            own, best = ends(choice[:count], seconds[:count]), best_end(seconds[:count])
            bound = max(numels[:count]) / (host_rate + device_rate)
            assert own <= (best + bound) * (1 + 1e-9), (numels[:count], choice[:count])
            reached = max(reached, (own - best) / bound)
    assert reached > 0.5, "the bound is near enough to tell"


def test_whatever_the_costs_it_takes_at_most_twice_the_best():
    """Ibarra and Kim 1977: as many times as there are workers, for the rule of the first to be done."""
    generator, worst = random.Random(1), 0.0
    for _ in range(300):
        host = [generator.randint(1, 99) * 10**6 for _ in range(7)]
        costs = [UpdateCost(numel, (0, 0), (generator.randint(1, 99) * 40 * 10**6,) * 2) for numel in host]
        seconds = [cost.seconds(RATES) for cost in costs]
        own = ends(choose_updaters(costs, RATES), seconds)
        worst = max(worst, own / best_end(seconds))
        assert own <= sum(host_s for host_s, _ in seconds)
    assert 1.0 < worst <= 2.0


def test_a_worker_that_is_fast_enough_gets_all_and_equal_ones_take_turns():
    costs = [UpdateCost(10**6, (0, 0), (12 * 10**6, 12 * 10**6))] * 4
    assert choose_updaters(costs, replace(RATES, host_adam_numel=1e6)) == [Tier.DEVICE] * 4
    assert choose_updaters(costs, replace(RATES, host_adam_numel=1e11)) == [Tier.HOST] * 4
    equal = replace(RATES, link_out_bytes=1.2e10, host_adam_numel=1e9)
    assert choose_updaters(costs, equal) == [Tier.HOST, Tier.DEVICE] * 2
    drive = replace(costs[0], device=None)
    assert choose_updaters([drive, costs[0], drive], equal) == [Tier.HOST, Tier.DEVICE, Tier.HOST]


@pytest.mark.parametrize(
    "rates",
    [None, replace(RATES, link_in_bytes=None), replace(RATES, link_out_bytes=None), replace(RATES, host_computes=True)],
)
def test_all_go_to_the_host_without_a_device_that_could_help(rates):
    cost = UpdateCost(10**9, (0, 0), (1, 1))
    assert [Balance(rates).give(cost) for _ in range(3)] == [Tier.HOST] * 3


def placed(weight=Tier.HOST, state=Tier.HOST, gradient=Tier.HOST, numel=1024, **options):
    config = EngineConfig(placement="host", **options)
    dtype = Precision(config.precision).dtype
    multiple = StatePrecision(config.state_precision).slot_multiple
    layout = pack([("block", [ParamSpec("weight", (numel,), dtype, True, 0)])], 1, 2**20, multiple)
    [placement] = place_chunks(layout.chunks, config, 0, 1, [weight], [state])
    return replace(placement, gradient_tier=gradient), layout.chunks[0]


def per_parameter(gradient_itemsize, **options):
    placement, spec = placed(**options)
    cost = update_cost(placement, spec, gradient_itemsize)
    return [None if way is None else tuple(nbytes / 1024 for nbytes in way) for way in (cost.host, cost.device)]


def test_the_bytes_that_cross_the_link():
    assert per_parameter(4) == [(0, 0), (16, 12)]  # weight, two moments; and the gradient on its way in
    assert per_parameter(2, precision="bf16") == [(0, 0), (14, 12)]  # weight, its low half, two moments
    assert per_parameter(4, precision="bf16") == [(0, 0), (16, 12)]  # the sum of micro-batches
    assert per_parameter(2, precision="fp16") == [(0, 0), (16, 14)]
    scales = 8 / 256
    assert per_parameter(2, precision="bf16", state_precision="8bit") == [(0, 0), (8 + scales, 6 + scales)]
    on_device = {"precision": "bf16", "weight": Tier.DEVICE}
    assert per_parameter(2, **on_device) == [(2, 2), (12, 10)]
    assert per_parameter(2, **on_device, gradient=Tier.DEVICE) == [(2, 4), (10, 10)]
    for where in ({"weight": Tier.NVME}, {"state": Tier.NVME}, {"gradient": Tier.NVME}):
        assert per_parameter(2, precision="bf16", **where)[1] is None


def test_seconds_are_those_of_the_slowest_part_of_the_way():
    cost = UpdateCost(10**6, (2 * 10**6, 4 * 10**6), (8 * 10**6, 2 * 10**6))
    assert cost.seconds(RATES) == pytest.approx((1e-3 + 5e-5 + 2e-4, 2e-4))
    assert cost.seconds(replace(RATES, link_out_bytes=2e9))[1] == pytest.approx(1e-3)
    assert cost.seconds(replace(RATES, device_adam_numel=1e8))[1] == pytest.approx(1e-2)


def test_the_ring_is_a_small_share_of_a_budget_and_has_what_it_needs():
    kinds = Precision.BF16, StatePrecision.EXACT

    def ring(budget=None, numel=10**7, **where):
        placement, spec = placed(precision="bf16", numel=numel, **where)
        return device_ring([spec], [placement], *kinds, budget)

    whole = ring()
    assert whole.piece_numel == DEVICE_PIECE_NUMEL and whole.nbytes == DEVICE_SLOTS * DEVICE_PIECE_NUMEL * 16
    assert ring(numel=1000).piece_numel == 4096
    assert 0.9 * 10**8 / 16 < ring(budget=10**8).nbytes <= 10**8 / 16
    assert ring(budget=10**6) == ring(state=Tier.DEVICE) == ring(state=Tier.NVME) == NO_RING
    assert "weight" not in ring(weight=Tier.DEVICE).itemsizes and "weight" in whole.itemsizes
    assert "gradient" not in ring(gradient=Tier.DEVICE).itemsizes and "gradient" in whole.itemsizes


def test_a_plan_chooses_in_the_order_in_which_a_run_updates():
    rates = UpdateRates(host_adam_numel=1e9, device_adam_numel=1e12, link_in_bytes=15e9, link_out_bytes=15e9)
    specs = [
        (f"block{i}", [ParamSpec(f"w{i}", (size,), torch.float32, True, 0)]) for i, size in enumerate((64, 64, 256))
    ]
    layout, config = pack(specs, 1, 2**20, 1), EngineConfig(placement="host")
    plan = plan_storage(layout, config, RankGroup(0, 1, None, None), Machine(False, 10**9, 10**9, rates=rates))
    assert planned_updaters(plan, rates, False, in_backward=False) == {Tier.HOST: 2, Tier.DEVICE: 1}
    assert planned_updaters(plan, rates, False, in_backward=True) == {Tier.HOST: 1, Tier.DEVICE: 2}
    assert planned_updaters(plan, None, False, in_backward=False) == {Tier.HOST: 3, Tier.DEVICE: 0}
    without = plan_storage(layout, config, RankGroup(0, 1, None, None), Machine(False, 10**9, 10**9))
    assert planned_updaters(without, rates, False, in_backward=False) == {Tier.HOST: 3, Tier.DEVICE: 0}


class Ranks(RankGroup):
    """Other ranks, which gave `others`."""

    def gather_objects(self, value):
        return [value, *self.others]


def agreed(mine, *others, config=None):
    group = Ranks(0, 1 + len(others), None, None)
    object.__setattr__(group, "others", [(each, False) for each in others])
    return agreed_update_rates(mine, CPU, config or EngineConfig(placement="host"), group)


def test_ranks_agree_on_the_slowest_and_a_cpu_measures_nothing():
    assert agreed(None) is None and agreed(None, None) is None
    assert agreed(RATES) == RATES
    slow = replace(RATES, host_adam_numel=1e8, link_in_bytes=9e10)
    assert agreed(RATES, slow) == replace(RATES, host_adam_numel=1e8)
    assert agreed(RATES, replace(RATES, link_in_bytes=None)).link_in_bytes is None
    with pytest.raises(ValueError, match="on some ranks and not on others"):
        agreed(RATES, None)
    with pytest.raises(TypeError, match="rates is a dict"):
        agreed({"link_in_bytes": 1e9})
    with pytest.raises(ValueError, match="link_in_bytes=-1.0"):
        replace(RATES, link_in_bytes=-1.0)


def test_which_engines_have_state_on_the_host():
    def on_host(placement, **options):
        drive = {"nvme_dir": "."} if placement == "nvme" else {}
        return EngineConfig(placement=placement, **drive, **options).keeps_state_on_host

    assert on_host("host") and on_host("auto") and not on_host("device") and not on_host("nvme")
    assert not on_host("host", optimizer_offload=0.0) and on_host("host", optimizer_offload=0.5)
    assert on_host("nvme", optimizer_offload=0.0) and on_host("nvme", optimizer_offload=0.5)


@pytest.mark.parametrize("state_precision", ["exact", "8bit"])
def test_what_is_measured_here_leaves_all_to_the_host(state_precision):
    rates = measure_rates("cpu", "bf16", trial_s=0.001, state_precision=state_precision)
    assert isinstance(rates, Rates) and rates.host_computes and rates.host_adam_numel > 0
    assert choose_updaters([UpdateCost(10**9, (0, 0), (1, 1))], rates) == [Tier.HOST]
