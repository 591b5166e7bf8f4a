"""The demo: the whole pipeline on a small LLaMA, two ranks, ZeRO-3: pretraining, supervised fine-tuning, a reward model
and PPO, over checkable problems in two languages.

    python -m megalith.rlhf.demo

It makes its own data, tokenizer and random weights in a folder, which it empties first; every stage is the public
command. It ends with a table of every stage on held-out problems, a plot of the curves, and three dialogues. No network
and no GPU are needed.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from . import ppo_models
from .arguments import ModelArguments, StrategyArguments
from .data import write_rows
from .decoding import generate
from .demo_data import make_pairs, make_rows, make_texts, write_base_model
from .demo_report import print_report, read_jsonl, write_curves
from .memory_plan import Rehearsal, plans
from .models import load_source
from .run_stage import run_stage
from .sampling import SamplingOptions
from .strategy import engine_options
from .templates import encode_prompt, prompt_renderer
from .tokenizer import load_tokenizer

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Batches are over all ranks."""

    rows: int = 8000  # of text, and of instructions
    pairs: int = 16_000
    held_out: int = 1000  # problems that no stage trains on
    held_out_pairs: int = 400  # of those, as preferences
    pretrain_steps: int = 150
    sft_steps: int = 250
    rm_steps: int = 250
    ppo_iterations: int = 120
    batch_size: int = 64
    hidden_size: int = 128
    layers: int = 3


TINY = Sizes(
    rows=60,
    pairs=24,
    held_out=12,
    held_out_pairs=8,
    pretrain_steps=3,
    sft_steps=3,
    rm_steps=3,
    ppo_iterations=2,
    batch_size=8,
    hidden_size=32,
    layers=1,
)


def answers_of(folder, rows, temperature, seed=0):
    """The answers of the model in `folder` to the instructions of `rows`, as text; temperature 0 is greedy."""
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    render = prompt_renderer(tokenizer, "auto")
    prompts = [encode_prompt([{"role": "user", "content": row["instruction"]}], render, tokenizer) for row in rows]
    texts = []
    for start in tqdm(range(0, len(prompts), 100), desc=f"answers of {Path(folder).name}", unit="batch", leave=False):
        options = SamplingOptions(
            max_new_tokens=ANSWER_TOKENS,
            temperature=temperature,
            stop_ids=(tokenizer.eos_token_id,),
            seed=seed + start if temperature else None,
        )
        answers = generate(model, prompts[start : start + 100], options)
        texts += [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in answers]
    return texts


def memory_plan(folder, ranks):
    """What PPO, the largest stage, will take: its four models, from their shapes alone."""
    source = load_source(ModelArguments(pretrain=str(folder / "base")))
    models = {"actor": ppo_models.unplaced_actor(source), "critic": ppo_models.unplaced_critic(source)}
    models["reference"] = ppo_models.frozen(ppo_models.unplaced_actor(source))
    models["reward"] = ppo_models.unplaced_reward_model(source)
    options = engine_options(StrategyArguments(strategy="zero3"), torch.device("cpu"), 1.0, 0)
    return plans({name: Rehearsal(unplaced.model) for name, unplaced in models.items()}, options, ranks)


def supervised(sizes, ranks, steps, **others):
    """Options that the supervised stages have in common."""
    common = {"batch_size": sizes.batch_size // ranks, "accumulation_steps": 1, "max_len": 96, "max_steps": steps}
    common |= {"lr": 3e-3, "warmup_ratio": 0.05, "weight_decay": 0.1, "log_interval": max(1, steps // 10)}
    return others | {name: value for name, value in (common | engine_and_log()).items() if name not in others}


def engine_and_log():
    return {"strategy": "zero3", "precision": "fp32", "device": "cpu", "tensorboard": "false"}


def pretrain_and_fine_tune(folder, sizes, ranks):
    rows, held_out = make_rows(sizes.rows, sizes.held_out, seed=0)
    texts = write_rows(folder / "text.jsonl", make_texts(rows))
    sft = write_rows(folder / "sft.jsonl", rows)
    held_out = write_rows(folder / "held_out.jsonl", held_out)
    everything = (f"{text['text']} {row['instruction']}" for text, row in zip(make_texts(rows), rows, strict=True))
    write_base_model(folder / "base", everything, hidden_size=sizes.hidden_size, layers=sizes.layers)
    print(f"Memory plan of PPO, the largest stage:\n{memory_plan(folder, ranks)}")
    pretraining = {"pretrain": folder / "base", "dataset": texts, "save_path": folder / "pretrained"}
    run_stage("train_pretrain", ranks, **supervised(sizes, ranks, sizes.pretrain_steps, **pretraining))
    tuning = {"pretrain": folder / "pretrained", "dataset": sft, "save_path": folder / "sft", "eval_dataset": held_out}
    run_stage("train_sft", ranks, **supervised(sizes, ranks, sizes.sft_steps, **tuning))


def reward_model(folder, sizes, ranks):
    """Pairs from what the fine-tuned model answers to problems of its training set, and a judge that learns them."""
    rows, held_out = make_rows(sizes.pairs, sizes.held_out_pairs, seed=1)
    answers = answers_of(folder / "sft", [*rows, *held_out], temperature=1.0)
    pairs = write_rows(folder / "pairs.jsonl", make_pairs(rows, answers[: len(rows)]))
    held_out = write_rows(folder / "held_out_pairs.jsonl", make_pairs(held_out, answers[len(rows) :], seed=1))
    judging = {"pretrain": folder / "sft", "dataset": pairs, "save_path": folder / "rm", "eval_dataset": held_out}
    run_stage("train_rm", ranks, **supervised(sizes, ranks, sizes.rm_steps, lr=1e-3, **judging))


def reinforce(folder, sizes, ranks):
    prompts = [{"prompt": row["instruction"]} for row in make_rows(sizes.rows, 0, seed=2)[0]]
    options = {"prompts": write_rows(folder / "prompts.jsonl", prompts), "pretrain_dataset": folder / "sft.jsonl"}
    options |= {"pretrain": folder / "sft", "rm_path": folder / "rm", "save_path": folder / "ppo"}
    options |= {"num_episodes": 1, "max_timesteps": sizes.ppo_iterations, "max_new_tokens": ANSWER_TOKENS}
    options |= {"experience_batch_size": 2 * sizes.batch_size // ranks, "train_batch_size": sizes.batch_size // ranks}
    options |= {"ppo_epochs": 2, "ptx_batch_size": sizes.batch_size // 2 // ranks, "ptx_coef": 0.5, "kl_coef": 0.05}
    options |= {"lr": 3e-4, "critic_lr": 5e-4, "log_interval": max(1, sizes.ppo_iterations // 20)}
    run_stage("train_ppo", ranks, **options | engine_and_log())


def evaluate(folder, name, model, sizes, ranks):
    """Reward of `model`, and its KL from the fine-tuned model, on the held-out problems; written to eval/NAME."""
    options = {"pretrain": model, "baseline": folder / "sft", "rm_path": folder / "rm", "samples": 1}
    options |= {"prompts": folder / "held_out.jsonl", "max_new_tokens": ANSWER_TOKENS, "experience_batch_size": 100}
    options |= {"strategy": "zero3", "device": "cpu", "save_path": folder / "eval" / name}
    run_stage("eval", ranks, **options)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder, emptied first")
    parser.add_argument("--ranks", type=int, default=2, help="processes; 1 runs every stage in this one")
    parser.add_argument("--tiny", action="store_true", help="next to nothing of everything: does it run?")
    options = parser.parse_args(argv)
    folder, ranks, sizes, start = options.output, options.ranks, TINY if options.tiny else Sizes(), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"Everything is written to {folder.resolve()}")

    pretrain_and_fine_tune(folder, sizes, ranks)
    reward_model(folder, sizes, ranks)
    reinforce(folder, sizes, ranks)
    stages = {"random": "base", "pretrained": "pretrained", "SFT": "sft", "PPO": "ppo/actor"}
    for name in ("random", "pretrained", "PPO"):  # SFT is the baseline of each
        evaluate(folder, name, folder / stages[name], sizes, ranks)

    held_out = read_jsonl(folder / "held_out.jsonl")
    greedy = {name: answers_of(folder / path, held_out, temperature=0) for name, path in stages.items()}
    write_curves(folder, folder / "curves.png")
    print_report(folder, held_out, greedy)
    print(f"\n{time.perf_counter() - start:.0f} s in all; curves.png and every stage's files are in {folder.resolve()}")


if __name__ == "__main__":
    main()
