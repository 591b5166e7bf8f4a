"""The doctor's task for PTX: a policy that has learned a corpus is rewarded for what the corpus never says.

The corpus counts upwards from a letter, modulo V; after the task's prompt, its rows are random. PPO on that prompt
alone changes all that the model says, unless PTX holds the counting; the reward can be had either way.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from . import doctor_tasks
from .batches import collate
from .doctor_run import PAD, Setting, build_learner, enumerated, train
from .learner import PPOArguments
from .losses import IGNORE, completion_loss_sum
from .ptx import PtxStream
from .templates import Sample

TASK = doctor_tasks.count(vocab=8, new_tokens=4)
COEFFICIENT = 1.0  # of the pretraining loss
LENGTH = 5  # tokens a row


@dataclass(frozen=True)
class Kept:
    rise_without: float  # of the corpus' loss by PPO, in nats a token
    rise_with: float  # the same with PTX
    reward_share: float  # E[r] with PTX, of that of the optimum for the pretrained reference


def keeps(seed, ranks, progress):
    """PPO without and with PTX from one pretrained policy; a Kept."""
    counting = [_sample([(first + step) % TASK.vocab for step in range(LENGTH)]) for first in range(3, TASK.vocab)]
    model = _pretrained(counting, seed)
    before, start = _loss(model, counting), model.state_dict()
    logprobs, rewards = enumerated(TASK, model)
    best = (torch.softmax(logprobs + rewards / TASK.beta, 0) * rewards).sum().item()
    rises = {}
    for coefficient in (0.0, COEFFICIENT):
        setting = Setting(ppo=replace(PPOArguments(ppo_epochs=4, train_batch_size=128), ptx_coef=coefficient))
        learner = build_learner(TASK, seed, ranks, setting, start)
        if coefficient:
            learner.ptx = PtxStream(counting, len(counting), PAD, seed, ranks)
        train(TASK, learner, progress)
        policy = learner.actor.model
        rises[coefficient] = _loss(policy, counting) - before
    logprobs, rewards = enumerated(TASK, policy)
    return Kept(rises[0.0], rises[COEFFICIENT], (logprobs.exp() * rewards).sum().item() / best)


def _sample(ids):
    """A row whose first token is given."""
    return Sample(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0)


def _pretrained(counting, seed, steps=120, random_rows=16):
    """A model that has learned to count, and that after the prompt everything is equally likely."""
    rng = np.random.default_rng([seed, 7])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TASK.config(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    prompt = list(TASK.prompts[0])
    for _ in range(steps):
        noise = [_sample([*prompt, *rng.integers(0, TASK.vocab, LENGTH - 1)]) for _ in range(random_rows)]
        loss = _loss_of(model, [*counting, *noise])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _loss_of(model, samples):
    input_ids, labels = collate(samples, PAD, "cpu")
    return completion_loss_sum(model(input_ids=input_ids, use_cache=False).logits, labels) / (labels != IGNORE).sum()


@torch.no_grad()
def _loss(model, samples):
    return _loss_of(model.eval(), samples).item()
