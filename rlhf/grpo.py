"""The second half of an iteration of GRPO: an answer is as good as it is better than the others to the same prompt.

    for prompts in …:  # each `num_generations` times in a row
        experience = collect(learner, prompts)
        metrics = learn(learner, experience)

No critic: every token of an answer has its answer's advantage, and the KL to the reference (k3) is a term of the loss.
That term's gradient is the one of KL(reference ‖ policy), not of what PPO pays for, so their optima differ.
Sources: Shao et al., "DeepSeekMath" (2024), §4.1; Liu et al., "Understanding R1-Zero-Like Training" (2025).
"""

import time

import torch

from .ppo import describe, paid_scores, timed, train_epochs
from .ppo_math import group_advantages, kl_estimate


def learn(learner, experience):
    """Train the policy on an Experience whose prompts stand `num_generations` times in a row; returns the metrics of
    the iteration. A collective."""
    start = time.perf_counter()
    rollout, args = experience.rollout, learner.ppo_args
    kl = kl_estimate(experience.logprobs, experience.ref_logprobs, "k3")
    paid = paid_scores(learner, experience)
    groups = torch.arange(len(rollout)) // args.num_generations
    of_answers = group_advantages(paid, groups, args.scale_rewards)
    advantages = torch.where(rollout.mask, of_answers[:, None], 0.0)

    described = describe(learner, experience, paid, kl)
    weights = row_weights(rollout.lengths, args.loss_average, learner.rollout_args.max_new_tokens)
    outcome = train_epochs(learner, experience, advantages, kl_weight=learner.kl_coef, row_weights=weights)
    spread = paid.view(-1, args.num_generations).std(1, unbiased=False)
    equal = {"val/equal_groups": (spread == 0).double().mean().item()}  # from which there is nothing to learn
    return {**described, **outcome, **equal, **timed(experience, start)}


def row_weights(lengths, average, max_new_tokens):
    """What the sums over answers of `lengths` int64 [B] are multiplied by before their mean is taken, [B]: 1/length for
    "sequence", 1/max_new_tokens for "constant"; None for "token", where all tokens are averaged at once."""
    if average == "token":
        return None
    if average == "sequence":
        return 1.0 / lengths
    if average == "constant":
        return torch.full(lengths.shape, 1.0 / max_new_tokens)
    raise ValueError(f"average={average!r}: must be 'token', 'sequence' or 'constant'")
