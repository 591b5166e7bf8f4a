"""What PPO and GRPO are told: their options, and everything that a user can get wrong, read before any rank waits for
another."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from . import checkpoints, ppo_models
from .arguments import LoraArguments, ModelArguments, RunArguments, StrategyArguments, parse
from .data import holds_texts
from .errors import InputError, require
from .learner import ScoreArguments, UpdateArguments
from .models import check_positions, load_source
from .ppo_models import RLOptimization
from .prompts import read_prompts
from .rewards import http_reward, load_function
from .rollout import RolloutArguments, check_room
from .shared_base import statistics_of, with_scorers
from .strategy import check_checkpointing, check_world_size, choose_device, engine_options
from .train_pretrain import load_texts
from .train_sft import load_samples


@dataclass(frozen=True)
class PromptArguments:
    """What is answered, and what is learned beside."""

    prompts: str = HfArg(
        aliases=["--prompt_path", "--prompt_dataset", "--prompt_data"],
        help="csv with a column 'prompt', jsonl or a JSON array; may also stand first, without the flag",
    )
    prompt_format: Literal["auto", "chat", "alpaca", "plain"] = HfArg(
        default="auto", help="auto: the tokenizer's chat template if it has one, else the Alpaca prompt"
    )
    max_prompt_len: int = HfArg(default=512, help="longer prompts are dropped, and counted")
    max_datasets_size: int | None = HfArg(default=None, help="read no more than this many prompts")
    pretrain_dataset: str | None = HfArg(
        default=None,
        aliases=["--ptx_dataset"],
        help="rows to keep learning (PTX): {'text'} whole, as in pretraining, others as in fine-tuning",
    )
    ptx_batch_size: int = HfArg(default=4, help="of its rows, on each rank, an update")
    max_len: int = HfArg(default=512, help="tokens a row of --pretrain_dataset; longer ones are cut")

    def __post_init__(self):
        for name in ("max_prompt_len", "ptx_batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.max_len >= 2, "max_len", self.max_len, "at least 2")


@dataclass(frozen=True)
class JudgeArguments:
    """Who judges: one of --rm_path, --reward_function and --reward_url."""

    rm_path: str | None = HfArg(
        default=None,
        aliases=["--reward_pretrain", "--reward_model_path", "--rm_pretrain"],
        help="folder of a reward model",
    )
    reward_function: str | None = HfArg(default=None, help="FILE.py:FUNCTION with (prompts, completions, **columns)")
    share_base: bool = HfArg(
        default=False,
        help="with --lora_rank: critic and reward model are adapters and heads on the actor's weights; --rm_path is an "
        "adapter on --pretrain",
    )
    reward_url: str | None = HfArg(default=None, aliases=["--remote_rm_url"], help="POST endpoint that gives 'rewards'")

    def __post_init__(self):
        given = [name for name in ("rm_path", "reward_function", "reward_url") if getattr(self, name)]
        require(len(given) <= 1, " and --".join(given), "given", "one judge alone")
        parts = urlsplit(self.reward_url or "http://anyone")
        known = parts.scheme in ("http", "https") and bool(parts.netloc)
        require(known, "reward_url", self.reward_url, "an http:// or https:// address")

    @property
    def is_model(self):
        return not (self.reward_function or self.reward_url)

    def function(self):
        """The reward function, where no model rewards."""
        if self.reward_function:
            return load_function(self.reward_function)
        return http_reward(self.reward_url) if self.reward_url else None


@dataclass(frozen=True)
class CriticArguments:
    """Where the critic begins."""

    critic_pretrain: str | None = HfArg(
        default=None, help="folder that the critic starts from; by default --rm_path, else --pretrain"
    )


@dataclass(frozen=True)
class RLOutputArguments(RunArguments):
    log_interval: int = HfArg(default=1, help="iterations between two lines of metrics")
    sample_rows: int = HfArg(default=4, help="answers of each such iteration in samples.jsonl, from the first on")

    def __post_init__(self):
        super().__post_init__()
        require(self.sample_rows >= 0, "sample_rows", self.sample_rows, "at least 0")


@dataclass(frozen=True)
class RLOptions:
    """The argument groups of a command, in the order in which it names them."""

    model: ModelArguments
    strategy: StrategyArguments
    prompts: PromptArguments
    judge: JudgeArguments
    rollout: RolloutArguments
    score: ScoreArguments
    update: UpdateArguments
    optimization: RLOptimization
    lora: LoraArguments
    output: RLOutputArguments
    critic: CriticArguments | None = None

    @property
    def groups(self):
        return [group for group in vars(self).values() if group is not None]


def parse_after_prompts(groups, argv, prog):
    """As `parse`, but the file of prompts may come first, without its flag."""
    flag = ["--prompts"] if argv and not argv[0].startswith("-") else []
    return parse(groups, [*flag, *argv], prog)


@dataclass(frozen=True)
class Preparation:
    """A run that can begin."""

    device: torch.device
    options: dict  # keywords of engine.initialize
    checkpoint: Path | None  # to resume from
    iterations: int
    models: dict  # {"actor", "critic", "reference", "reward": Unplaced}, as far as there are any
    judge: object  # the reward function, where no model rewards
    prompts: list
    dropped: int  # prompts that were too long
    ptx_samples: tuple
    data_key: dict  # by which a resumed run recognises its data


def prepare(options):
    """Read everything that `options` name; a Preparation. Raises InputError for what is missing or does not fit
    together."""
    check_world_size(options.strategy)
    check_checkpointing(options.strategy, options.model)
    device = choose_device(options.strategy.device)
    optimization, rollout_args, prompt_args = options.optimization, options.rollout, options.prompts
    engine_keywords = engine_options(options.strategy, device, optimization.max_grad_norm, optimization.seed)
    for name in ("actor", "critic"):
        checkpoints.check_kind(Path(options.output.save_path) / name, options.lora.saves_adapters)
    checkpoint = checkpoints.choose(options.output.save_path, options.output.resume)
    iterations = optimization.num_episodes * optimization.max_timesteps // rollout_args.update_timesteps
    if not iterations:
        raise InputError(f"--update_timesteps {rollout_args.update_timesteps} is more than there are timesteps")
    if options.lora.lora_rank and optimization.ema_decay:
        raise InputError("--ema_decay with --lora_rank: adapters are saved without a moving average; choose one")
    if options.lora.lora_rank and options.lora.lora_dropout:
        raise InputError(
            f"--lora_dropout {options.lora.lora_dropout}: the policy that learns has to be the one that answered: 0"
        )
    models = unplaced_models(options)
    for unplaced in models.values():
        unplaced.check()
    source = models["actor"].source
    prompts, dropped = read_prompts(
        prompt_args.prompts,
        source.tokenizer,
        prompt_args.prompt_format,
        prompt_args.max_prompt_len,
        prompt_args.max_datasets_size,
    )
    check_room(models["actor"].model, prompts, rollout_args, prompt_args.prompts)
    ptx_samples = ()
    if prompt_args.pretrain_dataset is not None:
        ptx_samples = _ptx_samples(prompt_args.pretrain_dataset, source.tokenizer, prompt_args)
        check_positions(source.config, ptx_samples)
    key = {"prompts": _fingerprint(prompts), "ptx": _fingerprint(ptx_samples), "seed": optimization.seed}
    judge = options.judge.function()
    return Preparation(
        device, engine_keywords, checkpoint, iterations, models, judge, prompts, dropped, ptx_samples, key
    )


def _ptx_samples(path, tokenizer, prompt_args):
    """Plain text whole, as in pretraining; of conversations the answers, as in fine-tuning."""
    if holds_texts(path):
        return load_texts(path, tokenizer, prompt_args.max_len).samples
    return load_samples(path, tokenizer, prompt_args)[1].samples


def unplaced_models(options):
    """The models on meta, {"actor", "critic", "reference", "reward": Unplaced}, as far as there are any."""
    source = load_source(options.model)
    judge_args, lora_args, seed = options.judge, options.lora, options.optimization.seed
    checkpointing = options.model.gradient_checkpointing
    normalize = options.score.normalize_reward and judge_args.rm_path is not None

    def other(option, folder):
        if folder is None:
            return source
        found = load_source(replace(options.model, pretrain=folder, model="auto"), option)
        if found.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise InputError(f"{folder} has another tokenizer than --pretrain, so it cannot read the policy's tokens")
        return found

    models = {"actor": ppo_models.unplaced_actor(source, checkpointing, lora_args, seed)}
    if judge_args.share_base:
        check_sharing(options)
        rm_path, is_learned = judge_args.rm_path, options.critic is not None
        shared = with_scorers(models["actor"], lora_args, seed, rm_path, judge_args.is_model, is_learned)
        if normalize:
            shared = replace(shared, statistics=statistics_of(rm_path))
        return {"actor": shared}
    if options.critic is not None:
        given = options.critic.critic_pretrain
        critic_source = other("--critic_pretrain", given) if given else other("--rm_path", judge_args.rm_path)
        models["critic"] = ppo_models.unplaced_critic(critic_source, checkpointing, lora_args, seed, normalize)
    if options.score.kl_coef > 0 and not lora_args.lora_rank:
        models["reference"] = ppo_models.frozen(ppo_models.unplaced_actor(source))
    if judge_args.is_model:
        models["reward"] = ppo_models.unplaced_reward_model(other("--rm_path", judge_args.rm_path), normalize)
        if judge_args.rm_path is not None:  # without its head it has nothing to say
            models["reward"] = replace(models["reward"], allow_missing=())
    return models


def check_sharing(options):
    """Raises InputError for what --share_base cannot be combined with."""
    for name, is_given in (
        ("lora_rank 0", not options.lora.lora_rank),
        ("lora_merge", options.lora.lora_merge),
        ("gradient_checkpointing", options.model.gradient_checkpointing),
        ("critic_pretrain", options.critic is not None and options.critic.critic_pretrain),
    ):
        if is_given:
            raise InputError(f"--share_base with --{name}: this cannot be combined")


def _fingerprint(rows):
    """A short digest of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(row.ids, dtype=np.int32).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]
