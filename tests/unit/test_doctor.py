"""The doctor: closed forms, a task that PPO has to solve, and controls. What its tasks catch is in `test_mutants`."""

import itertools
import math
import types
from dataclasses import replace

import pytest
import torch
from megalith.rlhf import doctor_run, doctor_tasks
from megalith.rlhf.doctor_run import Setting, build_learner, run

RANKS = types.SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), is_first=True)
TRADE = replace(doctor_tasks.count(vocab=8, new_tokens=4), iterations=16)


def off_the_curve(task, measured):
    best = task.optimum
    return max(abs(measured.reward - best.reward) / best.reward, abs(measured.kl - best.kl) / best.kl)


@pytest.mark.parametrize("task", [TRADE, doctor_tasks.count(vocab=3, new_tokens=3, beta=0.2)])
def test_the_optimum_is_that_of_enumeration(task):
    answers = list(itertools.product(range(task.vocab), repeat=task.new_tokens))
    rewards = torch.tensor([task.reward([2], answer) for answer in answers], dtype=torch.float64)
    objective = task.beta * (torch.logsumexp(rewards / task.beta, 0) - math.log(len(answers)))
    best = torch.softmax(rewards / task.beta, 0)
    assert task.optimum.objective == pytest.approx(objective.item(), rel=1e-9)
    assert task.optimum.reward == pytest.approx((best * rewards).sum().item(), rel=1e-9)
    assert task.optimum.kl == pytest.approx((best * (best * len(answers)).log()).sum().item(), rel=1e-9)


def test_a_uniform_policy_is_measured_as_one():
    learner = build_learner(TRADE, 0, RANKS)
    reward, kl = doctor_run.enumerate_policy(TRADE, learner.actor.model)
    assert (reward, kl) == (pytest.approx(1 / 8, rel=1e-5), pytest.approx(0, abs=1e-5))


def test_ppo_reaches_the_optimum():
    measured = run(TRADE, 0, RANKS)
    assert off_the_curve(TRADE, measured) <= 0.1
    assert measured.objective >= 0.95 * TRADE.optimum.objective


@pytest.mark.parametrize(
    ("setting", "holds"),
    [
        (Setting(lr=0.0), lambda m: abs(m.kl) < 1e-6),
        (Setting(reward=lambda prompt, completion: 1.0), lambda m: m.kl < 0.05),
        (Setting(reward=lambda prompt, completion: -TRADE.reward(prompt, completion)), lambda m: m.reward < 1 / 8),
        (Setting(beta=10.0), lambda m: m.kl < 0.01),
    ],
    ids=["rate 0", "constant reward", "negated reward", "β 10"],
)
def test_controls_do_not_learn(setting, holds):
    assert holds(run(replace(TRADE, iterations=4), 0, RANKS, setting))
