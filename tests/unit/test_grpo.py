"""GRPO on tiny models: against plain PyTorch, against its optimum in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from megalith.rlhf import doctor_tasks
from megalith.rlhf.batches import epoch_order
from megalith.rlhf.doctor_run import build_learner, enumerate_policy
from megalith.rlhf.experience import collect
from megalith.rlhf.grpo import learn, row_weights
from megalith.rlhf.learner import GRPOArguments
from megalith.rlhf.prompts import Prompt
from megalith.rlhf.strategy import process_group
from ppo_cases import PROMPTS, make_learner, source_of, whole
from tiny import update_error
from transformers import AutoModelForCausalLM

REPEATED = [prompt for prompt in PROMPTS[:2] for _ in range(4)]


@pytest.fixture(scope="module")
def ranks():
    with process_group(torch.device("cpu")) as ranks:
        yield ranks


def make_grpo(ranks, kl_coef=0.05, **changes):
    learner = make_learner(ranks, kl_coef=kl_coef)
    learner.critic = None
    given = {"train_batch_size": 4, "micro_batch_size": 3, "ppo_epochs": 2, "num_generations": 4}
    learner.ppo_args = GRPOArguments(**{**given, **changes})
    return learner


# The update, against plain PyTorch


def naive_update(actor, learner, experience):
    """The same minibatches, an answer at a time, with torch's own AdamW: written from the paper's equations 3 and 4."""
    args, answers, beta = learner.ppo_args, experience.rollout.answers, learner.kl_coef
    scores = [s - (0 if a.stopped else 0.25) for s, a in zip(experience.scores.tolist(), answers, strict=True)]
    advantages = []
    for row, score in enumerate(scores):
        group = torch.tensor(scores[row - row % 4 : row - row % 4 + 4], dtype=torch.float64)
        advantages.append((score - group.mean()) / (group.std(unbiased=False) + 1e-4 if args.scale_rewards else 1.0))
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for epoch in range(args.ppo_epochs):
        order = epoch_order(len(answers), learner.seed + 1, epoch).tolist()
        for start in range(0, len(answers), args.train_batch_size):
            rows = order[start : start + args.train_batch_size]
            losses = [token_losses(actor, experience, row, advantages[row], beta) for row in rows]
            if args.loss_average == "token":
                loss = torch.cat(losses).mean()
            elif args.loss_average == "sequence":
                loss = sum(of_row.mean() for of_row in losses) / len(rows)
            else:
                loss = sum(of_row.sum() / 6 for of_row in losses) / len(rows)  # 6: max_new_tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()


def token_losses(actor, experience, row, advantage, beta):
    prompt, answer = experience.rollout.prompts[row].ids, experience.rollout.answers[row].ids
    ids = torch.tensor([[*prompt, *answer]])
    logprobs = actor(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    logprobs = logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    ratio = (logprobs - experience.logprobs[row, : len(answer)]).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    d = experience.ref_logprobs[row, : len(answer)] - logprobs
    return -surrogate + beta * (d.exp() - d - 1)


@pytest.mark.parametrize(("average", "scale"), [("token", True), ("sequence", True), ("constant", False)])
def test_an_iteration_equals_a_naive_one(ranks, average, scale):
    learner = make_grpo(ranks, loss_average=average, scale_rewards=scale)
    actor = AutoModelForCausalLM.from_config(source_of().config)
    actor.load_state_dict(whole(learner.actor.model))
    before = {name: parameter.detach().clone() for name, parameter in actor.named_parameters()}
    experience = collect(learner, REPEATED)
    assert len(set(experience.rollout.lengths.tolist())) > 1
    elsewhere = torch.randn(experience.logprobs.shape, generator=torch.Generator().manual_seed(0))
    experience = replace(experience, ref_logprobs=experience.ref_logprobs + 0.3 * elsewhere)
    naive_update(actor, learner, experience)
    metrics = learn(learner, experience)
    assert metrics["policy/clipfrac_avg"] > 0 and metrics["loss/kl_avg"] > 0
    reference = {name: parameter.detach() for name, parameter in actor.named_parameters()}
    assert update_error(before, whole(learner.actor.model), reference) < 1e-5


def test_groups_of_equal_scores_teach_nothing(ranks):
    learner = make_grpo(ranks, kl_coef=0.0)
    learner.reward = lambda completion_ids, prompt_ids: [float(len(ids)) for ids in prompt_ids]
    learner.reward_args = replace(learner.reward_args, missing_eos_penalty=0.0)
    before = whole(learner.actor.model)
    metrics = learn(learner, collect(learner, REPEATED))
    assert metrics["val/equal_groups"] == 1 and metrics["objective/scores_std"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(learner.actor.model).items())


def test_weights_of_rows_by_hand():
    lengths = torch.tensor([1, 4])
    assert row_weights(lengths, "token", 8) is None
    assert row_weights(lengths, "sequence", 8).tolist() == [1.0, 0.25]
    assert row_weights(lengths, "constant", 8).tolist() == [0.125, 0.125]
    with pytest.raises(ValueError, match="average='tokens'"):
        row_weights(lengths, "tokens", 8)


# Learning


def optimum(vocab, new_tokens, beta, group):
    """The share of the good token at the optimum of the counting task. A token is worth p / T (1 - 1/G), its own score
    being part of its group's mean, and costs β KL(uniform ‖ policy): the derivative of their difference is a quadratic
    in p."""
    gain = (1 - 1 / group) / (new_tokens * beta)
    # gain + 1/(V p) - (V-1)/V / (1-p) = 0, times p (1-p)
    a, b, c = -gain, gain - 1, 1 / vocab
    return (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)


def test_a_policy_reaches_its_optimum(ranks):
    task = doctor_tasks.count(vocab=8, new_tokens=4)
    learner = build_learner(task, 0, ranks)
    learner.critic = None
    learner.ppo_args = GRPOArguments(train_batch_size=128, ppo_epochs=2, num_generations=16, scale_rewards=False)
    for _ in range(task.iterations):
        learn(learner, collect(learner, [Prompt(task.prompts[0])] * 128))
    reward, _ = enumerate_policy(task, learner.actor.model)
    assert reward == pytest.approx(optimum(8, 4, task.beta, 16), rel=0.1)
