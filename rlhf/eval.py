"""Two models answer the same held-out prompts: reward, win rate, KL and length, and their answers side by side.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.eval --pretrain PPO_DIR --baseline SFT_DIR
    --rm_path RM_DIR --prompts held_out.jsonl --save_path OUT

or `megalith eval …` with the same options. Answers are sampled, judged and scored by the code that PPO trains with.
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

from transformers.hf_argparser import HfArg

from .arguments import ModelArguments, StrategyArguments, parse, write_config
from .checkpoints import open_folder
from .data import write_rows
from .errors import InputError, exit_on_input_error, require
from .eval_report import html_page, text_table
from .experience import collect
from .learner import Learner, Trained
from .learner import RewardArguments as RewardRules
from .models import build_on_meta, disable_dropout, load_source
from .prompts import read_prompts
from .reward_model import build_reward_model
from .rewards import load_function
from .rollout import RolloutArguments, check_room
from .strategy import check_world_size, choose_device, engine_options, process_group
from .tokenizer import pad_id
from .training import Preparation, load_into_engine


@dataclass(frozen=True)
class EvalArguments:
    """Against what, on what, and who judges."""

    baseline: str = HfArg(help="folder (or preset) of the model to compare --pretrain with; the KL is measured from it")
    prompts: str = HfArg(help="held-out prompts: csv with a column 'prompt', jsonl or a JSON array")
    rm_path: str | None = HfArg(default=None, help="folder of a reward model")
    reward_function: str | None = HfArg(default=None, help="or FILE.py:FUNCTION with (prompts, completions, **columns)")
    prompt_format: Literal["auto", "chat", "alpaca", "plain"] = HfArg(default="auto", help="as in training")
    max_prompt_len: int = HfArg(default=512, help="longer prompts are dropped, and counted")
    max_datasets_size: int | None = HfArg(default=None, help="read no more than this many prompts")
    samples: int = HfArg(default=20, help="prompts whose answers are shown side by side; samples.jsonl has all")
    seed: int = HfArg(default=42, help="of sampling")
    save_path: str = HfArg(default="runs/eval", help="folder for eval.json, samples.jsonl and samples.html")

    def __post_init__(self):
        given = [name for name in ("rm_path", "reward_function") if getattr(self, name)]
        require(len(given) == 1, "rm_path", self.rm_path, "given, or --reward_function, and not both")
        for name in ("max_prompt_len", "samples"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")


GROUPS = (ModelArguments, StrategyArguments, EvalArguments, RolloutArguments)


def mean_and_error(values):
    """(mean, standard error of the mean) of numbers."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def summary(scores, kl, lengths, stopped):
    """Numbers of one model over its answers: lists with one entry an answer (kl in nats, summed over the answer)."""
    reward, reward_error = mean_and_error(scores)
    divergence, divergence_error = mean_and_error(kl)
    return {
        "reward": reward,
        "reward_error": reward_error,
        "kl": divergence,
        "kl_error": divergence_error,
        "length": mean_and_error(lengths)[0],
        "truncated": 1 - mean_and_error(stopped)[0],
    }


def win_rate(scores, baseline_scores):
    """(share of prompts whose answer scores higher than the baseline's, a draw being half of one, its standard
    error)."""
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(scores, baseline_scores, strict=True)]
    return mean_and_error([float(win) for win in wins])


def answer_all(learner, prompts):
    """(scores, kl, lengths, stopped, answer texts) of the learner's model over `prompts`, lists in their order."""
    world_size = learner.ranks.world_size
    padded = [*prompts, *prompts[: -len(prompts) % world_size]]  # every rank answers as many
    experience = collect(learner, padded)
    kl = (experience.logprobs - experience.ref_logprobs).sum(1)
    answers = experience.rollout.answers[: len(prompts)]
    texts = [learner.decode(answer.ids[:-1] if answer.stopped else answer.ids) for answer in answers]
    count = len(prompts)
    lengths, stopped = [len(answer.ids) for answer in answers], [answer.stopped for answer in answers]
    return experience.scores.tolist()[:count], kl.tolist()[:count], lengths, stopped, texts


def evaluate(model_args, strategy_args, eval_args, rollout_args):
    groups = (model_args, strategy_args, eval_args, rollout_args)
    check_world_size(strategy_args)
    device = choose_device(strategy_args.device)
    preparation = Preparation(device, engine_options(strategy_args, device, None, eval_args.seed), None)
    source = load_source(model_args)
    sources = {"model": source}
    for name, option, other in (("baseline", "baseline", eval_args.baseline), ("judge", "rm_path", eval_args.rm_path)):
        if other:
            sources[name] = load_source(replace(model_args, pretrain=other, model="auto"), f"--{option}")
    for name, other in sources.items():
        if other.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise InputError(f"the {name} has another tokenizer than --pretrain, so it cannot read the same tokens")
    judge = load_function(eval_args.reward_function) if eval_args.reward_function else None
    tokenizer = source.tokenizer
    prompts, dropped = read_prompts(
        eval_args.prompts, tokenizer, eval_args.prompt_format, eval_args.max_prompt_len, eval_args.max_datasets_size
    )
    folder = open_folder(eval_args.save_path)

    with process_group(device) as ranks:

        def place(name, build):
            model = build(sources[name]).requires_grad_(False)
            disable_dropout(model)
            # A reward model without a head in its folder has nothing to say: missing weights are an error here.
            return load_into_engine(model, None, sources[name], preparation, allow_missing=())[0].eval()

        models = {name: place(name, build_on_meta) for name in ("model", "baseline")}
        for model in models.values():
            check_room(model, prompts, rollout_args, eval_args.prompts)
        reward = judge or place("judge", build_reward_model)
        results = {}
        for name, model in models.items():
            learner = Learner(
                actor=Trained(model, None, None),
                critic=None,
                reference=models["baseline"],
                reward=reward,
                pad_id=pad_id(tokenizer),
                stop_ids=frozenset([tokenizer.eos_token_id]),
                decode=tokenizer.decode,
                ranks=ranks,
                seed=eval_args.seed,
                rollout_args=rollout_args,
                reward_args=RewardRules(),
            )
            results[name] = answer_all(learner, prompts)
        if not ranks.is_first:
            return
        numbers = {name: summary(*result[:4]) for name, result in results.items()}
        rate, error = win_rate(results["model"][0], results["baseline"][0])
        report = {**numbers, "win_rate": rate, "win_rate_error": error, "prompts": len(prompts), "dropped": dropped}
        samples = [
            {
                "prompt": tokenizer.decode(prompt.ids),
                **{
                    name: {"answer": texts[row], "score": scores[row], "kl": kl[row]}
                    for name, (scores, kl, _, _, texts) in results.items()
                },
            }
            for row, prompt in enumerate(prompts)
        ]
        write_report(folder, report, samples, eval_args.samples, groups)
        print(text_table(report, samples[: eval_args.samples]))
        print(f"written to {folder}/eval.json, samples.jsonl and samples.html", flush=True)


def write_report(folder, report, samples, shown, groups):
    write_config(folder / "arguments.yaml", groups)
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_rows(folder / "samples.jsonl", samples)
    (folder / "samples.html").write_text(html_page(report, samples[:shown]), encoding="utf-8")


def main(argv=None):
    exit_on_input_error(lambda: evaluate(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith eval")))


if __name__ == "__main__":
    main()
