"""Runs a task of `doctor_tasks` with PPO as `train_ppo` runs it, and measures the policy that comes out."""

import itertools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM

from .. import engine
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
    judge: Callable | None = None  # (prompts, completions) -> rewards, instead of `Task.rewards`
    beta: float | None = None  # that is paid, instead of the task's
    kl_target: float | None = None  # nats an answer, of an adaptive β
    average: float | None = None  # decay of a moving average, which is measured then instead of the policy


@dataclass(frozen=True)
class Measurement:
    """Of the trained policy: means over its answers, exact where `exact`, else with the objective's standard error."""

    objective: float
    reward: float
    kl: float
    error: float
    truncated: float
    explained_variance: float
    curve: tuple[dict, ...]  # the metrics of every iteration
    exact: bool
    frozen_changed: int  # parameters of the actor that were frozen, and are not what they were


def build_learner(task, seed, ranks, setting=Setting(), start=None):
    """A Learner on the task, its models on the engine: actor and reference uniform, or with the weights `start` (a
    state dict), critic 0."""
    torch.manual_seed(seed)
    config = task.config()

    def uniform():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    actor, reference = uniform(), uniform()
    if start is not None:
        actor.load_state_dict(start)
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
    rewards = setting.judge or task.rewards

    def judge(prompt_ids, completion_ids):  # the names by which `rewards.call_reward` gives arguments
        return rewards(prompt_ids, completion_ids)

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
    score = {"kl_coef": beta, "kl_target": setting.kl_target, "kl_horizon": 4.0 * task.episodes}
    learner = Learner(
        **ppo_models.place(models, judge, optimization, task.iterations, ranks.device, options),
        pad_id=PAD,
        stop_ids=frozenset([STOP]) if task.stops else frozenset(),
        decode=None,
        ranks=ranks,
        seed=seed,
        rollout_args=RolloutArguments(
            experience_batch_size=per_rank, max_new_tokens=task.new_tokens, ignore_eos=not task.stops
        ),
        reward_args=RewardArguments(missing_eos_penalty=0.0, score_clip=None, **score),
        ppo_args=replace(setting.ppo, train_batch_size=min(setting.ppo.train_batch_size, per_rank)),
    )
    if setting.average is not None:
        learner.average = engine.WeightAverage(learner.actor.model, setting.average)
    return learner


def run(task, seed, ranks, setting=Setting(), progress=None):
    """Train on the task and measure; a Measurement. `progress(1)` is called after every iteration."""
    learner = build_learner(task, seed, ranks, setting)
    model = learner.actor.model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = dict(engine.whole_weights(model, frozen))
    curve = train(task, learner, progress)
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in engine.whole_weights(model, frozen))
    if learner.average is not None:
        model = AutoModelForCausalLM.from_config(task.config(), dtype=torch.float32)
        model.load_state_dict(dict(learner.average.whole_weights()))
    return measure(task, learner, model, curve, changed)


def train(task, learner, progress=None):
    """The iterations of a task; returns the metrics of each."""
    prompts = [Prompt(ids) for ids in task.prompts]
    curve, cursor = [], (0, 0)
    for _ in range(task.iterations):
        chosen, cursor = next_prompts(len(prompts), task.episodes, learner.seed, cursor)
        curve.append(learn(learner, collect(learner, [prompts[index] for index in chosen])))
        if progress is not None:
            progress(1)
    return tuple(curve)


def measure(task, learner, model, curve, frozen_changed):
    """`model`: the policy, which the learner's own samples are only of where it cannot be enumerated."""
    explained, prompts = curve[-1]["val/explained_variance"], [Prompt(ids) for ids in task.prompts]
    if not task.stops and len(prompts) == 1 and task.vocab**task.new_tokens <= ENUMERABLE:
        reward, kl = enumerate_policy(task, model)
        objective = reward - task.beta * kl
        return Measurement(objective, reward, kl, 0.0, 0.0, explained, curve, True, frozen_changed)
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
        frozen_changed=frozen_changed,
    )


def enumerate_policy(task, model):
    """(E[r], KL from the uniform reference in nats) of a policy, exactly, over all answers of full length."""
    logprobs, rewards = enumerated(task, model)
    probability, uniform = logprobs.exp(), -task.new_tokens * math.log(task.vocab)
    return (probability * rewards).sum().item(), (probability * (logprobs - uniform)).sum().item()


@torch.no_grad()
def enumerated(task, model):
    """(log-probability, reward) of every answer of full length to the task's first prompt, float64 [V^T] each."""
    model.eval()
    answers = torch.tensor(list(itertools.product(range(task.vocab), repeat=task.new_tokens)))
    prompt = torch.tensor(task.prompts[0]).expand(len(answers), -1)
    input_ids = torch.cat([prompt, answers], 1)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    scored[:, prompt.shape[1] :] = True
    logprobs = token_logprobs(model, input_ids, scored)[0].sum(1).double()
    rewards = [task.reward(list(task.prompts[0]), answer) for answer in answers.tolist()]
    return logprobs, torch.tensor(rewards, dtype=torch.float64)
