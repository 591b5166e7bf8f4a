"""The models of PPO and GRPO, from meta to the engine."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import get_scheduler
from transformers.hf_argparser import HfArg

from .. import engine
from ..engine.pretrained import PretrainedFolder
from ..engine.safetensors_io import SafetensorsFileError
from . import shared_base
from .errors import naming_input, require
from .learner import Trained
from .lora import ADAPTER, add_adapters, stored_name
from .lora import NEW_PARAMETERS as ADAPTER_PARAMETERS
from .models import Source, build_on_meta, decay_groups, disable_dropout
from .reward_model import NEW_PARAMETERS as HEAD_PARAMETERS
from .reward_model import build_reward_model, forget_normalization, normalization
from .strategy import split_budgets


@dataclass(frozen=True)
class RLOptimization:
    """How far and how fast."""

    num_episodes: int = HfArg(default=10, help="times --max_timesteps batches of prompts")
    max_timesteps: int = HfArg(default=10, help="batches of prompts an episode")
    lr: float = HfArg(default=3e-6, aliases=["--actor_lr"], help="peak learning rate of the actor")
    # One value an iteration, so that iterations which stop early do not shift it.
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = HfArg(
        default="linear", help="shape over the iterations"
    )
    warmup_ratio: float = HfArg(default=0.0, help="share of the iterations over which the rates rise from 0")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decay of matrices; biases and norms have none")
    adam_beta1: float = HfArg(default=0.9)
    adam_beta2: float = HfArg(default=0.95)
    adam_epsilon: float = HfArg(default=1e-5)
    max_grad_norm: float = HfArg(default=1.0, help="global gradient norm to clip at, for each model")
    ema_decay: float = HfArg(default=0.0, help="of a moving average of the actor's weights, such as 0.992; 0: none")
    seed: int = HfArg(default=42, help="of prompts' order, sampling and random weights")

    def __post_init__(self):
        for name in ("num_episodes", "max_timesteps", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("lr", "weight_decay", "adam_epsilon", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")


@dataclass(frozen=True)
class PPOOptimization(RLOptimization):
    """The same, with a critic."""

    critic_lr: float = HfArg(default=9e-6, help="peak learning rate of the critic")

    def __post_init__(self):
        super().__post_init__()
        require(self.critic_lr >= 0, "critic_lr", self.critic_lr, "at least 0")


@dataclass(frozen=True)
class Unplaced:
    """A model that the engine has yet to take, and where its weights are."""

    model: torch.nn.Module  # on meta, mostly
    folder: str | None = None  # of its weights; None: those that it has, or random ones
    allow_missing: Collection[str] = ()
    stored_name: Callable[[str], str] | None = None
    source: Source | None = None
    plain: Callable[[], torch.nn.Module] | None = None
    """Makes the model without adapters, on meta."""
    statistics: tuple[float, float] = (0.0, 1.0)
    """Mean and std of the scores, where they are to be normalised."""

    @property
    def _in_folder(self):
        return {"allow_missing": self.allow_missing, "stored_name": self.stored_name} if self.folder else {}

    def check(self):
        """Raises InputError where the weights in the folder are not the model's."""
        if self.folder:
            with naming_input(ValueError, SafetensorsFileError):
                PretrainedFolder(self.folder, self.model, **self._in_folder)

    def initialize(self, optimizer, device, options, manager=None):
        return engine.initialize(
            self.model, optimizer, pretrained=self.folder, device=device, manager=manager, **self._in_folder, **options
        )


def unplaced_actor(source, gradient_checkpointing=False, lora_args=None, seed=0):
    return _adapted(lambda: build_on_meta(source, gradient_checkpointing), source, (), lora_args, seed)


def unplaced_critic(source, gradient_checkpointing=False, lora_args=None, seed=0, normalize=False):
    """A critic of a reward model's or a language model's weights. The latter have no head: it is 0, and so are all
    values until the first update. `normalize`: by what the folder's configuration says of its scores, if anything."""
    has_statistics = normalize and getattr(source.config, "std", None)

    def build():
        model = build_reward_model(source, gradient_checkpointing)
        if not has_statistics:
            forget_normalization(model.config)  # its scores become values in units of rewards
        model.score.weight = torch.nn.Parameter(torch.zeros(model.score.weight.shape))
        return model

    unplaced = _adapted(build, source, HEAD_PARAMETERS, lora_args, seed)
    return replace(unplaced, statistics=normalization(source.config)) if has_statistics else unplaced


def unplaced_reward_model(source, normalize=False):
    """Random where the folder has no head, which a caller refuses by its `allow_missing` (see `rl_setup`). `normalize`:
    by what the folder's configuration says of its scores; InputError where it says nothing."""
    statistics = normalization(source.config) if normalize else (0.0, 1.0)
    model = build_reward_model(source)
    return frozen(Unplaced(model, source.folder, HEAD_PARAMETERS, source=source, statistics=statistics))


def frozen(unplaced):
    unplaced.model.requires_grad_(False)
    disable_dropout(unplaced.model)
    return unplaced


def _adapted(build, source, missing, lora_args, seed):
    model = build()
    disable_dropout(model)
    renamed = None
    if lora_args is not None and lora_args.lora_rank:
        add_adapters(model, lora_args, seed)
        missing, renamed = (*missing, *ADAPTER_PARAMETERS), stored_name
    return Unplaced(model, source.folder, missing, renamed, source, build)


def place(models, judge, optimization, iterations, device, options, optimizers=None):
    """Give the models of {"actor", "critic", "reference", "reward": Unplaced} (as far as there are any) to the engine;
    returns those fields of a Learner. `judge`: what rewards where no model does. `optimizers`: {"actor",
    "critic"} that the caller has made, or None. The budgets of `options` are for all models together."""
    budgets, options = split_budgets(options)
    manager = engine.Manager(**budgets)

    if any(hasattr(models["actor"].model, head) for head in shared_base.HEADS.values()):
        return _place_shared(models["actor"], judge, optimization, iterations, device, options, manager)

    def trained(name, lr):
        optimizer = (optimizers or {}).get(name) or _adamw(models[name].model, lr, optimization)
        model, optimizer = models[name].initialize(optimizer, device, options, manager)
        warmup = round(optimization.warmup_ratio * iterations)
        return Trained(model, optimizer, get_scheduler(optimization.lr_scheduler_type, optimizer, warmup, iterations))

    def untrained(name):
        if name not in models:
            return None
        return models[name].initialize(None, device, {**options, "max_grad_norm": None}, manager)[0].eval()

    def statistics(name):
        return models[name].statistics if name in models else (0.0, 1.0)

    return {
        "actor": trained("actor", optimization.lr),
        "critic": trained("critic", optimization.critic_lr) if "critic" in models else None,
        "reference": untrained("reference"),
        "reward": untrained("reward") or judge,
        "score_statistics": statistics("reward"),
        "value_statistics": statistics("critic"),
    }


def _place_shared(unplaced, judge, optimization, iterations, device, options, manager):
    """The same where one model has all roles (see `shared_base`): one optimizer, whose norm is clipped over actor and
    critic together, and one scheduler."""
    model, heads = unplaced.model, shared_base.HEADS
    groups = _groups(shared_base.of_role(model, ADAPTER), optimization.lr, optimization.weight_decay)
    has_critic, has_reward = (hasattr(model, heads[role]) for role in (shared_base.CRITIC, shared_base.REWARD))
    if has_critic:
        of_critic = shared_base.of_role(model, shared_base.CRITIC)
        groups += _groups(of_critic, optimization.critic_lr, optimization.weight_decay)
    model, optimizer = unplaced.initialize(_adamw_of(groups, optimization), device, options, manager)
    warmup = round(optimization.warmup_ratio * iterations)
    scheduler = get_scheduler(optimization.lr_scheduler_type, optimizer, warmup, iterations)
    scores = {role: shared_base.AdapterScores(model, role) for role in heads}
    return {
        "actor": Trained(model, optimizer, scheduler),
        "critic": Trained(scores[shared_base.CRITIC], optimizer, scheduler) if has_critic else None,
        "reference": None,
        "reward": scores[shared_base.REWARD] if has_reward else judge,
        "score_statistics": unplaced.statistics,
        "value_statistics": unplaced.statistics,
    }


def _groups(parameters, lr, weight_decay):
    return [{**group, "lr": lr} for group in decay_groups(parameters, weight_decay) if group["params"]]


def _adamw(model, lr, optimization):
    return _adamw_of(_groups(model.parameters(), lr, optimization.weight_decay), optimization)


def _adamw_of(groups, optimization):
    betas = (optimization.adam_beta1, optimization.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=optimization.adam_epsilon)
