"""PPO on GPT-2 shapes with random weights and prompts, as the original announcement measured it.

    python -m megalith.bench.ppo --model s --strategy colossalai_gemini_cpu --experience_batch_size 1
    python -m megalith.bench.ppo --model xl --strategy colossalai_zero2 --plan
    python -m megalith.bench.ppo --model s --strategy torch gemini_cpu --json record.json      # side by side
    python -m megalith.bench.ppo --recipe trl --trl_python ../peers/bin/python                 # see ppo_trl

Actor and critic have the same size, the reward model and the reference theirs too. `torch` is the baseline: four plain
models and torch's AdamW under the same loop. The first round warms up and is not counted. Answers have a forced length.
Where the stored bytes do not fit, the run ends with the plan and the reason; `--plan` prints the plan alone.
"""

import argparse
import gc
import json
import math
import os
import shutil
import sys
from pathlib import Path

import psutil
import torch
from transformers import GPT2Config

from .. import engine
from ..rlhf import memory_plan, ppo_models
from ..rlhf.arguments import StrategyArguments
from ..rlhf.errors import InputError, exit_on_input_error
from ..rlhf.experience import collect
from ..rlhf.learner import Learner, PPOArguments, RewardArguments, Trained
from ..rlhf.metrics import peak_memory_bytes
from ..rlhf.models import Source, disable_dropout, enable_checkpointing
from ..rlhf.ppo import learn
from ..rlhf.ppo_models import PPOOptimization
from ..rlhf.prompts import Prompt
from ..rlhf.rollout import RolloutArguments
from ..rlhf.strategy import STRATEGIES, choose_device, engine_options, process_group
from ..rlhf.tokenizer import byte_tokenizer
from . import ppo_trl, report

PRESETS = {  # width, layers, heads
    "tiny": (64, 2, 4),  # not in the announcement: tries the benchmark itself
    "s": (768, 12, 12),
    "m": (1024, 24, 16),
    "l": (1280, 36, 20),
    "xl": (1600, 48, 25),
    "2b": (2048, 40, 16),
    "4b": (2304, 64, 16),
    "6b": (4096, 30, 16),
    "8b": (4096, 40, 16),
    "10b": (4096, 50, 16),
    "12b": (4096, 60, 16),
    "15b": (4096, 78, 16),
    "18b": (4096, 90, 16),
    "20b": (8192, 25, 16),
    "24b": (8192, 30, 16),
    "28b": (8192, 35, 16),
    "32b": (8192, 40, 16),
    "36b": (8192, 45, 16),
    "40b": (8192, 50, 16),
    "175b": (12288, 96, 96),
}
RECIPES = {"forced": (256, 256), "announcement": (400, 112)}  # tokens of a prompt, and of its answer
BASELINE = "torch"


def config_of(model):
    width, layers, heads = PRESETS[model]
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=1024)


def four_models(source, gradient_checkpointing=False):
    """Of one shape, on meta."""
    return {
        "actor": ppo_models.unplaced_actor(source, gradient_checkpointing),
        "critic": ppo_models.unplaced_critic(source, gradient_checkpointing),
        "reference": ppo_models.frozen(ppo_models.unplaced_actor(source)),
        "reward": ppo_models.unplaced_reward_model(source),
    }


def forced_learner(placed, ranks, **rules):
    """A Learner whose answers never stop and are never shown. `rules`: rollout_args, reward_args and ppo_args."""
    return Learner(**placed, pad_id=0, stop_ids=frozenset(), decode=None, ranks=ranks, seed=0, **rules)


def unplaced_models(args):
    source = Source(config_of(args.model), byte_tokenizer(), None)
    return four_models(source, args.gradient_checkpointing), source.config


class PlainAdamW(torch.optim.AdamW):
    """torch's own, with the two lines that a plain loop has around it."""

    def __init__(self, parameters, max_grad_norm, **options):
        super().__init__(parameters, fused=True, **options)
        self._max_grad_norm = max_grad_norm
        self.grad_norm = float("nan")
        self.skipped_steps = 0

    def backward(self, loss):
        loss.backward()

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        return super().step(closure)


def place_plain(models, optimization, device, dtype):
    """Four plain models with random weights, in memory for good."""
    placed = {}
    for name, unplaced in models.items():
        torch.manual_seed(optimization.seed)  # so that the reference is the actor
        with torch.device(device):
            model = type(unplaced.model)(unplaced.model.config).to(dtype)
        disable_dropout(model)
        if any(getattr(module, "gradient_checkpointing", False) for module in unplaced.model.modules()):
            enable_checkpointing(model)
        if name in ("actor", "critic"):
            options = dict(lr=optimization.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
            optimizer = PlainAdamW(model.parameters(), optimization.max_grad_norm, **options)
            placed[name] = Trained(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
        else:
            placed[name] = model.requires_grad_(False).eval()
    return placed


def measure(strategy, args, ranks):
    """Metrics of one strategy, {name: [reading, …]}: a reading for each round but the first."""
    models, config = unplaced_models(args)
    numel = sum(p.numel() for p in models["actor"].model.parameters())
    optimization = PPOOptimization(lr_scheduler_type="constant", lr=1e-5, critic_lr=1e-5)
    if strategy == BASELINE:
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        placed = place_plain(models, optimization, ranks.device, dtype)
    else:
        placed = ppo_models.place(models, None, optimization, 1, ranks.device, options_of(strategy, args, ranks.device))
    learner = forced_learner(
        placed,
        ranks,
        rollout_args=RolloutArguments(
            experience_batch_size=args.experience_batch_size,
            update_timesteps=args.update_timesteps,
            max_new_tokens=args.new_tokens,
            ignore_eos=True,
            gather_for_generation="never" if strategy == BASELINE else "auto",
        ),
        reward_args=RewardArguments(),
        ppo_args=PPOArguments(train_batch_size=args.train_batch_size, ppo_epochs=args.max_epochs),
    )
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    rows = args.experience_batch_size * args.update_timesteps * ranks.world_size
    readings = []
    for _ in range(args.rounds + 1):
        ids = torch.randint(0, config.vocab_size, (rows, args.prompt_tokens), generator=generator).tolist()
        metrics = learn(learner, collect(learner, [Prompt(tuple(row)) for row in ids]))
        readings.append(reading_of(metrics, args, numel, config, rows, ranks))
    memory = {"peak_process_bytes": [float(peak_memory_bytes(ranks.device))]}
    if strategy != BASELINE:
        memory |= stored_bytes(learner)
    return {**{name: [reading[name] for reading in readings[1:]] for name in readings[0]}, **memory}


def stored_bytes(learner):
    """The engines' own peaks, summed by tier."""
    models = [learner.actor.model, learner.critic.model, learner.reference, learner.reward]
    peaks = {}
    for model in models:
        for tier, payloads in engine.memory_report(model).items():
            peaks[tier] = peaks.get(tier, 0) + payloads["total"]["peak_bytes"]
    return {f"{tier}_stored_peak_bytes": [float(nbytes)] for tier, nbytes in peaks.items()}


def reading_of(metrics, args, numel, config, rows, ranks):
    per_rank, total_s = rows / ranks.world_size, metrics["timing/step_total"]
    return {
        "samples_per_s": rows / total_s,
        "generated_tokens_per_s": rows * args.new_tokens / metrics["timing/generation"],
        "tflops_with_cache": flops(args, numel, config, cached=True) * per_rank / total_s / 1e12,
        "tflops_without_cache": flops(args, numel, config, cached=False) * per_rank / total_s / 1e12,
        "generation_s": metrics["timing/generation"],
        "experience_s": metrics["timing/make_experience"],
        "train_s": metrics["timing/ppo_train"],
    }


def flops(args, numel, config, cached):
    """Floating-point operations of one episode: 2 a weight and token, and 4·width a layer for each pair of tokens that
    attend. `cached=False` counts generation as the announcement did: each token by a pass over all before it, which
    nobody does. A backward pass is two forward passes, and a third where activations are computed again."""

    def forward(tokens):
        return 2.0 * numel * tokens + 4.0 * config.n_embd * config.n_layer * tokens * (tokens + 1) / 2

    prompt, new = args.prompt_tokens, args.new_tokens
    generation = forward(prompt + new) if cached else sum(forward(prompt + t) for t in range(new))
    training = 2 * (4 if args.gradient_checkpointing else 3) * args.max_epochs
    return generation + (4 + training) * forward(prompt + new)


# What fits


def options_of(strategy, args, device):
    """Keywords of `engine.initialize`. A strategy that keeps nothing on a drive is not told of one: others beside it
    may. Raises InputError."""
    placement = STRATEGIES.get(strategy, {}).get("placement")
    if placement == "nvme" and args.nvme_dir is None:
        raise InputError(f"--strategy {strategy} needs --nvme_dir, a folder on a local drive")
    if args.nvme_dir is not None and not os.path.isdir(args.nvme_dir):
        raise InputError(f"--nvme_dir {args.nvme_dir}: no such folder")
    arguments = StrategyArguments(
        strategy=strategy,
        precision=args.precision,
        device=args.device,
        device_budget=args.device_budget,
        host_budget=args.host_budget,
        nvme_dir=args.nvme_dir if placement in ("nvme", "auto") else None,
    )
    return engine_options(arguments, device, 1.0, 0)


def planned(strategy, args, device, world_size):
    """(the plan as text, bytes by tier): of the engine's models, or of four plain ones."""
    models, _ = unplaced_models(args)
    if strategy != BASELINE:
        options, totals = options_of(strategy, args, device), {}
        for unplaced in models.values():
            plan = engine.plan(unplaced.model, world_size=world_size, **options)
            for tier, nbytes in plan.peak_bytes.items():
                totals[tier.value] = totals.get(tier.value, 0) + nbytes
        rehearsals = {name: memory_plan.Rehearsal(unplaced.model) for name, unplaced in models.items()}
        return memory_plan.plans(rehearsals, options, world_size), totals
    itemsize = 2 if args.precision == "bf16" else 4
    count = {name: sum(p.numel() for p in unplaced.model.parameters()) for name, unplaced in models.items()}
    stored = sum(count.values()) * itemsize + 3 * itemsize * (count["actor"] + count["critic"])
    text = f"four plain models, weights, gradients and two moments of two: {stored / 1e6:,.1f} MB, without activations"
    return text, {"device": stored}


def why_it_cannot_fit(totals, device, nvme_dir=None):
    """The reason why the planned bytes of a rank, {tier: bytes}, are more than this machine has, or None. The ranks of
    a machine share its memory and its drive."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = {"host": totals.get("host", 0) * local_ranks, "nvme": totals.get("nvme", 0) * local_ranks}
    limits = {"host": psutil.virtual_memory().total, "nvme": math.inf}
    if device.type == "cuda":
        needed["device"] = totals.get("device", 0)
        limits["device"] = torch.cuda.get_device_properties(device).total_memory
    else:  # both tiers are the same memory
        needed["host"] += totals.get("device", 0) * local_ranks
    if nvme_dir is not None:
        limits["nvme"] = shutil.disk_usage(nvme_dir).free
    for tier, nbytes in needed.items():
        if nbytes > limits[tier]:
            return (
                f"the {tier} would have to hold {nbytes / 1e9:,.1f} GB and has {limits[tier] / 1e9:,.1f} GB: "
                "take a smaller model, more ranks, another strategy, or bf16"
            )
    return None


def run(args):
    device = choose_device("cpu" if args.recipe == "trl" else args.device)
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    if args.recipe == "trl":
        ppo_trl.run(args)
        return
    for strategy in args.strategy:  # before the first is measured
        if strategy != BASELINE:
            options_of(strategy, args, device)
    rows = []
    with process_group(device) as ranks:
        for strategy in args.strategy:  # peaks are the process's: measure memory one strategy a run
            text, totals = planned(strategy, args, device, ranks.world_size)
            reason = why_it_cannot_fit(totals, device, args.nvme_dir)
            if ranks.is_first and (args.plan or reason):
                print(f"{args.model}, {strategy}:\n{text}", flush=True)
            if args.plan:
                continue
            if reason:
                raise InputError(f"--model {args.model} --strategy {strategy} cannot run here: {reason}")
            rows.append({"name": strategy, "note": "", "metrics": measure(strategy, args, ranks)})
            gc.collect()  # the models are gone before the next strategy's
        if ranks.is_first and rows:
            finish(rows, args, device, ranks)


def finish(rows, args, device, ranks):
    settings = {
        "model": args.model,
        "precision": args.precision,
        "ranks": ranks.world_size,
        "tokens": f"{args.prompt_tokens} + {args.new_tokens} forced",
        "experience batch": args.experience_batch_size,
        "train batch": args.train_batch_size,
        "batches a rollout": args.update_timesteps,
        "epochs": args.max_epochs,
        "activation checkpointing": args.gradient_checkpointing,
        "rounds": f"{args.rounds} after one that is not counted",
    }
    record = {
        "benchmark": "ppo",
        "environment": report.environment(device.type),
        "settings": settings,
        "rows": rows,
        "checks": [],
    }
    if args.json:
        record["rows"] = earlier_rows(record, args.json) + rows
        report.save(record, args.json)
    print(report.render(record), flush=True)


def earlier_rows(record, path):
    """Rows of other strategies that a run with the same settings has left in the file: a process whose peak is that of
    one strategy measures one, and a table is collected by a run each."""
    if not Path(path).exists():
        return []
    earlier = json.loads(Path(path).read_text())
    if earlier["settings"] != record["settings"]:
        return []
    measured = {row["name"] for row in record["rows"]}
    return [row for row in earlier["rows"] if row["name"] not in measured]


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.ppo", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--model", choices=list(PRESETS), default="s")
    parser.add_argument(
        "--strategy",
        nargs="+",
        default=["gemini_cuda"],
        help="ddp, zero2, zero3, gemini_{cuda,cpu,auto,nvme}, torch, …; with several, memory peaks are of the process",
    )
    parser.add_argument("--recipe", choices=[*RECIPES, "trl"], default="announcement")
    parser.add_argument("--prompt_tokens", type=int, help="instead of the recipe's")
    parser.add_argument("--new_tokens", type=int, help="instead of the recipe's")
    parser.add_argument("--experience_batch_size", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--update_timesteps", type=int, default=1)
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--device_budget")
    parser.add_argument("--host_budget")
    parser.add_argument("--nvme_dir")
    parser.add_argument("--plan", action="store_true", help="print the memory plan instead of running")
    parser.add_argument(
        "--json", help="where to keep the record; rows of other strategies in it stay if all else is the same"
    )
    parser.add_argument("--trl_python", help=f"--recipe trl: an interpreter that has it; or ${ppo_trl.TRL_VARIABLE}")
    parser.add_argument("--updates", type=int, default=8, help="--recipe trl: rollouts a reading")
    args = parser.parse_args(argv)
    args.strategy = [name.removeprefix("colossalai_") for name in args.strategy]
    prompt, new = RECIPES.get(args.recipe, RECIPES["announcement"])
    args.prompt_tokens, args.new_tokens = args.prompt_tokens or prompt, args.new_tokens or new
    for name in (
        "prompt_tokens",
        "new_tokens",
        "experience_batch_size",
        "train_batch_size",
        "max_epochs",
        "rounds",
        "updates",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, and has to be at least 1")
    if args.prompt_tokens + args.new_tokens > 1024:
        parser.error("GPT-2 has 1,024 positions: take fewer tokens")
    return args


def main(argv=None):
    exit_on_input_error(lambda: run(parse_args(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
