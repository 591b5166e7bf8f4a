"""One reading of PPO on a small LLaMA, by TRL or by megalith, in a process of its own.

Run by its path, `python ppo_worker.py OPTIONS_JSON RESULT_FILE`. TRL lives in an environment of its own, where megalith
is not installed: each is imported only where it is measured. Both train four separate models of one shape with random
weights, on the same prompts, with answers of a forced length; the reward model is random too.
"""

import contextlib
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import psutil
import torch
import transformers

PACKAGES = ("torch", "transformers", "trl")


def main():
    options = types.SimpleNamespace(**json.loads(sys.argv[1]))
    generator = torch.Generator().manual_seed(0)
    count = options.batch_size * (options.updates + 1)
    # From 4 on: before come the tokens for padding, beginning and end.
    prompts = torch.randint(4, options.model["vocab_size"], (count, options.prompt_tokens), generator=generator)
    busy_s, cpu_s, start_s = machine_busy_s(), time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        ends, numel = PEERS[options.peer](options, prompts.tolist())
    wall_s = time.perf_counter() - start_s
    busy_s, cpu_s = machine_busy_s() - busy_s, time.process_time() - cpu_s
    if len(ends) != options.updates + 1:
        raise RuntimeError(f"{len(ends)} updates were made instead of {options.updates + 1}")
    update_s = [end - start for start, end in zip(ends, ends[1:], strict=False)]  # the first warms up
    tokens = options.batch_size * (options.prompt_tokens + options.new_tokens)
    seconds = statistics.median(update_s)
    metrics = {
        "tokens_per_s": tokens / seconds,
        "update_s": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "other_load_share": max(0.0, busy_s - cpu_s) / (wall_s * psutil.cpu_count()),
    }
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    Path(sys.argv[2]).write_text(json.dumps({"metrics": metrics, "numel": numel, "versions": versions}))


def machine_busy_s():
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def config_of(options, **others):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaConfig(**options.model, **special, **others)


# Each returns the times at which rollouts with all their updates ended, and the parameters of the policy.


def run_trl(options, prompts):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = {f"t{index}": index for index in range(options.model["vocab_size"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")), eos_token="t2", pad_token="t0"
    )
    torch.manual_seed(0)
    policy, reference = (transformers.AutoModelForCausalLM.from_config(config_of(options)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    scored = transformers.AutoModelForSequenceClassification
    critic, reward = (scored.from_config(config_of(options, num_labels=1)) for _ in range(2))
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    rows = Dataset.from_dict({"input_ids": prompts})
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            local_rollout_forward_batch_size=options.batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=options.epochs,
            total_episodes=options.batch_size * (options.updates + 1),
            response_length=options.new_tokens,
            temperature=1.0,
            missing_eos_penalty=None,
            learning_rate=options.lr,
            num_sample_generations=0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=options.precision == "bf16",
            gradient_checkpointing=False,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=rows,
            eval_dataset=rows.select(range(2)),
            callbacks=[Clock()],
        )
        trainer.train()
    return ends, sum(parameter.numel() for parameter in policy.parameters())


def run_megalith(options, prompts):
    from megalith.bench.ppo import forced_learner, four_models
    from megalith.rlhf import ppo_models
    from megalith.rlhf.experience import collect
    from megalith.rlhf.learner import PPOArguments, RewardArguments
    from megalith.rlhf.models import Source
    from megalith.rlhf.ppo import learn
    from megalith.rlhf.ppo_models import PPOOptimization
    from megalith.rlhf.prompts import Prompt
    from megalith.rlhf.rollout import RolloutArguments
    from megalith.rlhf.strategy import STRATEGIES, process_group

    source = Source(config_of(options), types.SimpleNamespace(pad_token_id=0), None)
    optimization = PPOOptimization(lr=options.lr, critic_lr=options.lr, lr_scheduler_type="constant")
    with process_group(torch.device("cpu")) as ranks:
        keywords = {**STRATEGIES["zero3"], "precision": options.precision, "max_grad_norm": 1.0, "seed": 0}
        learner = forced_learner(
            ppo_models.place(four_models(source), None, optimization, 1, ranks.device, keywords),
            ranks,
            rollout_args=RolloutArguments(
                experience_batch_size=options.batch_size, max_new_tokens=options.new_tokens, ignore_eos=True
            ),
            reward_args=RewardArguments(missing_eos_penalty=0.0),
            ppo_args=PPOArguments(
                train_batch_size=options.batch_size,
                ppo_epochs=options.epochs,
                old_logprobs="sampler",  # as TRL takes them
            ),
        )
        ends = []
        for start in range(0, len(prompts), options.batch_size):
            rows = [Prompt(tuple(row)) for row in prompts[start : start + options.batch_size]]
            metrics = learn(learner, collect(learner, rows))
            ends.append(time.perf_counter())
        if metrics["val/length"] != options.new_tokens or metrics["updates"] != options.epochs:
            raise RuntimeError(f"{metrics['val/length']} tokens an answer and {metrics['updates']} updates")
        numel = sum(parameter.numel() for parameter in learner.actor.model.parameters())
    return ends, numel


PEERS = {"trl": run_trl, "megalith": run_megalith}

if __name__ == "__main__":
    main()
