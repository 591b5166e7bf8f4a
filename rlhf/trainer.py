"""The Python interface of the original announcement, over the code that `megalith ppo` runs.

    strategy = Strategy(stage=3, placement_policy="cpu")
    with strategy.model_init_context():
        actor, critic = GPTActor(), GPTCritic()
        initial_model = copy.deepcopy(actor)
        reward_model = RewardModel(copy.deepcopy(critic.model))
    trainer = PPOTrainer(strategy, actor, critic, reward_model, initial_model, max_length=128, train_batch_size=4)
    trainer.fit(prompts, num_episodes=2)

Models are shapes without memory until the trainer gives them to the engine: then they get the weights of their folder,
or random ones, by the strategy's seed and the parameters' names, so that copies begin equal.
"""

import atexit
import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, BloomConfig, GPT2Config, LlamaConfig, OPTConfig

from .. import engine
from . import ppo_models
from .errors import InputError
from .experience import collect
from .learner import Learner, PPOArguments, RewardArguments
from .memory_plan import Rehearsal, plans
from .models import Source
from .ppo import learn
from .ppo_models import PPOOptimization, Unplaced
from .prompts import Prompt, next_prompts
from .reward_model import normalization
from .rollout import RolloutArguments
from .strategy import Ranks, choose_device, process_group
from .tokenizer import pad_id

_TIERS = {"cuda": "device", "cpu": "host", "auto": "auto", "nvme": "nvme"}


class Strategy:
    """How models are spread over ranks and tiers. Joins the ranks that torchrun started, or is alone.

    stage: ZeRO's, 0 to 3. placement_policy: where weights and optimizer state rest: "cuda" (the device that computes,
    whichever it is), "cpu", "auto" or "nvme". `options`: further keywords of `engine.initialize`, such as
    device_budget, and precision ("fp32", "bf16", "fp16"; by default bf16 on a GPU and fp32 on a CPU).
    """

    def __init__(self, stage=3, placement_policy="cuda", *, device="auto", max_grad_norm=1.0, seed=42, **options):
        if placement_policy not in _TIERS:
            raise InputError(f"placement_policy={placement_policy!r}: must be one of {', '.join(_TIERS)}")
        self.device = choose_device(device)
        options.setdefault("precision", "bf16" if self.device.type == "cuda" else "fp32")
        placement = _TIERS[placement_policy]
        self.options = dict(zero_stage=stage, placement=placement, max_grad_norm=max_grad_norm, seed=seed, **options)
        self.seed = seed
        engine.EngineConfig(**self.options)  # raises what is wrong with them
        self._joined = contextlib.ExitStack()
        if dist.is_initialized():
            self.ranks = Ranks(dist.get_rank(), dist.get_world_size(), self.device)
        else:
            self.ranks = self._joined.enter_context(process_group(self.device))
            atexit.register(self.close)

    def model_init_context(self):
        """Models that are built inside take no memory."""
        return torch.device("meta")

    def close(self):
        """Leave the ranks that this strategy has joined."""
        self._joined.close()


class _Model(nn.Module):
    """A transformers model that the trainer gives to the engine."""

    def __init__(self, unplaced):
        super().__init__()
        self.model = unplaced.model
        self.folder = unplaced.folder

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def unplaced(self, allow_missing=()):
        return Unplaced(self.model, self.folder, allow_missing)


def _source(default, config, pretrained):
    if pretrained is not None:
        config = AutoConfig.from_pretrained(pretrained, local_files_only=True)
    config = default() if config is None else config
    return Source(config, SimpleNamespace(pad_token_id=config.pad_token_id), pretrained)


class Actor(_Model):
    """A policy. `config`: of transformers; `pretrained`: a folder in Hugging Face layout, whose config.json counts."""

    default_config: Callable

    def __init__(self, config=None, pretrained=None, gradient_checkpointing=False):
        source = _source(self.default_config, config, pretrained)
        super().__init__(ppo_models.unplaced_actor(source, gradient_checkpointing))


class Critic(_Model):
    """Values of states. From a language model or at random, its head is 0 at the start."""

    default_config: Callable

    def __init__(self, config=None, pretrained=None, gradient_checkpointing=False):
        source = _source(self.default_config, config, pretrained)
        super().__init__(ppo_models.unplaced_critic(source, gradient_checkpointing))


class GPTActor(Actor):
    default_config = GPT2Config  # GPT-2 small


class GPTCritic(Critic):
    default_config = GPT2Config


class OPTActor(Actor):
    default_config = OPTConfig  # OPT-125M


class OPTCritic(Critic):
    default_config = OPTConfig


class BLOOMActor(Actor):
    default_config = BloomConfig


class BLOOMCritic(Critic):
    default_config = BloomConfig


class LlamaActor(Actor):
    default_config = LlamaConfig  # LLaMA-7B


class LlamaCritic(Critic):
    default_config = LlamaConfig


class RewardModel(_Model):
    """Scores of answers. `model`: a critic's, whose weights it begins at with a random head of its own; `pretrained`:
    the folder of a reward model of the same shape, head included."""

    def __init__(self, model, pretrained=None):
        super().__init__(Unplaced(model, pretrained))
        shape = model.score.weight.shape
        model.score.weight = nn.Parameter(torch.empty(shape, device="meta"))


class PPOTrainer:
    """PPO with an actor, a critic, a reward model (or a reward function, see `rewards`) and the actor's first state.

    Args:
        actor_optim, critic_optim: torch.optim.Adam or AdamW over the models' parameters; made from `options` if None.
        tokenizer: for prompts that are strings, for reward functions and for the stop token, which otherwise is that of
            the actor's configuration.
        options: fields of RolloutArguments, RewardArguments, PPOArguments and PPOOptimization, by name: max_length,
            train_batch_size, experience_batch_size, kl_coef, lr, …
    """

    def __init__(
        self,
        strategy,
        actor,
        critic,
        reward_model,
        initial_model,
        actor_optim=None,
        critic_optim=None,
        *,
        tokenizer=None,
        **options,
    ):
        options = {"seed": strategy.seed, "lr_scheduler_type": "constant", **options}
        groups = (RolloutArguments, RewardArguments, PPOArguments, PPOOptimization)
        known = [field.name for group in groups for field in fields(group)]
        for name in options:
            if name not in known:
                raise TypeError(f"PPOTrainer() has no option {name!r}; it takes {', '.join(known)}")
        rollout_args, reward_args, ppo_args, optimization = (
            group(**{f.name: options[f.name] for f in fields(group) if f.name in options}) for group in groups
        )
        self._tokenizer = tokenizer
        eos = actor.model.config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
        models = {"actor": actor.unplaced(), "critic": critic.unplaced(ppo_models.HEAD_PARAMETERS)}
        if reward_args.kl_coef > 0:
            if initial_model is None:
                raise InputError("initial_model=None: give a copy of the actor as it is, or kl_coef=0")
            models["reference"] = ppo_models.frozen(initial_model.unplaced())
        if isinstance(reward_model, RewardModel):
            models["reward"] = ppo_models.frozen(reward_model.unplaced())
            if reward_model.folder is not None and reward_args.normalize_reward:
                config = AutoConfig.from_pretrained(reward_model.folder, local_files_only=True)
                models["reward"] = replace(models["reward"], statistics=normalization(config))
        iterations = optimization.num_episodes * optimization.max_timesteps // rollout_args.update_timesteps
        if strategy.ranks.is_first:
            rehearsals = {name: Rehearsal(each.model) for name, each in models.items()}
            print(plans(rehearsals, strategy.options, strategy.ranks.world_size), flush=True)
        placed = ppo_models.place(
            models,
            reward_model,
            optimization,
            iterations,
            strategy.device,
            strategy.options,
            {"actor": actor_optim, "critic": critic_optim},
        )
        self.learner = Learner(
            **placed,
            pad_id=0 if tokenizer is None else pad_id(tokenizer),
            stop_ids=frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos),
            decode=None if tokenizer is None else tokenizer.decode,
            ranks=strategy.ranks,
            seed=optimization.seed,
            rollout_args=rollout_args,
            reward_args=reward_args,
            ppo_args=ppo_args,
        )

    def fit(self, prompts, num_episodes=1, max_timesteps=None, update_timesteps=None, on_step=None):
        """Train for `num_episodes` times `max_timesteps` batches of prompts (by default, so many as there are), with a
        round of updates after every `update_timesteps` of them. Returns the metrics of each round; `on_step` is called
        with them as they come.

        prompts: a list of 1-D tensors or lists of token ids, or of strings where the trainer has a tokenizer; or a
        DataLoader over such, in batches. With several ranks, each may bring its own part of them.
        """
        learner = self.learner
        prompts = self._prompts(prompts)
        update_timesteps = update_timesteps or learner.rollout_args.update_timesteps
        batch = learner.rollout_args.experience_batch_size * learner.ranks.world_size
        max_timesteps = max_timesteps or max(len(prompts) // batch, update_timesteps)
        rounds = num_episodes * max_timesteps // update_timesteps
        if not rounds:
            available = num_episodes * max_timesteps
            raise InputError(f"update_timesteps={update_timesteps} is more than the {available} that there are")
        rows, cursor = [], (0, 0)
        for _ in range(rounds):
            chosen, cursor = next_prompts(len(prompts), batch * update_timesteps, learner.seed, cursor)
            rows.append(learn(learner, collect(learner, [prompts[index] for index in chosen])))
            if on_step is not None:
                on_step(rows[-1])
        return rows

    def save_pretrained(self, folder):
        """Save folder/actor and folder/critic in Hugging Face layout. A collective."""
        for name in ("actor", "critic"):
            engine.save_pretrained(f"{folder}/{name}", getattr(self.learner, name).model)
            if self._tokenizer is not None and self.learner.ranks.is_first:
                self._tokenizer.save_pretrained(f"{folder}/{name}")

    def _prompts(self, given):
        if isinstance(given, torch.utils.data.DataLoader):
            given = [prompt for batch in given for prompt in _rows_of(batch)]
        mine = [self._prompt(prompt) for prompt in given]
        if self.learner.ranks.world_size > 1:
            parts = [None] * self.learner.ranks.world_size
            dist.all_gather_object(parts, mine)
            same = all(part == parts[0] for part in parts)
            mine = parts[0] if same else [prompt for part in parts for prompt in part]
        if not mine:
            raise InputError("there are no prompts")
        return mine

    def _prompt(self, prompt):
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InputError("prompts are strings, but PPOTrainer was given no tokenizer")
            return Prompt(tuple(self._tokenizer(prompt).input_ids), prompt)
        ids = torch.as_tensor(prompt)
        if ids.dim() != 1 or ids.is_floating_point():
            raise InputError(f"a prompt is a 1-D tensor of token ids, not {ids.dtype} of shape {list(ids.shape)}")
        return Prompt(tuple(ids.tolist()))


def _rows_of(batch):
    """The prompts of a DataLoader's batch: a list, a tensor [B, L], or a tokenizer's output with its mask."""
    if hasattr(batch, "keys"):
        mask = batch.get("attention_mask")
        rows = zip(batch["input_ids"], batch["input_ids"] >= 0 if mask is None else mask.bool(), strict=True)
        return [ids[kept] for ids, kept in rows]
    return list(batch)
