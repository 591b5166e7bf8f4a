"""The second half of an iteration of PPO: token rewards, advantages, epochs of minibatches.

    for prompts in …:
        experience = collect(learner, prompts)  # answers, scores, log-probabilities, values
        metrics = learn(learner, experience)

`train_ppo` is the command around these two calls, `trainer` the Python interface; tests and the doctor run them too.
"""

import time

import torch
import torch.distributed as dist

from .batches import epoch_order
from .experience import answer_logprobs, answer_values, check_drift
from .ppo_math import (
    explained_variance,
    gae,
    kl_estimate,
    next_kl_coef,
    policy_loss_sum,
    ptx_weights,
    shaped_scores,
    token_rewards,
    value_loss_sum,
    whiten,
)


def learn(learner, experience):
    """Train actor and critic on an Experience; returns the metrics of the iteration. A collective."""
    start = time.perf_counter()
    rollout, args = experience.rollout, learner.ppo_args
    mask = rollout.mask
    kl = kl_estimate(experience.logprobs, experience.ref_logprobs, learner.reward_args.kl_estimator)
    paid = _paid_scores(learner, experience)
    rewards = token_rewards(kl, paid, mask, learner.kl_coef)
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages, returns = gae(rewards, experience.values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask)

    totals, updates, stopped_early = {}, 0, False
    for rows in _minibatches(learner, len(rollout)):
        sums = _train_minibatch(learner, experience, rows, advantages, returns)
        if updates == 0:
            _check_first(learner, sums)
        tokens = sum(len(rollout.answers[row].ids) for row in rows)
        if args.stop_kl is not None and sums["approx_kl"] / tokens > args.stop_kl:
            stopped_early = True
            for part in (learner.actor, learner.critic):
                part.optimizer.zero_grad()
            break
        for part in _trained_now(learner):
            part.optimizer.step()
            part.optimizer.zero_grad()
        if learner.average is not None and learner.actor in _trained_now(learner):
            learner.average.update()
        updates += 1
        for name, value in {**sums, "tokens": tokens}.items():
            totals[name] = totals.get(name, 0.0) + value
    rate = learner.actor.scheduler.get_last_lr()[0]
    for part in _trained_now(learner):
        part.scheduler.step()

    metrics = _metrics(learner, experience, kl, paid, returns, totals, updates)
    if learner.reward_args.kl_target is not None:
        sequence_kl = metrics["objective/kl"]
        target, horizon = learner.reward_args.kl_target, learner.reward_args.kl_horizon
        learner.kl_coef = next_kl_coef(learner.kl_coef, sequence_kl, target, horizon, len(rollout))
    learner.iteration += 1
    elapsed_s = time.perf_counter() - start
    total_s = elapsed_s + sum(experience.timing.values())
    return {
        **metrics,
        "policy/stopped_early": int(stopped_early),
        "lr": rate,
        **experience.timing,
        "timing/ppo_train": elapsed_s,
        "timing/step_total": total_s,
        "eps": len(rollout) / total_s,
        "tokens_per_s": int(mask.sum()) / total_s,
    }


def _paid_scores(learner, experience):
    args = learner.reward_args
    if args.normalize_scores:
        learner.moments = learner.moments.merged(experience.scores)
    moments = learner.moments if args.normalize_scores else None
    stopped = experience.rollout.stopped
    return shaped_scores(experience.scores, stopped, args.score_clip or None, args.missing_eos_penalty, moments)


def _minibatches(learner, count):
    """The rows of each minibatch: an order of its own for every epoch, the same on every rank."""
    size = learner.ppo_args.train_batch_size * learner.ranks.world_size
    epochs = learner.ppo_args.ppo_epochs
    for epoch in range(learner.iteration * epochs, (learner.iteration + 1) * epochs):
        order = epoch_order(count, learner.seed + 1, epoch).tolist()  # the seed itself orders the prompts
        yield from (order[start : start + size] for start in range(0, count, size))


def _trained_now(learner):
    warm = learner.iteration >= learner.ppo_args.critic_warmup
    return [learner.actor, learner.critic] if warm else [learner.critic]


def _train_minibatch(learner, experience, rows, advantages, returns):
    """Gradients of actor and critic over `rows`; sums over all ranks, and the largest drifts, as floats."""
    rollout, args, ranks = experience.rollout, learner.ppo_args, learner.ranks
    micros = list(rollout.micro_batches(rows, learner.micro_batch_size, learner.pad_id, ranks))
    tokens = sum(len(rollout.answers[row].ids) for row in rows)
    # The engine averages gradients over the ranks; what is wanted is the sum over the tokens of the minibatch.
    scale = ranks.world_size / tokens
    sums, drifts = torch.zeros(8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def part_of(values, micro):
        return values[micro.rows, : micro.mask.shape[1]].to(ranks.device)

    if learner.actor in _trained_now(learner):
        learner.actor.model.train()
        ppo_weight, ptx_weight = ptx_weights(args.ptx_coef, args.ptx_mix) if learner.ptx else (1.0, 0.0)
        for micro in micros:
            logprobs, entropy = answer_logprobs(learner.actor.model, micro, learner)
            old = part_of(experience.logprobs, micro)
            policy = policy_loss_sum(logprobs, old, part_of(advantages, micro), micro.mask, args.clip)
            learner.actor.optimizer.backward(policy.loss * (scale * ppo_weight))
            drift = (logprobs.detach() - old).abs()[micro.mask]
            sums[:6] += torch.stack([*(x.detach().double() for x in policy), entropy[micro.mask].double().sum()]).cpu()
            drifts[0] = max(drifts[0], drift.max().item() if len(drift) else 0.0)
        if ptx_weight:
            learner.ptx.backward(learner.actor, ptx_weight)
    learner.critic.model.train()
    for micro in micros:
        values, old = answer_values(learner.critic.model, micro), part_of(experience.values, micro)
        value = value_loss_sum(values, old, part_of(returns, micro), micro.mask, args.value_clip or None)
        learner.critic.optimizer.backward(value.loss * scale)
        drift = ((values.detach() - old).abs() / (1 + old.abs()))[micro.mask]
        sums[6:] += torch.stack([x.detach().double() for x in value]).cpu()
        drifts[1] = max(drifts[1], drift.max().item() if len(drift) else 0.0)
    if ranks.world_size > 1:
        sums, drifts = sums.to(ranks.device), drifts.to(ranks.device)
        dist.all_reduce(sums)
        dist.all_reduce(drifts, dist.ReduceOp.MAX)
    names = ("policy", "approx_kl", "clipped", "ratio", "ratio_squared", "entropy", "value", "value_clipped")
    return {**dict(zip(names, sums.tolist(), strict=True)), "drift": drifts[0].item(), "value_drift": drifts[1].item()}


def _check_first(learner, sums):
    """On the first minibatch nothing has changed yet: the ratio is 1, and the values are those of the rollout."""
    check_drift(
        learner,
        sums["drift"],
        f"on the first minibatch the probability ratio should be 1, but a log-probability moved by {sums['drift']:.3g} "
        "since the rollout: dropout, another temperature, or weights that changed in between",
    )
    check_drift(
        learner,
        sums["value_drift"],
        f"on the first minibatch the values should be the rollout's, but one moved by {sums['value_drift']:.3g}: "
        "dropout, another slice of the tokens, or weights that changed in between",
    )


def _metrics(learner, experience, kl, paid, returns, totals, updates):
    """Numbers of an iteration by the names that TRL gave them: `objective/` per answer, `policy/`, `loss/` and `val/`
    per answer token, all masked, over all ranks."""
    rollout, mask = experience.rollout, experience.rollout.mask
    tokens = max(totals.get("tokens", 0), 1)
    ratio = totals.get("ratio", 0.0) / tokens
    k1 = torch.where(mask, experience.logprobs - experience.ref_logprobs, 0.0)
    cost = learner.kl_coef * torch.where(mask, kl, 0.0).sum(1)
    return {
        "objective/kl": k1.sum(1).mean().item(),
        "objective/entropy": -experience.logprobs.sum(1).mean().item(),
        "objective/non_score_reward": -cost.mean().item(),
        "objective/rlhf_reward": (paid - cost).mean().item(),
        "objective/scores": experience.scores.mean().item(),
        "objective/scores_std": experience.scores.std(unbiased=False).item(),
        "objective/kl_coef": learner.kl_coef,
        "policy/approxkl_avg": totals.get("approx_kl", 0.0) / tokens,
        "policy/clipfrac_avg": totals.get("clipped", 0.0) / tokens,
        "policy/entropy_avg": experience.entropy[mask].mean().item(),
        "loss/policy_avg": totals.get("policy", 0.0) / tokens,
        "loss/value_avg": totals.get("value", 0.0) / tokens,
        **({"loss/ptx": learner.ptx.loss} if learner.ptx is not None else {}),
        "val/ratio": ratio,
        "val/ratio_var": max(totals.get("ratio_squared", 0.0) / tokens - ratio**2, 0.0),
        "val/clipfrac_avg": totals.get("value_clipped", 0.0) / tokens,
        "val/explained_variance": explained_variance(experience.values, returns, mask),
        "val/num_eos_tokens": int(rollout.stopped.sum()),
        "val/truncated": int((~rollout.stopped).sum()),
        "val/length": rollout.lengths.double().mean().item(),
        "updates": updates,
        "grad_norm": learner.actor.optimizer.grad_norm,
        "critic_grad_norm": learner.critic.optimizer.grad_norm,
    }
