"""Thirteen known bugs of other trainers, put in one at a time: each has to turn something red.

A mutant replaces a function or attribute that a module of the product reads; the product has no switch for it. What
catches it is a runtime assertion of the product, or a measurement on a task of the doctor whose optimum is known. The
table is `MUTANTS`.
"""

import json
import tempfile
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megalith.rlhf import decoding, doctor_run, doctor_tasks, experience, ppo, rl_run, rollout, train_ppo
from megalith.rlhf.doctor_run import Setting, build_learner, enumerate_policy, run
from megalith.rlhf.experience import collect
from megalith.rlhf.learner import PPOArguments
from megalith.rlhf.ppo import learn
from megalith.rlhf.prompts import Prompt, next_prompts

RANKS = types.SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), is_first=True)
COPY = replace(doctor_tasks.copy("gpt2"), iterations=2, episodes=16)
TRADE = doctor_tasks.count(vocab=4, new_tokens=2, beta=0.2, iterations=10)
STOP = doctor_tasks.stop(iterations=10)
VALUES = doctor_tasks.values()


# Detectors: silent where all is well


def assertions(temperature=0.7):
    """Three iterations of a small rollout: once the policy is no longer uniform, which no mistake could change, the
    runtime assertions tell."""
    built = doctor_run.RolloutArguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_run, "RolloutArguments", lambda **given: built(**given, temperature=temperature))
        learner = build_learner(COPY, 0, RANKS)
    for _ in range(3):
        learn(learner, collect(learner, [Prompt(ids) for ids in COPY.prompts[:16]]))


def trade_off():
    """Reward and KL of the trained policy are those of the optimum."""
    measured, best = run(TRADE, 0, RANKS), TRADE.optimum
    assert measured.reward == pytest.approx(best.reward, rel=0.1)
    assert measured.kl == pytest.approx(best.kl, rel=0.1)


def stopping():
    """An answer is rewarded for where it ends."""
    measured = run(STOP, 0, RANKS)
    assert measured.reward >= 0.9 and measured.truncated <= 0.01


def value_of_states():
    """The critic explains what can be known before a token, no less and no more."""
    setting = Setting(ppo=PPOArguments(ppo_epochs=4, train_batch_size=128, critic_warmup=VALUES.iterations, lam=1.0))
    assert run(VALUES, 0, RANKS, setting).explained_variance == pytest.approx(1 - 1 / VALUES.new_tokens, abs=0.15)


def every_prompt():
    """Three rollouts of `megalith ppo` over six prompts, two at a time, see each of them."""
    prompts = [f"{letter}" for letter in "abcdef"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prompts.csv").write_text("\n".join(["prompt", *prompts]))
        Path(folder, "judge.py").write_text("def reward(completions):\n    return [0.0] * len(completions)\n")
        given = f"{folder}/prompts.csv --reward_function {folder}/judge.py:reward --save_path {folder}/out "
        given += "--pretrain llama-tiny --strategy ddp --prompt_format plain --max_new_tokens 1 --num_episodes 1 "
        given += "--max_timesteps 3 --experience_batch_size 2 --ppo_epochs 1 --device cpu --tensorboard false"
        train_ppo.main(given.split())
        samples = [json.loads(line) for line in Path(folder, "out", "samples.jsonl").read_text().splitlines()]
    assert sorted(sample["prompt"] for sample in samples) == prompts


def paid_kl(estimator="k3"):
    """What is paid for KL is on average β times the KL by enumeration."""
    learner = build_learner(TRADE, 0, RANKS, Setting(ppo=PPOArguments(ppo_epochs=4, train_batch_size=128)))
    for _ in range(4):
        learn(learner, collect(learner, [Prompt((2,))] * 128))
    learner.reward_args = replace(learner.reward_args, kl_estimator=estimator)
    learner.ppo_args = PPOArguments(ppo_epochs=1, train_batch_size=2048)
    exact = enumerate_policy(TRADE, learner.actor.model)[1]
    metrics = learn(learner, collect(learner, [Prompt((2,))] * 2048))
    assert metrics["objective/non_score_reward"] == pytest.approx(-TRADE.beta * exact, rel=0.1)


def whitened():
    """The advantages that reach the update have mean 0 and variance 1 over the real tokens."""
    learner, seen = build_learner(replace(STOP, episodes=32), 0, RANKS), []
    train_minibatch = ppo._train_minibatch
    with pytest.MonkeyPatch.context() as patch:

        def look(learner, experience, rows, advantages, *others):
            seen.append(advantages[experience.rollout.mask])
            return train_minibatch(learner, experience, rows, advantages, *others)

        patch.setattr(ppo, "_train_minibatch", look)
        learn(learner, collect(learner, [Prompt((2,))] * 32))
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-4)
    assert seen[0].std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


# Mutants


def logprobs_a_token_early(patch):
    patch.setattr(rollout.MicroBatch, "of_answers", lambda self, values: values.gather(1, self.places - 1))


def logprobs_a_token_late(patch):
    def late(self, values):
        return values.gather(1, (self.places + 1).clamp(max=values.shape[1] - 1))

    patch.setattr(rollout.MicroBatch, "of_answers", late)


def score_on_a_pad(patch):
    paid = ppo.token_rewards
    patch.setattr(ppo, "token_rewards", lambda kl, scores, mask, beta: paid(kl, torch.zeros_like(scores), mask, beta))


def score_on_every_token(patch):
    paid = ppo.token_rewards

    def everywhere(kl, scores, mask, beta):
        return torch.where(mask, paid(kl, torch.zeros_like(scores), mask, beta) + scores[:, None], 0.0)

    patch.setattr(ppo, "token_rewards", everywhere)


def whitening_over_padding(patch):
    white = ppo.whiten
    patch.setattr(ppo, "whiten", lambda values, mask, **given: white(values, torch.ones_like(mask), **given))


def prompts_padded_on_the_right(patch):
    def prefill(self, answers):
        longest = max(len(answer.prompt) for answer in answers)
        padded = torch.tensor([answer.prompt + [0] * (longest - len(answer.prompt)) for answer in answers])
        plan = self.cache.plan_prefill([len(answer.prompt) for answer in answers], self.device)
        return self._join(answers, self._forward(padded, self.cache, *plan))

    patch.setattr(decoding.Decoder, "prefill", prefill)


def no_position_ids(patch):
    made = decoding.Decoder.__init__

    def without_positions(self, model):
        made(self, model)
        self._takes_positions = False

    patch.setattr(decoding.Decoder, "__init__", without_positions)


def dropout(patch):
    placed = doctor_run.ppo_models.place

    def with_dropout(*args):
        parts = placed(*args)
        for module in parts["actor"].model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return parts

    patch.setattr(doctor_run.ppo_models, "place", with_dropout)


def temperature_missing(patch):
    scored = experience.token_logprobs
    patch.setattr(experience, "token_logprobs", lambda *a, **k: scored(*a, **{**k, "temperature": 1.0}))


def k3_flipped(patch):
    estimate = ppo.kl_estimate
    patch.setattr(ppo, "kl_estimate", lambda logprobs, reference, name: estimate(reference, logprobs, name))


def values_a_token_late(patch):
    patch.setattr(rollout.MicroBatch, "of_states", lambda self, values: values.gather(1, self.places))


def values_a_token_early(patch):
    patch.setattr(
        rollout.MicroBatch, "of_states", lambda self, values: values.gather(1, (self.places - 2).clamp(min=0))
    )


def stop_token_outside_of_the_mask(patch):
    loss = ppo.policy_loss_sum

    def without_the_last(logprobs, old, advantages, mask, clip):
        return loss(logprobs, old, advantages, mask & (mask.cumsum(1) < mask.sum(1, keepdim=True)), clip)

    patch.setattr(ppo, "policy_loss_sum", without_the_last)


def prompts_of_the_first_rollout_again(patch):
    def standing(count, size, seed, cursor):
        return next_prompts(count, size, seed, cursor)[0], cursor

    patch.setattr(rl_run, "next_prompts", standing)


def experience_of_the_first_rollout_again(patch):
    made = []
    patch.setattr(doctor_run, "collect", lambda *given: made[0] if made else made.append(collect(*given)) or made[0])


def reference_that_is_updated(patch):
    built = doctor_run.build_learner

    def shared(*args):
        learner = built(*args)
        learner.reference = learner.actor.model
        return learner

    patch.setattr(doctor_run, "build_learner", shared)


ASSERTED, FOUND = (RuntimeError, "log-probability"), (AssertionError, None)
MUTANTS = {  # the thirteen bugs: [(mutant, what catches it, how)]
    "log-probabilities shifted": [
        (logprobs_a_token_early, assertions, ASSERTED),
        (logprobs_a_token_late, assertions, ASSERTED),
    ],
    "score on a pad": [(score_on_a_pad, trade_off, FOUND)],
    "score on every token": [(score_on_every_token, trade_off, FOUND)],
    "whitening over padding": [(whitening_over_padding, whitened, FOUND)],
    "prompts padded on the right": [(prompts_padded_on_the_right, assertions, ASSERTED)],
    "no position ids": [(no_position_ids, assertions, ASSERTED)],
    "live dropout": [(dropout, assertions, ASSERTED)],
    "temperature missing in training": [(temperature_missing, assertions, ASSERTED)],
    "k3 flipped": [(k3_flipped, paid_kl, FOUND)],
    "values off by one": [
        (values_a_token_late, value_of_states, FOUND),
        (values_a_token_early, value_of_states, FOUND),
    ],
    "stop token outside of the mask": [(stop_token_outside_of_the_mask, stopping, FOUND)],
    "stale batch": [
        (prompts_of_the_first_rollout_again, every_prompt, FOUND),
        (experience_of_the_first_rollout_again, trade_off, (RuntimeError, "ratio should be 1")),
    ],
    "reference that is updated": [(reference_that_is_updated, trade_off, FOUND)],
}
CASES = [pytest.param(*case, id=f"{bug}-{case[0].__name__}") for bug, cases in MUTANTS.items() for case in cases]


@pytest.mark.parametrize(
    "detector", [assertions, trade_off, stopping, value_of_states, every_prompt, paid_kl, whitened]
)
def test_nothing_is_found_as_it_stands(detector):
    detector()


@pytest.mark.parametrize(("mutate", "detector", "finding"), CASES)
def test_a_known_bug_is_caught(mutate, detector, finding, monkeypatch):
    mutate(monkeypatch)
    error, words = finding
    with pytest.raises(error, match=words):
        detector()


def test_there_are_thirteen():
    assert len(MUTANTS) == 13
