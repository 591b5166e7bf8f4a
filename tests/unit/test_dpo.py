"""DPO's implicit rewards against sums of token log-probabilities that are taken one by one."""

import numpy as np
import pytest
import torch
from megalith.rlhf.losses import ranking_loss_sum, ranking_metrics
from megalith.rlhf.preferences import Comparison
from megalith.rlhf.templates import Sample
from megalith.rlhf.train_dpo import implicit_rewards
from tiny import make_model

BETA = 0.3


def comparison(prompt, chosen, rejected):
    def answer(ids):
        ids = np.array([*prompt, *ids], dtype=np.int32)
        return Sample(ids, np.arange(len(ids)) >= len(prompt))

    return Comparison((answer(chosen), answer(rejected)), (0, 1), margin=2.0)


BATCH = [comparison([3, 4, 5], [6, 7], [8]), comparison([9], [4, 4, 4], [5, 6])]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    policy, reference = make_model("llama"), make_model("llama")
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return policy.eval(), reference.eval().requires_grad_(False)


def logprob(model, sample):
    """Of the tokens that are trained, given those before them."""
    ids = torch.from_numpy(sample.ids).long()[None]
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(logprobs[t - 1, ids[0, t]] for t in range(1, len(sample)) if sample.trained[t])


def test_rewards_are_of_the_answers_own_tokens(models):
    policy, reference = models
    rewards, pairs = implicit_rewards(policy, reference, BATCH, BETA, 0, "cpu")
    answers = [answer for each in BATCH for answer in each.answers]
    expected = torch.stack([BETA * (logprob(policy, a) - logprob(reference, a)) for a in answers])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    assert pairs.margin.tolist() == [0, 0]  # a reward model's, not DPO's


def test_the_gradient_is_that_of_the_paper(models):
    policy, reference = models
    rewards, pairs = implicit_rewards(policy, reference, BATCH[:1], BETA, 0, "cpu")
    weights = list(policy.parameters())
    found = torch.autograd.grad(ranking_loss_sum(rewards, pairs), weights)
    chosen, rejected = BATCH[0].answers
    direction = torch.autograd.grad(logprob(policy, chosen) - logprob(policy, rejected), weights)
    weight = torch.sigmoid(rewards[1] - rewards[0]).item()  # 1/2 where the policy is the reference
    for one, other in zip(found, direction, strict=True):
        torch.testing.assert_close(one, -BETA * weight * other, atol=1e-5, rtol=1e-4)


def test_swapping_the_answers_turns_the_margin_round(models):
    swapped = [Comparison(each.answers[::-1], each.ranks, each.margin) for each in BATCH]
    rewards = [implicit_rewards(*models, given, BETA, 0, "cpu") for given in (BATCH, swapped)]
    margins = [ranking_metrics(*of_batch)["margin"].item() for of_batch in rewards]
    assert margins[0] != 0 and margins[1] == pytest.approx(-margins[0])
