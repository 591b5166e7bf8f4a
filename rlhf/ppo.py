"""The second half of an iteration of PPO: token rewards, advantages, epochs of minibatches.

    for prompts in …:
        experience = collect(learner, prompts)  # answers, scores, log-probabilities, values
        metrics = learn(learner, experience)

`train_ppo` is the command around these two calls, `trainer` the Python interface; tests and the doctor run them too.
What GRPO does otherwise is in `grpo`; its epochs are these.
"""

import time
from dataclasses import replace

import torch
import torch.distributed as dist

from .batches import epoch_order
from .experience import answer_logprobs, answer_values, check_drift, check_finite
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
from .reward_model import normalized


def learn(learner, experience):
    """Train actor and critic on an Experience; returns the metrics of the iteration. A collective."""
    start = time.perf_counter()
    args, mask = learner.ppo_args, experience.rollout.mask
    first_values = None
    if experience.values is None:
        values, first_values = _first_values(learner, experience.rollout)
        experience = replace(experience, values=values)
    kl = kl_estimate(experience.logprobs, experience.ref_logprobs, learner.reward_args.kl_estimator)
    paid = paid_scores(learner, experience)
    rewards = token_rewards(kl, paid, mask, learner.kl_coef)
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages, returns = gae(rewards, experience.values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask)

    described = describe(learner, experience, paid, kl)
    outcome = train_epochs(learner, experience, advantages, returns, first_values=first_values)
    if learner.reward_args.kl_target is not None:
        sequence_kl, episodes = described["objective/kl"], len(experience.rollout)
        target, horizon = learner.reward_args.kl_target, learner.reward_args.kl_horizon
        learner.kl_coef = next_kl_coef(learner.kl_coef, sequence_kl, target, horizon, episodes)
    explained = explained_variance(experience.values, returns, mask)
    return {**described, **outcome, "val/explained_variance": explained, **timed(experience, start)}


def _first_values(learner, rollout):
    """(values [B, T], the same of this rank's only micro-batch [b, t] with what their backward pass needs)."""
    learner.critic.model.train()
    passes = []

    def forward(micro):
        with torch.enable_grad():
            passes.append(answer_values(learner.critic.model, micro, learner.value_statistics))
        return [passes[-1].detach()]

    [values] = rollout.map(forward, learner.micro_batch_size, learner.pad_id, learner.ranks)
    check_finite(values, "the critic's value")
    return values, passes[0]


def train_epochs(learner, experience, advantages, returns=None, kl_weight=0.0, row_weights=None, first_values=None):
    """Every minibatch of every epoch, until the policy strays too far; returns what happened, per answer token. The
    learner's iteration ends here. A collective.

    advantages [B, T]; returns [B, T]: what a critic learns, where there is one; kl_weight: of the KL to the reference
    in the loss itself; row_weights [B]: the policy's loss is a mean over rows of their sums times these, instead of the
    mean over tokens; first_values [b, t]: the critic's forward pass of the first minibatch, where it was done.
    """
    args, answers = learner.ppo_args, experience.rollout.answers
    totals, updates, stopped_early = {}, 0, False
    for rows in _minibatches(learner, len(answers)):
        values = first_values if updates == 0 else None
        sums = _train_minibatch(learner, experience, rows, advantages, returns, kl_weight, row_weights, values)
        if updates == 0:
            _check_first(learner, sums)
        tokens = sum(len(answers[row].ids) for row in rows)
        if args.stop_kl is not None and sums.get("approx_kl", 0.0) / tokens > args.stop_kl:
            stopped_early = True
            for optimizer in _once(part.optimizer for part in learner.trained_now):
                optimizer.zero_grad()
            break
        skipped = learner.actor.optimizer.skipped_steps
        # A gradient that is not finite skips the step of its own model alone: policy and critic learn from numbers of
        # the rollout, which stay what they were, and each has its loss scale.
        for optimizer in _once(part.optimizer for part in learner.trained_now):
            optimizer.step()
            optimizer.zero_grad()
        has_moved = learner.actor in learner.trained_now and learner.actor.optimizer.skipped_steps == skipped
        if learner.average is not None and has_moved:
            learner.average.update()
        updates += 1
        for name, value in {**sums, "tokens": tokens}.items():
            totals[name] = totals.get(name, 0.0) + value
    rate = learner.actor.scheduler.get_last_lr()[0]
    for scheduler in _once(part.scheduler for part in learner.trained_now):
        scheduler.step()
    learner.iteration += 1
    return {**_outcome(learner, totals), "updates": updates, "policy/stopped_early": int(stopped_early), "lr": rate}


def _once(items):
    """Each item once: with a shared base, actor and critic have one optimizer."""
    return list({id(item): item for item in items}.values())


def _minibatches(learner, count):
    """The rows of each minibatch: an order of its own for every epoch, the same on every rank."""
    size = learner.ppo_args.train_batch_size * learner.ranks.world_size
    epochs = learner.ppo_args.ppo_epochs
    for epoch in range(learner.iteration * epochs, (learner.iteration + 1) * epochs):
        order = epoch_order(count, learner.seed + 1, epoch).tolist()  # the seed itself orders the prompts
        yield from (order[start : start + size] for start in range(0, count, size))


def _train_minibatch(learner, experience, rows, advantages, returns, kl_weight=0.0, row_weights=None, values=None):
    """Gradients of what is trained now over `rows`; sums over all ranks, and the largest drifts, by name."""
    args, ranks = learner.ppo_args, learner.ranks
    micros = list(experience.rollout.micro_batches(rows, learner.micro_batch_size, learner.pad_id, ranks))
    tokens = sum(len(experience.rollout.answers[row].ids) for row in rows)
    # The engine averages gradients over the ranks; what is wanted is the sum over the tokens of the minibatch.
    scale = ranks.world_size / tokens
    weights = None if row_weights is None else row_weights[:, None] * (tokens / len(rows))
    sums = {}
    if learner.critic is not None:  # first, so that activations of `values` go before those of the actor come
        sums |= _critic_gradients(learner, experience, micros, returns, scale, values)
    if learner.actor in learner.trained_now:
        ppo_weight, ptx_weight = ptx_weights(args.ptx_coef, args.ptx_mix) if learner.ptx else (1.0, 0.0)
        sums |= _actor_gradients(learner, experience, micros, advantages, scale * ppo_weight, kl_weight, weights)
        if ptx_weight:
            learner.ptx.backward(learner.actor, ptx_weight)
    return _over_ranks(sums, ranks)


def _actor_gradients(learner, experience, micros, advantages, scale, kl_weight, weights):
    """Add the gradients of `scale` times the policy loss, summed over the micro-batches' tokens; this rank's sums.
    weights [B, 1], or None for 1: of the rows, all above 0."""
    learner.actor.model.train()
    if weights is not None:
        advantages = advantages * weights  # the clipped loss is linear in what is above 0
    sums, drifts = torch.zeros(7, dtype=torch.float64), []
    for micro in micros:
        logprobs, entropy = answer_logprobs(learner.actor.model, micro, learner, with_entropy=True)
        old = micro.part_of(experience.logprobs)
        policy = policy_loss_sum(logprobs, old, micro.part_of(advantages), micro.mask, learner.ppo_args.clip)
        loss, ref_kl = policy.loss, torch.zeros(())
        if kl_weight:
            kl = kl_estimate(logprobs, micro.part_of(experience.ref_logprobs), "k3")
            ref_kl = (kl if weights is None else kl * micro.part_of(weights))[micro.mask].sum()
            loss = loss + kl_weight * ref_kl
        learner.actor.optimizer.backward(loss * scale)
        sums += torch.stack([x.detach().double().cpu() for x in (*policy, ref_kl, entropy[micro.mask].sum())])
        drifts.append((logprobs.detach() - old).abs()[micro.mask])
    names = ("policy", "approx_kl", "clipped", "excess", "excess_squared", "ref_kl", "entropy")
    return {**dict(zip(names, sums.tolist(), strict=True)), "drift": _largest(drifts)}


def _critic_gradients(learner, experience, micros, returns, scale, done=None):
    """The same of the value loss. `done`: values of the only micro-batch, where its forward pass was done already."""
    learner.critic.model.train()
    sums, drifts = torch.zeros(2, dtype=torch.float64), []
    for micro in micros:
        values = answer_values(learner.critic.model, micro, learner.value_statistics) if done is None else done
        old = micro.part_of(experience.values)
        value = value_loss_sum(values, old, micro.part_of(returns), micro.mask, learner.ppo_args.value_clip or None)
        learner.critic.optimizer.backward(value.loss * scale)
        sums += torch.stack([x.detach().double().cpu() for x in value])
        drifts.append(((values.detach() - old).abs() / (1 + old.abs()))[micro.mask])
    return {"value": sums[0].item(), "value_clipped": sums[1].item(), "value_drift": _largest(drifts)}


def _largest(parts):
    """Of 1-D tensors, which may be empty; NaN where there is any, unlike Python's max."""
    values = torch.cat(parts)
    return values.max().item() if len(values) else 0.0


def _over_ranks(sums, ranks):
    """The sums of all ranks, and of drifts the largest; `sums` has the same names on every rank."""
    if ranks.world_size == 1:
        return sums
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=ranks.device)
    every = [torch.empty_like(values) for _ in range(ranks.world_size)]
    dist.all_gather(every, values)
    every = torch.stack(every)
    is_drift = torch.tensor([name.endswith("drift") for name in sums], device=ranks.device)
    return dict(zip(sums, every.amax(0).where(is_drift, every.sum(0)).tolist(), strict=True))


def _check_first(learner, sums):
    """On the first minibatch nothing has changed yet: the ratio is 1, and the values are those of the rollout."""
    drift, value_drift = sums.get("drift", 0.0), sums.get("value_drift", 0.0)
    check_drift(
        learner,
        drift,
        f"on the first minibatch the probability ratio should be 1, but a log-probability moved by {drift:.3g} "
        "since the rollout: dropout, another temperature, weights that changed in between, or (with --old_logprobs "
        "sampler) a sampler of another policy",
    )
    check_drift(
        learner,
        value_drift,
        f"on the first minibatch the values should be the rollout's, but one moved by {value_drift:.3g}: "
        "dropout, another slice of the tokens, or weights that changed in between",
    )


# Numbers, by the names that TRL gave them: `objective/` per answer, `policy/`, `loss/` and `val/` per answer token, all
# masked, over all ranks.


def paid_scores(learner, experience):
    """What the answers are paid for, [B]; brings the running moments up to date."""
    args = learner.reward_args
    scores = normalized(experience.scores, learner.score_statistics)
    if args.normalize_scores:
        learner.moments = learner.moments.merged(scores)
    moments = learner.moments if args.normalize_scores else None
    stopped = experience.rollout.stopped
    return shaped_scores(scores, stopped, args.score_clip or None, args.missing_eos_penalty, moments)


def describe(learner, experience, paid, kl):
    """Metrics of a rollout. paid [B]: the shaped scores; kl [B, T]: what β is the price of."""
    rollout, mask = experience.rollout, experience.rollout.mask
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
        "val/num_eos_tokens": int(rollout.stopped.sum()),
        "val/truncated": int((~rollout.stopped).sum()),
        "val/length": rollout.lengths.double().mean().item(),
    }


def _outcome(learner, totals):
    """Metrics of the updates, from sums over all of them."""
    tokens = max(totals.get("tokens", 0), 1)
    mean = {name: value / tokens for name, value in totals.items()}
    excess = mean.get("excess", 0.0)  # of the probability ratio over 1
    of_critic = {}
    if learner.critic is not None:
        of_critic = {
            "loss/value_avg": mean.get("value", 0.0),
            "val/clipfrac_avg": mean.get("value_clipped", 0.0),
            "critic_grad_norm": learner.critic.optimizer.grad_norm,
            "critic_skipped_steps": learner.critic.optimizer.skipped_steps,
        }
    return {
        "policy/approxkl_avg": mean.get("approx_kl", 0.0),
        "policy/clipfrac_avg": mean.get("clipped", 0.0),
        "loss/policy_avg": mean.get("policy", 0.0),
        "loss/kl_avg": mean.get("ref_kl", 0.0),
        **({"policy/entropy_avg": mean["entropy"]} if "entropy" in mean else {}),
        **({"loss/ptx": learner.ptx.loss} if learner.ptx is not None else {}),
        "val/ratio": 1 + excess,
        "val/ratio_var": max(mean.get("excess_squared", 0.0) - excess**2, 0.0),
        "grad_norm": learner.actor.optimizer.grad_norm,
        "skipped_steps": learner.actor.optimizer.skipped_steps,
        **of_critic,
    }


def timed(experience, start):
    """The times of an iteration whose updates began at `start` (seconds of `time.perf_counter`)."""
    elapsed_s = time.perf_counter() - start
    total_s = elapsed_s + sum(experience.timing.values())
    return {
        **experience.timing,
        "timing/ppo_train": elapsed_s,
        "timing/step_total": total_s,
        "eps": len(experience.rollout) / total_s,
        "tokens_per_s": int(experience.rollout.lengths.sum()) / total_s,
    }
