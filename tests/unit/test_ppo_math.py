"""PPO's mathematics against tables worked out by hand and loops over single numbers."""

import math

import pytest
import torch
from megalith.rlhf.ppo_math import (
    Moments,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    next_kl_coef,
    policy_loss_sum,
    ptx_weights,
    shaped_scores,
    token_rewards,
    value_loss_sum,
    whiten,
)

NAN = float("nan")
LENGTHS = (5, 1, 3)


def rollout(seed=0, width=5):
    """A mask from LENGTHS, and [3, width] numbers that are NaN where it is False."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]

    def numbers(scale=1.0):
        return torch.where(mask, scale * torch.randn(len(LENGTHS), width, generator=generator), NAN)

    return mask, numbers


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=tolerance)


# Rewards and advantages


def test_rewards_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [0.25, NAN, NAN]])
    rewards = token_rewards(kl, torch.tensor([3.0, -1.0]), mask, beta=0.1)
    close(rewards, [[-0.05, 0.1, 2.8], [-1.025, 0.0, 0.0]])


def test_a_row_of_rewards_adds_up_to_score_minus_kl():
    mask, numbers = rollout()
    kl, scores = numbers(), torch.tensor([1.0, -2.0, 0.5])
    close(token_rewards(kl, scores, mask, 0.3).sum(1), scores - 0.3 * kl.nansum(1))


def test_an_episode_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="episode 1 has no answer token"):
        token_rewards(torch.zeros(2, 2), torch.zeros(2), torch.tensor([[True, True], [False, False]]), 0.1)


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5: δ = (1 + 0.5·2 - 1, 0 + 0.5·4 - 2, 8 - 4) = (1, 0, 4); A = (1 + ¼·1, 0 + ¼·4, 4).
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards, values = torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    close(advantages, [[1.25, 1.0, 4.0]])
    close(returns, [[2.25, 3.0, 8.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_its_definition(gamma, lam):
    mask, numbers = rollout()
    rewards, values = numbers(), numbers()
    expected = torch.zeros(3, 5)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            for k in range(t, length):
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                delta = rewards[row, k].item() + gamma * following - values[row, k].item()
                expected[row, t] += (gamma * lam) ** (k - t) * delta
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0.0))


def test_lambda_one_is_the_return_minus_the_value_and_columns_of_padding_change_nothing():
    mask, numbers = rollout()
    rewards, values = numbers(), numbers()
    advantages, _ = gae(rewards, values, mask, 1.0, 1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(advantages, torch.where(mask, to_go - values, 0.0))

    wider, pad = torch.nn.functional.pad(mask, (0, 4)), (0, 4)
    padded, _ = gae(
        torch.nn.functional.pad(rewards, pad, value=NAN), torch.nn.functional.pad(values, pad, value=7.0), wider, 1.0, 1
    )
    assert torch.equal(padded[:, :5], advantages)
    assert not padded[:, 5:].any()


def test_a_perfect_critic_of_a_constant_reward_leaves_no_advantage():
    mask, _ = rollout()
    rewards = token_rewards(torch.zeros(3, 5), torch.full((3,), 2.0), mask, 0.1)
    advantages, _ = gae(rewards, torch.full((3, 5), 2.0), mask, 1.0, 0.95)
    close(advantages, torch.zeros(3, 5))


# Whitening, KL


def test_whitening_is_over_the_mask_alone():
    mask, numbers = rollout()
    values = numbers(5.0)
    whitened = whiten(values, mask)
    chosen = [values[row, t].item() for row, length in enumerate(LENGTHS) for t in range(length)]
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((value - mean) ** 2 for value in chosen) / len(chosen))
    close(whitened[mask], [(value - mean) / std for value in chosen])
    assert not whitened[~mask].any()
    close(whiten(values, mask, keep_mean=True)[mask].mean(), mean)


def test_whitening_one_token_gives_zero():
    mask = torch.tensor([[True, False]])
    assert torch.equal(whiten(torch.tensor([[3.0, NAN]]), mask), torch.zeros(1, 2))


def test_kl_estimators_by_hand():
    logprobs, reference = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.4]))
    close(kl_estimate(logprobs, reference, "k1"), [math.log(2), -math.log(2)])
    close(kl_estimate(logprobs, reference, "k2"), [math.log(2) ** 2 / 2] * 2)
    close(kl_estimate(logprobs, reference, "k3"), [0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])
    with pytest.raises(ValueError, match="estimator='k4'"):
        kl_estimate(logprobs, reference, "k4")


def test_kl_estimators_have_the_right_expectation():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 9, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):  # under the policy p, not under the reference
        close((p.exp() * kl_estimate(p, q, estimator)).sum(), exact, 1e-12)
    assert (kl_estimate(p, q, "k3") >= 0).all()
    assert (kl_estimate(p, q, "k1") < 0).any()
    assert not kl_estimate(p, p, "k3").any()


def test_the_adaptive_coefficient():
    assert next_kl_coef(0.1, 6.0, target=6.0, horizon=1000, episodes=100) == pytest.approx(0.1)
    assert next_kl_coef(0.1, 6.6, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_kl_coef(0.1, 60.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert next_kl_coef(0.1, -1.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


# Losses


def test_the_policy_loss_against_a_loop():
    mask, numbers = rollout()
    old, advantages = numbers(), numbers()
    new = (old + 0.4 * numbers()).requires_grad_()
    result = policy_loss_sum(new, old, advantages, mask, clip=0.2)
    result.loss.backward()
    loss = approx_kl = 0.0
    clipped = 0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = math.exp(new[row, t].item() - old[row, t].item())
            advantage = advantages[row, t].item()
            bounded = min(max(ratio, 0.8), 1.2)
            loss += -min(ratio * advantage, bounded * advantage)
            approx_kl += ratio - 1 - math.log(ratio)
            stopped = bounded * advantage < ratio * advantage
            clipped += stopped
            assert new.grad[row, t].item() == pytest.approx(0.0 if stopped else -ratio * advantage, rel=1e-5)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.approx_kl.item() == pytest.approx(approx_kl, rel=1e-5)
    assert 0 < result.clipped.item() == clipped < int(mask.sum())
    assert not new.grad[~mask].any()


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_advantage():
    mask, numbers = rollout()
    old, advantages = numbers(), numbers()
    new = old.clone().requires_grad_()
    result = policy_loss_sum(new, old, advantages, mask)
    result.loss.backward()
    assert result.approx_kl == result.clipped == result.excess == result.excess_squared == 0
    close(new.grad[mask], -advantages[mask])


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_value_loss_against_a_loop(clip):
    mask, numbers = rollout()
    old, returns = numbers(), numbers()
    new = (old + 0.4 * numbers()).requires_grad_()
    result = value_loss_sum(new, old, returns, mask, clip)
    result.loss.backward()
    loss, count = 0.0, 0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            value, before, target = (x[row, t].item() for x in (new, old, returns))
            bounded = value if clip is None else before + min(max(value - before, -clip), clip)
            loss += max((value - target) ** 2, (bounded - target) ** 2) / 2
            count += (bounded - target) ** 2 > (value - target) ** 2
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.clipped.item() == count
    assert torch.isfinite(new.grad[mask]).all() and not new.grad[~mask].any()


def test_ptx_weights():
    assert ptx_weights(0.9, "convex") == pytest.approx((0.1, 0.9))
    assert ptx_weights(0.05, "additive") == (1.0, 0.05)
    with pytest.raises(ValueError, match="mix='sum'"):
        ptx_weights(0.1, "sum")


# Scores


def test_scores_are_normalised_then_clipped_then_punished():
    scores, stopped = torch.tensor([4.0, 30.0, 2.0]), torch.tensor([True, True, False])
    moments = Moments(2, mean=2.0, squares=8.0)
    assert moments.std == 2.0
    close(shaped_scores(scores, stopped, clip=5.0, missing_eos_penalty=1.0, moments=moments), [1.0, 5.0, -1.0])
    close(shaped_scores(scores, stopped), scores)


def test_moments_are_those_of_all_scores():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) + 3 for n in (1, 7, 20)]
    moments = Moments()
    assert moments.std == 1.0
    for part in parts:
        moments = moments.merged(part)
    scores = torch.cat(parts).double()
    assert moments.count == 28
    assert moments.mean == pytest.approx(scores.mean().item(), abs=1e-12)
    assert moments.std == pytest.approx(scores.std(unbiased=False).item(), abs=1e-12)


def test_explained_variance():
    mask, numbers = rollout()
    returns = numbers()
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((3, 5), 4.0), returns, mask) == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(explained_variance(returns, torch.ones(3, 5), mask))


def test_group_advantages():
    scores, groups = torch.tensor([1.0, 5.0, 3.0, 7.0, 5.0]), torch.tensor([0, 1, 0, 1, 1])
    close(group_advantages(scores, groups, scale=False), [-1.0, -2 / 3, 1.0, 4 / 3, -2 / 3])
    std = math.sqrt((4 / 9 + 16 / 9 + 4 / 9) / 3) + 1e-4
    close(group_advantages(scores, groups), [-1 / 1.0001, -2 / 3 / std, 1 / 1.0001, 4 / 3 / std, -2 / 3 / std])
    assert not group_advantages(torch.tensor([2.0, 2.0]), torch.tensor([0, 0])).any()
