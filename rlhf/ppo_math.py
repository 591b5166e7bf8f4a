"""The mathematics of PPO on language models, as pure functions of tensors.

B: episodes, T: answer tokens of the longest episode. Everything of shape [B, T] is aligned to the answers: column t is
the answer's token t, and `mask` bool [B, T] is True on real tokens, the stop token included, which come first in every
row. What lies where the mask is False is never read, so it may be anything, NaN included.

Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017); "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (2016); "Approximating KL Divergence" (2020); Ziegler et al., "Fine-Tuning Language
Models from Human Preferences" (2019); Ouyang et al., "Training language models to follow instructions" (2022).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


def kl_estimate(logprobs, ref_logprobs, estimator="k1"):
    """Per-token estimates of KL(policy ‖ reference) from the policy's own samples, in nats; any shape.

    With d = ref_logprobs - logprobs: k1 = -d (unbiased, may be negative), k2 = d²/2 (biased, never negative),
    k3 = e^d - 1 - d (unbiased and never negative).
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return d.expm1() - d
    raise ValueError(f"estimator={estimator!r}: must be 'k1', 'k2' or 'k3'")


def token_rewards(kl, scores, mask, beta):
    """r[b, t] = -β kl[b, t], plus scores[b] at the last real token of row b; [B, T], 0 outside of the mask.

    So the sum of a row is its score minus β times its KL. kl [B, T], scores [B]. Raises ValueError for a row without
    tokens, which would have nowhere to put its score.
    """
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError(f"episode {int((lengths == 0).nonzero()[0])} has no answer token to pay its score on")
    rewards = torch.where(mask, -beta * kl, 0.0)
    rows = torch.arange(len(scores), device=mask.device)
    rewards[rows, lengths - 1] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (advantages, returns), both [B, T] and 0 outside of the mask.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1}, where V and A after the last real token are 0: a truncated
    answer counts as ended. returns = A + V. `values[b, t]` is the value of the state before token t.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Columns after the end are 0 in rewards and values, and so stay 0 here.
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(values, mask, keep_mean=False, epsilon=1e-8):
    """(values - mean) / sqrt(variance + ε) over all tokens of the mask at once; [B, T], 0 outside of it.

    Every rank holds the rollout of all of them, so these are global moments. `keep_mean` adds the mean back, as for
    rewards, whose sign matters. A single token gives 0 (its mean with `keep_mean`).
    """
    chosen = values[mask].double()
    mean = chosen.mean()
    scale = (chosen.var(unbiased=False) + epsilon).rsqrt()
    whitened = (chosen - mean) * scale + (mean if keep_mean else 0.0)
    return torch.zeros_like(values).masked_scatter(mask, whitened.to(values.dtype))


class PolicyLoss(NamedTuple):
    loss: torch.Tensor  # the rest are sums over tokens for logs, without gradients
    approx_kl: torch.Tensor
    clipped: torch.Tensor
    excess: torch.Tensor  # ρ - 1: its square keeps the digits that the square of ρ loses
    excess_squared: torch.Tensor


def policy_loss_sum(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """Clipped surrogate, summed over the tokens of the mask: Σ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) with
    ρ = exp(logprobs - old_logprobs).

    All [B, T]; the caller divides by the number of tokens of the whole minibatch. Where ρ lies outside of the clip
    range and moving further would gain, the gradient is exactly 0. approx_kl is k3 of KL(old ‖ new).
    """
    log_ratio = logprobs[mask] - old_logprobs[mask]
    ratio = log_ratio.exp()
    advantage = advantages[mask]
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        approx_kl = (log_ratio.expm1() - log_ratio).sum()
        hit = (clipped > plain).sum()
        excess = log_ratio.double().expm1()
    return PolicyLoss(torch.maximum(plain, clipped).sum(), approx_kl, hit, excess.sum(), excess.square().sum())


class ValueLoss(NamedTuple):
    loss: torch.Tensor
    clipped: torch.Tensor  # tokens


def value_loss_sum(values, old_values, returns, mask, clip=0.2):
    """½ Σ max((V - R)², (clip(V, V_old ± ε) - R)²) over the tokens of the mask, and how many were clipped. All [B, T].
    `clip` None: no clipping."""
    value, target = values[mask], returns[mask]
    plain = (value - target).square()
    if clip is None:
        return ValueLoss(0.5 * plain.sum(), torch.zeros((), dtype=torch.int64, device=plain.device))
    old = old_values[mask]
    clipped = (value.clamp(old - clip, old + clip) - target).square()
    return ValueLoss(0.5 * torch.maximum(plain, clipped).sum(), (clipped > plain).sum())


def next_kl_coef(beta, sequence_kl, target, horizon, episodes):
    """The adaptive controller of Ziegler et al. (2019), §2.2: β (1 + clip(KL/target - 1, ±0.2) episodes/horizon).

    sequence_kl: mean over the rollout of the KL summed over an answer, in nats; episodes: of all ranks.
    """
    error = min(max(sequence_kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def ptx_weights(coef, mix):
    """(weight of the PPO loss, weight of the pretraining loss). "additive", as InstructGPT: PPO + c·CE; "convex", as
    the announcement's code: (1 - c)·PPO + c·CE."""
    if mix == "additive":
        return 1.0, coef
    if mix == "convex":
        return 1.0 - coef, coef
    raise ValueError(f"mix={mix!r}: must be 'additive' or 'convex'")


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the tokens of the mask: 1 for a perfect critic, 0 for a constant
    one. NaN when the returns do not vary."""
    target = returns[mask].double()
    variance = target.var(unbiased=False)
    return float(1 - (target - values[mask].double()).var(unbiased=False) / variance) if variance > 0 else math.nan


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviations of all scores so far; merged exactly (Chan et al., 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values):
        """With the elements of a 1-D tensor added."""
        values = values.double()
        count = self.count + len(values)
        mean, difference = float(values.mean()), float(values.mean()) - self.mean
        squares = float((values - mean).square().sum()) + difference**2 * self.count * len(values) / count
        return Moments(count, self.mean + difference * len(values) / count, self.squares + squares)

    @property
    def std(self):
        """1 where nothing can be said yet."""
        return math.sqrt(self.squares / self.count) if self.count > 1 and self.squares > 0 else 1.0


def shaped_scores(scores, stopped, clip=None, missing_eos_penalty=0.0, moments=None):
    """What is paid for raw `scores` [B]: normalised by `moments`, then clipped to ±clip, then reduced by the penalty
    where the answer did not stop. `stopped` bool [B] tells which ended with a configured stop token."""
    if moments is not None:
        scores = (scores - moments.mean) / moments.std
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eos_penalty * (~stopped).to(scores.dtype)


def group_advantages(scores, groups, scale=True, epsilon=1e-4):
    """GRPO (Shao et al., 2024, §4.1): the score of each answer relative to those of the same prompt.

    scores [B], groups int64 [B] (which prompt); (score - mean of the group) / (std of the group + ε), or without the
    division (Liu et al., 2025, "Dr. GRPO"). A group of equal scores gives 0.
    """
    count = int(groups.max()) + 1
    sizes = torch.bincount(groups, minlength=count).double()
    values = scores.double()
    mean = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, values) / sizes
    centred = values - mean[groups]
    if scale:
        variance = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, centred.square()) / sizes
        centred = centred / (variance.sqrt()[groups] + epsilon)
    return centred.to(scores.dtype)
