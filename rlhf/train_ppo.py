"""Reinforcement learning from feedback: PPO against a reward model, a Python function or a server.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_ppo prompts.csv --pretrain SFT --rm_path RM
    --strategy zero3 --save_path OUT

or `megalith ppo …` with the same options. What an iteration computes is in `experience` and `ppo`.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist
from transformers.hf_argparser import HfArg

from .. import engine
from . import checkpoints, ppo_models
from .arguments import (
    LoraArguments,
    ModelArguments,
    OutputArguments,
    StrategyArguments,
    parse,
    resolved,
    write_config,
)
from .errors import InputError, exit_on_input_error, require
from .experience import collect
from .learner import Learner, PPOArguments, RewardArguments
from .lora import save_adapter
from .metrics import MetricsLog, memory_table, peak_memory_bytes
from .models import load_source
from .ppo import learn
from .ppo_models import PPOOptimization
from .prompts import next_prompts, read_prompts
from .ptx import PtxStream
from .rewards import http_reward, load_function
from .rollout import RolloutArguments
from .samples import SamplesLog
from .strategy import check_world_size, choose_device, engine_options, process_group
from .tokenizer import pad_id
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
        default=None, aliases=["--ptx_dataset"], help="rows to keep learning as in fine-tuning (PTX)"
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
    reward_url: str | None = HfArg(default=None, aliases=["--remote_rm_url"], help="POST endpoint that gives 'rewards'")
    critic_pretrain: str | None = HfArg(
        default=None, help="folder that the critic starts from; by default --rm_path, else --pretrain"
    )

    def __post_init__(self):
        given = [name for name in ("rm_path", "reward_function", "reward_url") if getattr(self, name)]
        require(len(given) <= 1, " and --".join(given), "given", "one judge alone")


@dataclass(frozen=True)
class PPOOutputArguments(OutputArguments):
    log_interval: int = HfArg(default=1, help="iterations between two lines of metrics")


GROUPS = (
    ModelArguments,
    StrategyArguments,
    PromptArguments,
    JudgeArguments,
    RolloutArguments,
    RewardArguments,
    PPOArguments,
    PPOOptimization,
    LoraArguments,
    PPOOutputArguments,
)


def build(model_args, judge_args, lora_args, kl_coef, seed):
    """The models on meta, {"actor", "critic", "reference", "reward": Unplaced} (the last two where there are any), and
    the actor's Source. Raises InputError for whatever is missing or does not fit together."""
    source = load_source(model_args)
    checkpointing = model_args.gradient_checkpointing

    def other(folder):
        if folder is None:
            return source
        found = load_source(replace(model_args, pretrain=folder, model="auto"))
        if found.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise InputError(f"{folder} has another tokenizer than --pretrain, so it cannot read the policy's tokens")
        return found

    critic_source = other(judge_args.critic_pretrain or judge_args.rm_path)
    models = {
        "actor": ppo_models.unplaced_actor(source, checkpointing, lora_args, seed),
        "critic": ppo_models.unplaced_critic(critic_source, checkpointing, lora_args, seed),
    }
    if kl_coef > 0 and not lora_args.lora_rank:
        models["reference"] = ppo_models.frozen(ppo_models.unplaced_actor(source))
    if not (judge_args.reward_function or judge_args.reward_url):
        models["reward"] = ppo_models.unplaced_reward_model(other(judge_args.rm_path))
    return models, source


def train(*groups):
    (model_args, strategy_args, prompt_args, judge_args, rollout_args) = groups[:5]
    (reward_args, ppo_args, optim_args, lora_args, output_args) = groups[5:]
    save_path = Path(output_args.save_path)

    # Everything that a user can get wrong is read before any rank waits for another.
    check_world_size(strategy_args)
    device = choose_device(strategy_args.device)
    options = engine_options(strategy_args, device, optim_args.max_grad_norm, optim_args.seed)
    checkpoint = checkpoints.choose(save_path, output_args.resume)
    iterations = optim_args.num_episodes * optim_args.max_timesteps // rollout_args.update_timesteps
    if not iterations:
        raise InputError(f"--update_timesteps {rollout_args.update_timesteps} is more than there are timesteps")
    if lora_args.lora_merge:
        raise InputError("--lora_merge: ppo saves adapters as PEFT does; its merge_and_unload merges them")
    if lora_args.lora_rank and optim_args.ema_decay:
        raise InputError("--ema_decay with --lora_rank: adapters are saved without a moving average; choose one")
    models, source = build(model_args, judge_args, lora_args, reward_args.kl_coef, optim_args.seed)
    tokenizer = source.tokenizer
    prompts, dropped = read_prompts(
        prompt_args.prompts,
        tokenizer,
        prompt_args.prompt_format,
        prompt_args.max_prompt_len,
        prompt_args.max_datasets_size,
    )
    judge = judge_of(judge_args)
    ptx_samples = ptx_samples_of(prompt_args, tokenizer)
    data_key = {"prompts": fingerprint(prompts), "ptx": fingerprint(ptx_samples), "seed": optim_args.seed}

    with process_group(device) as ranks:
        rows = rollout_args.experience_batch_size * rollout_args.update_timesteps * ranks.world_size
        if ranks.is_first:
            print(f"{prompt_args.prompts}: {len(prompts)} prompts, {dropped} dropped because they are too long")
            print(f"  first prompt: {tokenizer.decode(prompts[0].ids)!r}")
            if "reward" in models and judge_args.rm_path is None:
                print(
                    "warning: no --rm_path, --reward_function or --reward_url: the critic and the reward model start "
                    "from --pretrain, so that the reward's head is random and the run shows that it works, no more"
                )
            print(ppo_models.plans(models, ranks.world_size, options), flush=True)
            save_path.mkdir(parents=True, exist_ok=True)
            write_config(save_path / "arguments.yaml", groups)

        learner = Learner(
            **ppo_models.place(models, judge, optim_args, iterations, device, options),
            pad_id=pad_id(tokenizer),
            stop_ids=frozenset([tokenizer.eos_token_id]),
            decode=tokenizer.decode,
            ranks=ranks,
            seed=optim_args.seed,
            rollout_args=rollout_args,
            reward_args=reward_args,
            ppo_args=ppo_args,
        )
        if ptx_samples:
            learner.ptx = PtxStream(ptx_samples, prompt_args.ptx_batch_size, learner.pad_id, learner.seed, ranks)
        if optim_args.ema_decay:
            learner.average = engine.WeightAverage(learner.actor.model, optim_args.ema_decay)
        cursor = (0, 0)
        if checkpoint is not None:
            cursor = load(checkpoint, learner, data_key)
        log = MetricsLog(
            save_path,
            ranks.is_first,
            learner.iteration,
            iterations,
            output_args.tensorboard,
            output_args.wandb_project,
            resolved(groups),
        )
        samples_log = SamplesLog(save_path, ranks.is_first, learner.iteration)

        while learner.iteration < iterations:
            chosen, cursor = next_prompts(len(prompts), rows, learner.seed, cursor)
            experience = collect(learner, [prompts[index] for index in chosen])
            metrics = learn(learner, experience)
            step = learner.iteration
            log.advance()
            if step % output_args.log_interval == 0 or step == iterations:
                episode = {"step": step, "episode": step * rows}
                log.write({**episode, **metrics, "peak_memory_bytes": peak_memory_bytes(device)})
                samples_log.write(step, experience, tokenizer.decode)
            if output_args.save_interval and step % output_args.save_interval == 0:
                save(checkpoints.path_for(save_path, step), learner, cursor, data_key)
                if ranks.is_first:
                    checkpoints.prune(save_path, output_args.save_total_limit)

        log.close()
        samples_log.close()
        export(save_path, learner, source, lora_args)
        if ranks.is_first:
            for name, part in (("actor", learner.actor), ("critic", learner.critic)):
                print(f"{name}:\n{memory_table(engine.memory_report(part.model))}")
            print(f"saved to {save_path}", flush=True)


def judge_of(judge_args):
    """The reward function, where no model rewards."""
    if judge_args.reward_function:
        return load_function(judge_args.reward_function)
    return http_reward(judge_args.reward_url) if judge_args.reward_url else None


def ptx_samples_of(prompt_args, tokenizer):
    if prompt_args.pretrain_dataset is None:
        return ()
    return load_samples(prompt_args.pretrain_dataset, tokenizer, prompt_args)[1].samples


def fingerprint(rows):
    """A short digest of token ids, by which a resumed run recognises its data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(row.ids, dtype=np.int32).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def save(folder, learner, cursor, data_key):
    """A checkpoint of the whole iteration. It is complete or not there: the folder gets its name at the end."""
    state = {
        "learner": learner.state(),
        "cursor": list(cursor),
        "data": data_key,
        "schedulers": [part.scheduler.state_dict() for part in (learner.actor, learner.critic)],
        "average": None if learner.average is None else learner.average.state(),
    }
    partial = folder.with_name("saving")
    if learner.ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run
    dist.barrier()
    engine.save_checkpoint(partial / "actor", learner.actor.model, learner.actor.optimizer, state=state)
    engine.save_checkpoint(partial / "critic", learner.critic.model, learner.critic.optimizer)
    if learner.ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    dist.barrier()


def load(folder, learner, data_key):
    """Go on from what `save` wrote; returns the cursor into the prompts."""
    engine.load_checkpoint(folder / "critic", learner.critic.model, learner.critic.optimizer)
    # The actor's last: it restores the random generators.
    state = engine.load_checkpoint(folder / "actor", learner.actor.model, learner.actor.optimizer)
    checkpoints.check_data(folder, state["data"], data_key)
    learner.load_state(state["learner"])
    for part, scheduler in zip((learner.actor, learner.critic), state["schedulers"], strict=True):
        checkpoints.restore_scheduler(part.scheduler, part.optimizer, scheduler)
    if learner.average is not None:
        if state["average"] is None:
            raise InputError(f"{folder} has no moving average: go on without --ema_decay")
        learner.average.load_state(state["average"])
    return tuple(state["cursor"])


def export(save_path, learner, source, lora_args):
    """The trained models in Hugging Face layout: actor/, critic/ and, where there is one, actor_ema/."""
    folders = {"actor": (learner.actor, None), "critic": (learner.critic, None)}
    if learner.average is not None:
        folders["actor_ema"] = (learner.actor, learner.average)
    for name, (part, average) in folders.items():
        folder = save_path / name
        if lora_args.lora_rank:
            save_adapter(folder, part.model, source.folder, learner.ranks.is_first)
        else:
            engine.save_pretrained(folder, part.model, weights=average and average.whole_weights())
        if learner.ranks.is_first:
            source.tokenizer.save_pretrained(folder)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--prompts", *argv]
    exit_on_input_error(lambda: train(*parse(GROUPS, argv, prog="megalith ppo")))


if __name__ == "__main__":
    main()
