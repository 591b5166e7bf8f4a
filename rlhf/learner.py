"""What PPO and GRPO train, by which rules, and what changes from one iteration to the next beside the weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from ..engine import WeightAverage
from .errors import require
from .ppo_math import Moments
from .ptx import PtxStream
from .rollout import RolloutArguments


@dataclass(frozen=True)
class ScoreArguments:
    """What an answer is worth, and what straying from the reference costs."""

    score_clip: float | None = HfArg(default=10.0, help="scores are clipped to plus and minus this; 0: not at all")
    normalize_reward: bool = HfArg(
        default=True, help="take off the mean that the reward model was saved with, and divide by its std"
    )
    normalize_scores: bool = HfArg(default=False, help="then the same with mean and std of all scores of this run")
    missing_eos_penalty: float = HfArg(default=1.0, help="taken off the score of an answer that does not end")
    kl_coef: float = HfArg(
        default=0.05, aliases=["--init_kl_coef", "--beta"], help="β, the price of a nat of KL; 0: no reference"
    )

    def __post_init__(self):
        for name in ("missing_eos_penalty", "kl_coef"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.score_clip is None or self.score_clip >= 0, "score_clip", self.score_clip, "at least 0")


@dataclass(frozen=True)
class RewardArguments(ScoreArguments):
    """The same for PPO, which pays for KL in the rewards of tokens."""

    kl_estimator: Literal["k1", "k2", "k3"] = HfArg(default="k1", help="of the KL that is paid for, token by token")
    kl_target: float | None = HfArg(default=None, help="nats an answer that an adaptive β aims at; fixed β without")
    kl_horizon: float = HfArg(default=10_000.0, help="episodes over which an adaptive β moves")

    def __post_init__(self):
        super().__post_init__()
        require(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "> 0")
        require(self.kl_horizon > 0, "kl_horizon", self.kl_horizon, "> 0")
        require(not (self.kl_target and not self.kl_coef), "kl_coef", self.kl_coef, "> 0 with --kl_target")


@dataclass(frozen=True)
class UpdateArguments:
    """How a policy learns from a rollout, by PPO and by GRPO."""

    train_batch_size: int = HfArg(default=8, help="episodes a minibatch on each rank, of which there is one update")
    micro_batch_size: int | None = HfArg(default=None, help="episodes a pass through a model; as --train_batch_size")
    ppo_epochs: int = HfArg(default=4, aliases=["--max_epochs", "--num_ppo_epochs"], help="passes over a rollout")
    clip: float = HfArg(default=0.2, aliases=["--eps_clip", "--cliprange"], help="of the probability ratio")
    old_logprobs: Literal["trainer", "sampler"] = HfArg(
        default="trainer",
        help="the policy's before its updates: by a pass of their own, compared with the sampler's; or the sampler's, "
        "which saves that pass and is compared with the first minibatch's",
    )
    stop_kl: float | None = HfArg(
        default=None, help="end a rollout's epochs before the update whose KL to the sampling policy exceeds this"
    )
    ptx_coef: float = HfArg(default=0.05, help="weight of the pretraining loss where there is --pretrain_dataset")
    ptx_mix: Literal["additive", "convex"] = HfArg(
        default="additive", help="PPO + c·CE, or (1-c)·PPO + c·CE as the original announcement's code had it"
    )

    def __post_init__(self):
        for name in ("train_batch_size", "ppo_epochs", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(
            self.micro_batch_size is None or self.micro_batch_size > 0, "micro_batch_size", self.micro_batch_size, "> 0"
        )
        require(self.stop_kl is None or self.stop_kl > 0, "stop_kl", self.stop_kl, "> 0")
        require(self.ptx_coef >= 0, "ptx_coef", self.ptx_coef, "at least 0")
        require(self.ptx_mix == "additive" or self.ptx_coef <= 1, "ptx_coef", self.ptx_coef, "at most 1 with convex")


@dataclass(frozen=True)
class PPOArguments(UpdateArguments):
    """The same, with a critic beside the policy."""

    value_clip: float | None = HfArg(default=0.2, aliases=["--cliprange_value"], help="of the value; 0: not at all")
    gamma: float = HfArg(default=1.0, help="discount")
    lam: float = HfArg(default=0.95, aliases=["--lambd"], help="λ of generalised advantage estimation")
    whiten_advantages: bool = HfArg(default=True, help="to mean 0 and variance 1 over all tokens of a rollout")
    whiten_rewards: bool = HfArg(default=False, help="the same for token rewards, their mean kept")
    critic_warmup: int = HfArg(default=0, help="first iterations that train the critic alone")

    def __post_init__(self):
        super().__post_init__()
        require(self.gamma > 0, "gamma", self.gamma, "> 0")
        require(self.value_clip is None or self.value_clip >= 0, "value_clip", self.value_clip, "at least 0")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(self.critic_warmup >= 0, "critic_warmup", self.critic_warmup, "at least 0")


@dataclass(frozen=True)
class GRPOArguments(UpdateArguments):
    """The same, with the other answers to a prompt in a critic's place (Shao et al., 2024)."""

    ppo_epochs: int = HfArg(
        default=1, aliases=["--max_epochs", "--num_ppo_epochs", "--num_iterations"], help="passes over a rollout"
    )
    num_generations: int = HfArg(default=8, aliases=["--n_samples_per_prompt"], help="answers to each prompt")
    scale_rewards: bool = HfArg(default=True, help="divide by the scores' std within a group; false: Dr. GRPO")
    loss_average: Literal["token", "sequence", "constant"] = HfArg(
        default="token",
        help="tokens weigh equally; or answers do, as in the paper; or all is divided by --max_new_tokens (Dr. GRPO)",
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.num_generations > 1, "num_generations", self.num_generations, "at least 2")


@dataclass
class Trained:
    """A model with what trains it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object  # stepped once an iteration


@dataclass
class Learner:
    """The models, how they are used, and what changes from one iteration to the next beside their weights."""

    actor: Trained
    critic: Trained | None
    """None: there is none, as in GRPO."""
    reference: torch.nn.Module | None
    """A frozen copy of the actor as it began. None: the actor itself with its adapters off."""
    reward: torch.nn.Module | Callable
    """A model that scores tokens, or a reward function (see `rewards`)."""
    pad_id: int
    stop_ids: frozenset[int]
    decode: Callable | None
    """Token ids to text, for reward functions and samples. None: they get the ids."""
    ranks: object
    seed: int
    rollout_args: RolloutArguments = RolloutArguments()
    reward_args: ScoreArguments = RewardArguments()
    ppo_args: UpdateArguments = PPOArguments()
    ptx: PtxStream | None = None
    score_statistics: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the reward model's scores where it was trained."""
    value_statistics: tuple[float, float] = (0.0, 1.0)
    """The same of the model that the critic began as: it scores as that did, and its values are in units of rewards."""
    average: WeightAverage | None = None
    """The moving average of the actor's weights, updated with every step of its optimizer."""

    iteration: int = 0
    kl_coef: float = field(default=math.nan)
    moments: Moments = Moments()

    def __post_init__(self):
        if math.isnan(self.kl_coef):
            self.kl_coef = self.reward_args.kl_coef

    @property
    def micro_batch_size(self):
        return self.ppo_args.micro_batch_size or self.ppo_args.train_batch_size

    @property
    def uses_reference(self):
        return self.reward_args.kl_coef > 0

    @property
    def scores_own_answers(self):
        """Whether a rollout's log-probabilities are computed anew. They are where nothing else would tell whether the
        sampler's are right."""
        return self.ppo_args.old_logprobs == "trainer" or self.actor not in self.trained_now

    def values_come_with_update(self, count):
        """Whether the critic says what `count` episodes are worth in the forward pass of its first update: where one
        micro-batch holds them all, a pass for the values alone would compute the same."""
        rows = min(self.micro_batch_size, self.ppo_args.train_batch_size)
        return self.critic is not None and count <= rows * self.ranks.world_size

    @property
    def parts(self):
        """{name: Trained} of all that is ever trained."""
        return {"actor": self.actor} if self.critic is None else {"actor": self.actor, "critic": self.critic}

    @property
    def trained_now(self):
        """What this iteration trains."""
        warm = self.critic is None or self.iteration >= self.ppo_args.critic_warmup
        return list(self.parts.values()) if warm else [self.critic]

    @property
    def engines(self):
        """Those of `parts` that are models of their own: with a shared base, the actor alone."""
        actor = self.actor.optimizer
        return {name: part for name, part in self.parts.items() if name == "actor" or part.optimizer is not actor}

    def state(self):
        """What a checkpoint needs beside the engines' own, as plain values."""
        return {
            "iteration": self.iteration,
            "kl_coef": self.kl_coef,
            "moments": [self.moments.count, self.moments.mean, self.moments.squares],
            "ptx_cursor": None if self.ptx is None else list(self.ptx.cursor),
        }

    def load_state(self, state):
        self.iteration, self.kl_coef = state["iteration"], state["kl_coef"]
        self.moments = Moments(*state["moments"])
        if self.ptx is not None:
            self.ptx.seek(tuple(state["ptx_cursor"]))
