"""The first half of an iteration: answers, and what every model says of them.

experience = collect(learner, prompts)
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from .decoding import check_prompt
from .errors import InputError
from .logprobs import token_logprobs
from .lora import adapters_off
from .reward_model import normalized
from .rewards import call_reward
from .rollout import Rollout, sample, share

DRIFT = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far log-probabilities and values (relative to their size) of one state may be apart, computed twice."""


@dataclass(frozen=True)
class Experience:
    """A rollout with what the models say of it. [B] and [B, T] float32 on the CPU, the same on every rank."""

    rollout: Rollout
    scores: torch.Tensor  # [B], raw
    logprobs: torch.Tensor  # [B, T], of the policy that sampled, computed as in training or by the sampler
    ref_logprobs: torch.Tensor  # [B, T]; the policy's own where there is no reference
    values: torch.Tensor | None
    """[B, T], of the state before each token; 0 without a critic. None: the first update brings them."""
    timing: dict


# A rollout


def collect(learner, prompts):
    """Answer `prompts` (those of all ranks, the same list on each) and have the answers judged; an Experience.

    A collective. Raises RuntimeError on every rank where a reward function fails on any.
    """
    if len(prompts) % learner.ranks.world_size:
        raise InputError(f"{len(prompts)} prompts cannot be shared out evenly to {learner.ranks.world_size} ranks")
    start = time.perf_counter()
    rollout = _answered(learner, prompts)
    generated = time.perf_counter()
    size, pad_id, ranks = learner.micro_batch_size, learner.pad_id, learner.ranks

    def judged(function):
        return rollout.map(function, size, pad_id, ranks)

    if learner.scores_own_answers:
        [logprobs] = judged(lambda micro: answer_logprobs(learner.actor.model, micro, learner)[:1])
        _check_sampler(learner, rollout, logprobs)
    else:  # `ppo` compares them with its first minibatch's
        logprobs = rollout.sampler_logprobs
    ref_logprobs = logprobs
    if learner.uses_reference:
        with nullcontext(learner.reference) if learner.reference else adapters_off(learner.actor.model) as reference:
            [ref_logprobs] = judged(lambda micro: answer_logprobs(reference, micro, learner)[:1])
    values = torch.zeros_like(logprobs)
    if learner.values_come_with_update(len(rollout)):
        values = None
    elif learner.critic is not None:
        [values] = judged(lambda micro: [answer_values(learner.critic.model, micro, learner.value_statistics)])
    if isinstance(learner.reward, torch.nn.Module):
        [scores] = judged(lambda micro: [last_scores(learner.reward, micro)])
    else:
        scores = torch.tensor([answer.score for answer in rollout.answers])
    check_finite(scores, "the reward model's score")
    check_finite(ref_logprobs, "the reference's log-probability")
    if values is not None:
        check_finite(values, "the critic's value")
    timing = {
        "timing/generation": generated - start,
        "timing/make_experience": time.perf_counter() - generated,
    }
    return Experience(rollout, scores, logprobs, ref_logprobs, values, timing)


def _answered(learner, prompts):
    """Sample answers to this rank's prompts, ask the reward function, and share both with the other ranks."""
    ranks = learner.ranks
    rows = range(ranks.rank, len(prompts), ranks.world_size)
    mine, error = [], None
    for prompt in prompts:  # those of all ranks, so that all raise
        check_prompt(learner.actor.model, prompt.ids, learner.rollout_args.new_tokens(prompt))
    try:
        mine = sample(learner, [prompts[row] for row in rows], rows)
    except FloatingPointError as caught:  # after any other error, this rank may be out of step with those that stream
        error = caught
    if error is None and not isinstance(learner.reward, torch.nn.Module):
        try:
            scores = _ask(learner, [prompts[row] for row in rows], mine)
            mine = [replace(answer, score=score) for answer, score in zip(mine, scores, strict=True)]
        except Exception as caught:  # the user's function may raise anything, and the other ranks have to hear of it
            error = caught
    shared = share(mine, error, ranks)
    return Rollout(prompts, [shared[row % ranks.world_size][row // ranks.world_size] for row in range(len(prompts))])


def _ask(learner, prompts, answers):
    """The reward function's scores of this rank's answers."""
    decode = learner.decode or (lambda ids: list(ids))
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for prompt in prompts for name in prompt.columns}
    given = {
        "prompts": [decode(prompt.ids) if prompt.text is None else prompt.text for prompt in prompts],
        "completions": [decode(answer.ids[:-1] if answer.stopped else answer.ids) for answer in answers],
        "prompt_ids": [list(prompt.ids) for prompt in prompts],
        "completion_ids": [answer.ids for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }
    return call_reward(learner.reward, {**columns, **given}, len(answers))


def answer_logprobs(model, micro, learner, with_entropy=False):
    """(log-probabilities, entropies or None) of a micro-batch's answer tokens, float32 [b, t]."""
    temperature = learner.rollout_args.temperature
    given = {"temperature": temperature, "most_scored": micro.most_scored, "with_entropy": with_entropy}
    logprobs, entropy = token_logprobs(model, micro.input_ids, micro.scored, **given)
    return micro.of_answers(logprobs), micro.of_answers(entropy) if with_entropy else None


def answer_values(critic, micro, statistics=(0.0, 1.0)):
    """Values of the states before a micro-batch's answer tokens, float32 [b, t]. `statistics`: see `Learner`."""
    return normalized(micro.of_states(critic(micro.input_ids)), statistics)


def last_scores(reward_model, micro):
    """Scores [b] at the last token of each answer."""
    scores = micro.of_answers(reward_model(micro.input_ids))
    last = (micro.mask.sum(1) - 1).clamp(min=0)
    return scores.gather(1, last[:, None])[:, 0]


def check_finite(values, what):
    """Raises RuntimeError where a model says NaN or infinity of an episode: every update would be skipped from there
    on. values: [B] or [B, T]."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        raise RuntimeError(
            f"episode {int(bad[0, 0])}: {what} is {values[tuple(bad[0])]:g}: look at that model's weights, and at how "
            "far --precision reaches"
        )


def _check_sampler(learner, rollout, logprobs):
    """The sampler and the trainer must mean the same policy."""
    difference = torch.where(rollout.mask, (rollout.sampler_logprobs - logprobs).abs(), 0.0)
    worst = int(difference.argmax())
    row, token = divmod(worst, difference.shape[1])
    check_drift(
        learner,
        float(difference[row, token]),
        f"episode {row}, answer token {token}: its log-probability is {rollout.sampler_logprobs[row, token]:.6f} to "
        f"the sampler and {logprobs[row, token]:.6f} to the trainer, and they should be one policy: "
        "look at the temperature and filters of sampling, position ids, the padding's mask and the cache",
    )


def check_drift(learner, drift, message):
    """Raises RuntimeError in fp32, warns in a half precision, where rounding alone can be large."""
    dtype = next(p.dtype for p in learner.actor.model.parameters() if p.is_floating_point())
    if drift <= DRIFT[dtype]:
        return
    if dtype == torch.float32 or not math.isfinite(drift):
        raise RuntimeError(message)
    if learner.ranks.is_first:
        print(f"warning: {message}", flush=True)
