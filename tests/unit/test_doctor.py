"""The doctor: closed forms, one task that PPO has to solve, controls, and known bugs that have to be caught.

A mutant is put in by replacing a function or attribute that a module reads; the product has no switch for it.
"""

import itertools
import math
import types
from dataclasses import replace

import pytest
import torch
from megalith.rlhf import decoding, doctor_run, doctor_tasks, experience, ppo, rollout
from megalith.rlhf.doctor_run import Setting, build_learner, run
from megalith.rlhf.experience import collect
from megalith.rlhf.ppo import learn
from megalith.rlhf.prompts import Prompt

RANKS = types.SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), is_first=True)
TRADE = replace(doctor_tasks.count(vocab=8, new_tokens=4), iterations=16)
COPY = replace(doctor_tasks.copy("gpt2"), iterations=2, episodes=16)
GENTLE = replace(doctor_tasks.count(vocab=8, new_tokens=4, beta=0.1), iterations=16)


def off_the_curve(task, measured):
    best = task.optimum
    return max(abs(measured.reward - best.reward) / best.reward, abs(measured.kl - best.kl) / best.kl)


def step(task):
    """Three iterations of a small rollout: once the policy is no longer uniform, which no mistake could change, the
    runtime assertions tell."""
    learner = build_learner(task, 0, RANKS)
    for _ in range(3):
        learn(learner, collect(learner, [Prompt(ids) for ids in task.prompts[:16]]))


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


@pytest.mark.parametrize("task", [TRADE, GENTLE], ids=["β .05", "β .1"])
def test_ppo_reaches_the_optimum(task):
    measured = run(task, 0, RANKS)
    assert off_the_curve(task, measured) <= 0.1
    assert measured.objective >= 0.95 * task.optimum.objective


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


# Mutants


def logprobs_shifted(patch):
    patch.setattr(rollout.MicroBatch, "of_answers", lambda self, values: values.gather(1, self.places - 1))


def no_position_ids(patch):
    made = decoding.Decoder.__init__

    def without_positions(self, model):
        made(self, model)
        self._takes_positions = False

    patch.setattr(decoding.Decoder, "__init__", without_positions)


def prompts_padded_on_the_right(patch):
    patch.setattr(
        decoding.Decoder,
        "prefill",
        lambda self, answers: self._join(
            answers,
            self._forward(
                torch.tensor([a.prompt + [0] * (max(len(b.prompt) for b in answers) - len(a.prompt)) for a in answers]),
                self.cache,
                *self.cache.plan_prefill([len(a.prompt) for a in answers], self.device),
            ),
        ),
    )


def temperature_missing(patch):
    scored = experience.token_logprobs
    patch.setattr(experience, "token_logprobs", lambda *a, **k: scored(*a, **{**k, "temperature": 1.0}))


def dropout(patch):
    placed = doctor_run.ppo_models.place

    def with_dropout(*args):
        parts = placed(*args)
        for module in parts["actor"].model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return parts

    patch.setattr(doctor_run.ppo_models, "place", with_dropout)


@pytest.mark.parametrize(
    "mutate", [logprobs_shifted, no_position_ids, prompts_padded_on_the_right, dropout, temperature_missing]
)
def test_a_runtime_assertion_catches(mutate, monkeypatch):
    built = doctor_run.RolloutArguments
    monkeypatch.setattr(doctor_run, "RolloutArguments", lambda **k: built(**k, temperature=0.7))
    step(COPY)  # as it stands nothing is wrong
    mutate(monkeypatch)
    with pytest.raises(RuntimeError, match="log-probability"):
        step(COPY)


def score_on_every_token(patch):
    paid = ppo.token_rewards

    def everywhere(kl, scores, mask, beta):
        return torch.where(mask, paid(kl, torch.zeros_like(scores), mask, beta) + scores[:, None], 0.0)

    patch.setattr(ppo, "token_rewards", everywhere)


def score_on_a_pad(patch):
    paid = ppo.token_rewards
    patch.setattr(ppo, "token_rewards", lambda kl, scores, mask, beta: paid(kl, torch.zeros_like(scores), mask, beta))


def reference_that_is_updated(patch):
    built = doctor_run.build_learner

    def shared(*args):
        learner = built(*args)
        learner.reference = learner.actor.model
        return learner

    patch.setattr(doctor_run, "build_learner", shared)


@pytest.mark.parametrize("mutate", [score_on_every_token, score_on_a_pad, reference_that_is_updated])
def test_the_distance_from_the_optimum_catches(mutate, monkeypatch):
    mutate(monkeypatch)
    assert off_the_curve(GENTLE, run(replace(GENTLE, iterations=12), 0, RANKS)) > 0.1


def stop_token_outside_of_the_mask(patch):
    loss = ppo.policy_loss_sum

    def without_the_last(logprobs, old, advantages, mask, clip):
        return loss(logprobs, old, advantages, mask & (mask.cumsum(1) < mask.sum(1, keepdim=True)), clip)

    patch.setattr(ppo, "policy_loss_sum", without_the_last)


def test_the_stop_task_catches_a_stop_token_outside_of_the_mask(monkeypatch):
    stop_token_outside_of_the_mask(monkeypatch)
    assert run(replace(doctor_tasks.stop(), iterations=10), 0, RANKS).reward < 0.9


def test_the_stop_task_is_learned_as_it_stands():
    measured = run(replace(doctor_tasks.stop(), iterations=10), 0, RANKS)
    assert measured.reward >= 0.9
    assert measured.truncated <= 0.01


def white_on_the_mask():
    """Whether the advantages that reach the update have mean 0 and variance 1 over the real tokens."""
    learner, seen = build_learner(replace(doctor_tasks.stop(), episodes=32), 0, RANKS), []
    train_minibatch = ppo._train_minibatch
    with pytest.MonkeyPatch.context() as patch:

        def look(learner, experience, rows, advantages, *others):
            seen.append(advantages[experience.rollout.mask])
            return train_minibatch(learner, experience, rows, advantages, *others)

        patch.setattr(ppo, "_train_minibatch", look)
        learn(learner, collect(learner, [Prompt((2,))] * 32))
    return abs(seen[0].mean()) < 1e-4 and abs(seen[0].std(unbiased=False) - 1) < 1e-3


def test_whitening_over_padding_is_caught(monkeypatch):
    assert white_on_the_mask()
    white = ppo.whiten
    monkeypatch.setattr(ppo, "whiten", lambda values, mask, **k: white(values, torch.ones_like(mask), **k))
    assert not white_on_the_mask()
