"""Runs a task of `doctor_tasks` with PPO as `train_ppo` runs it, and measures the policy that comes out."""

import itertools
import math
import types
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM

from . import ppo_models
from .doctor_tasks import STOP
from .experience import collect
from .learner import Learner, PPOArguments, RewardArguments
from .logprobs import token_logprobs
from .lora import NEW_PARAMETERS, add_adapters
from .models import Source
from .ppo import learn
from .ppo_models import PPOOptimization, Unplaced
from .prompts import Prompt, next_prompts
from .rollout import RolloutArguments
from .strategy import STRATEGIES

MEASURED = 2048  # answers by which a policy is measured where its distribution is too large to enumerate
ENUMERABLE = 4096  # answers
PAD = 0


@dataclass(frozen=True)
class Setting:
    """What a run varies beside the task: the engine's options, the rules of PPO, adapters."""

    strategy: str = "ddp"
    ppo: PPOArguments = PPOArguments(ppo_epochs=4, train_batch_size=128)
    lora_args: object = None
    lr: float | None = None  # instead of the task's
    reward: object = None  # instead of the task's
    beta: float | None = None  # that is paid, instead of the task's


@dataclass(frozen=True)
class Measurement:
    """Of the trained policy: means over its answers, exact where `exact`, else with the objective's standard error."""

    objective: float
    reward: float
    kl: float
    error: float
    truncated: float
    explained_variance: float
    curve: tuple[float, ...]  # mean score of every rollout
    exact: bool


def build_learner(task, seed, ranks, setting=Setting(), device="cpu"):
    """A Learner on the task: actor and reference uniform, critic 0, all on the engine."""
    torch.manual_seed(seed)
    config = task.config()

    def uniform():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        return model

    actor = uniform()
    reference = uniform()
    reference.load_state_dict(actor.state_dict())
    source = Source(config, types.SimpleNamespace(pad_token_id=None), None)
    models = {
        "actor": Unplaced(actor),
        "critic": ppo_models.unplaced_critic(source),
        "reference": ppo_models.frozen(Unplaced(reference)),
    }
    if setting.lora_args is not None:
        add_adapters(actor, setting.lora_args, seed)
        models["actor"] = Unplaced(actor, None, NEW_PARAMETERS)
        del models["reference"]
    reward = setting.reward or task.reward

    def judge(prompt_ids, completion_ids):
        return [reward(list(p), list(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]

    lr = task.lr if setting.lr is None else setting.lr
    optimization = PPOOptimization(lr=lr, critic_lr=lr, lr_scheduler_type="linear", seed=seed)
    options = {
        **STRATEGIES[setting.strategy],
        "precision": "fp32",
        "max_grad_norm": optimization.max_grad_norm,
        "seed": seed,
    }
    beta = task.beta if setting.beta is None else setting.beta
    per_rank = task.episodes // ranks.world_size
    return Learner(
        **ppo_models.place(models, judge, optimization, task.iterations, torch.device(device), options),
        pad_id=PAD,
        stop_ids=frozenset([STOP]) if task.stops else frozenset(),
        decode=None,
        ranks=ranks,
        seed=seed,
        rollout_args=RolloutArguments(
            experience_batch_size=per_rank, max_new_tokens=task.new_tokens, ignore_eos=not task.stops
        ),
        reward_args=RewardArguments(kl_coef=beta, missing_eos_penalty=0.0, score_clip=None),
        ppo_args=replace(setting.ppo, train_batch_size=min(setting.ppo.train_batch_size, per_rank)),
    )


def run(task, seed, ranks, setting=Setting(), progress=None):
    """Train on the task and measure; a Measurement. `progress()` is called after every iteration."""
    learner = build_learner(task, seed, ranks, setting)
    prompts = [Prompt(ids) for ids in task.prompts]
    curve, metrics, cursor = [], {}, (0, 0)
    for _ in range(task.iterations):
        chosen, cursor = next_prompts(len(prompts), task.episodes, seed, cursor)
        experience = collect(learner, [prompts[index] for index in chosen])
        metrics = learn(learner, experience)
        curve.append(metrics["objective/scores"])
        if progress is not None:
            progress()
    return measure(task, learner, prompts, tuple(curve), metrics)


def measure(task, learner, prompts, curve, metrics):
    explained = metrics["val/explained_variance"]
    if not task.stops and len(prompts) == 1 and task.vocab**task.new_tokens <= ENUMERABLE:
        reward, kl = enumerate_policy(task, learner.actor.model)
        return Measurement(reward - task.beta * kl, reward, kl, 0.0, 0.0, explained, curve, exact=True)
    chosen = [prompts[index % len(prompts)] for index in range(MEASURED)]
    experience = collect(learner, chosen)
    kl = (experience.logprobs - experience.ref_logprobs).sum(1).double()
    rewards = [
        task.reward(list(prompt.ids), answer.ids)
        for prompt, answer in zip(chosen, experience.rollout.answers, strict=True)
    ]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    objective = rewards - task.beta * kl
    return Measurement(
        objective=objective.mean().item(),
        reward=rewards.mean().item(),
        kl=kl.mean().item(),
        error=objective.std().item() / math.sqrt(len(objective)),
        truncated=(~experience.rollout.stopped).double().mean().item() if task.stops else 0.0,
        explained_variance=explained,
        curve=curve,
        exact=False,
    )


@torch.no_grad()
def enumerate_policy(task, model):
    """(E[r], KL from the uniform reference in nats) of a policy, exactly, over all answers of full length."""
    model.eval()
    answers = torch.tensor(list(itertools.product(range(task.vocab), repeat=task.new_tokens)))
    prompt = torch.tensor(task.prompts[0]).expand(len(answers), -1)
    input_ids = torch.cat([prompt, answers], 1)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    scored[:, prompt.shape[1] :] = True
    logprobs = token_logprobs(model, input_ids, scored)[0].sum(1).double()
    rewards = torch.tensor([task.reward(list(task.prompts[0]), answer) for answer in answers.tolist()])
    probability = logprobs.exp()
    uniform = -task.new_tokens * math.log(task.vocab)
    return (probability * rewards).sum().item(), (probability * (logprobs - uniform)).sum().item()
