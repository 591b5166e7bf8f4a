"""The reward model: a score for every answer, learned from which of them was preferred.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_rm --pretrain DIR --strategy zero3 --dataset
    pairs.jsonl --eval_fraction 0.1 --save_path OUT

or `megalith rm …` with the same options. The loss of a step is the mean over the prompts of the whole batch, each
prompt's being the mean over its pairs of answers; all answers of a prompt are scored in one forward pass each.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from transformers.hf_argparser import HfArg

from .arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    StrategyArguments,
    parse,
)
from .batches import deal, split
from .errors import InputError, exit_on_input_error
from .eval_samples import comparison_samples
from .lora import add_adapters
from .losses import ranking_loss_sum, ranking_metrics
from .memory_plan import rows_on_meta, score_step
from .models import check_positions, load_source
from .preferences import collate_comparisons, encode_preferences, fit_comparisons, read_preferences
from .reward_model import build_reward_model, last_token_scores, set_normalization
from .strategy import process_group
from .templates import prompt_renderer
from .tokenizer import pad_id
from .training import RunOptions, TrainingRows, TrainingRun, prepare


@dataclass(frozen=True)
class RewardArguments:
    """How answers are compared."""

    loss_fn: Literal["log_sig", "log_exp"] = HfArg(default="log_sig", help="two names of one loss, both stable")
    center_rewards_coefficient: float = HfArg(default=0.0, help="weight of the squared sum of a pair's scores")


GROUPS = (
    ModelArguments,
    LoraArguments,
    StrategyArguments,
    DataArguments,
    OptimizationArguments,
    OutputArguments,
    RewardArguments,
)


def load_comparisons(path, tokenizer, data_args, limit=None):
    """Return (schema name, SampleSet of Comparisons). Raises InputError when none is left to learn from."""
    schema, preferences = read_preferences(path, limit)
    render = prompt_renderer(tokenizer, data_args.prompt_format)
    comparisons = fit_comparisons(encode_preferences(preferences, render, tokenizer), data_args.max_len)
    if not comparisons.samples:
        raise InputError(
            f"{path}: none of {len(preferences)} comparisons can be learned: their answers are too long for --max_len "
            f"{data_args.max_len}, tied, the same, or of different prompts"
        )
    return schema.name, comparisons


def comparisons_of(source, data_args, seed):
    """(TrainingRows, held-out Comparisons, what was found as one line). Raises InputError."""
    schema, found = load_comparisons(data_args.dataset, source.tokenizer, data_args, data_args.max_datasets_size)
    comparisons, held_out = split(found.samples, data_args.eval_fraction, seed)
    if data_args.eval_dataset:
        held_out = load_comparisons(data_args.eval_dataset, source.tokenizer, data_args)[1].samples
    check_positions(source.config, [*comparisons, *held_out])
    return TrainingRows(comparisons, found.fingerprint()), held_out, description(data_args.dataset, schema, found)


def description(path, schema, comparisons):
    """What was found in the file, in counts: the text itself may be offensive."""
    answers = sum(len(comparison.answers) for comparison in comparisons.samples)
    return (
        f"{path}: schema {schema}, {len(comparisons.samples)} comparisons of {answers} answers, "
        f"{sum(map(len, comparisons.samples))} tokens, {comparisons.truncated} prompts cut on the left, "
        f"{comparisons.dropped} dropped (answers too long, tied, the same, or of different prompts)"
    )


def answers_on_meta(comparisons, batch_size):
    """A micro-batch of `batch_size` comparisons, each with most answers and each answer the longest."""
    longest = max(len(answer) for comparison in comparisons for answer in comparison.answers)
    return rows_on_meta(batch_size * max(len(comparison.answers) for comparison in comparisons), longest)


def score(model, comparisons, pad, device):
    """(scores float32 [N] of all answers of a batch, its Pairs)."""
    input_ids, _, mask, pairs = collate_comparisons(comparisons, pad, device)
    return last_token_scores(model(input_ids), mask), pairs


@torch.no_grad()
def evaluate(model, comparisons, deal_to, pad, device, reward_args):
    """Mean loss, accuracy and margin over comparisons, and mean and standard deviation of all answers' scores;
    `deal_to`: (rank, world_size, batch_size)."""
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64, device=device)
    for micro_batch in deal(comparisons, *deal_to):
        scores, pairs = score(model, micro_batch, pad, device)
        real = [c.loss_tokens > 0 for c in micro_batch for _ in c.answers]
        counted = scores[torch.tensor(real, device=device)].double()
        numbers = [ranking_loss_sum(scores, pairs, reward_args.loss_fn), *ranking_metrics(scores, pairs).values()]
        numbers += [counted.sum(), counted.square().sum(), counted.new_tensor(len(counted))]
        totals += torch.stack([number.double() for number in numbers])
    dist.all_reduce(totals)
    model.train()
    loss, accuracy, margin, total, squares, count = totals.tolist()
    mean = total / count
    return {
        "eval_loss": loss / len(comparisons),
        "eval_accuracy": accuracy / len(comparisons),
        "eval_margin": margin / len(comparisons),
        "mean": mean,
        "std": math.sqrt(max(squares / count - mean**2, 0.0)),
    }


def train(model_args, lora_args, strategy_args, data_args, optim_args, output_args, reward_args):
    groups = (model_args, lora_args, strategy_args, data_args, optim_args, output_args, reward_args)
    options = RunOptions(optim_args, output_args, groups)
    preparation = prepare(model_args, lora_args, strategy_args, optim_args, output_args)
    source = load_source(model_args)
    pad, device = pad_id(source.tokenizer), preparation.device

    def build():
        return build_reward_model(source, model_args.gradient_checkpointing)

    model = add_adapters(build(), lora_args, optim_args.seed)
    rows, held_out, found = comparisons_of(source, data_args, optim_args.seed)

    with process_group(device) as ranks:
        if ranks.is_first:
            print(found)
        step = score_step(answers_on_meta(rows.samples, optim_args.batch_size))
        run = TrainingRun(model, source, rows, ranks, preparation, options, step)
        deal_to = (ranks.rank, ranks.world_size, optim_args.batch_size)

        def log_evaluation():
            samples = comparison_samples(
                model, held_out, source.tokenizer, lambda shown: score(model, shown, pad, device)[0]
            )
            run.log_evaluation(evaluate(model, held_out, deal_to, pad, device, reward_args), samples)

        if held_out and run.step == 0:
            log_evaluation()

        for window in run.windows():
            sums = {"loss": torch.zeros((), device=device)}
            sums |= {"accuracy": torch.zeros((), device=device), "margin": torch.zeros((), device=device)}
            for micro_batch in window.micro_batches:
                scores, pairs = score(model, micro_batch, pad, device)
                loss = ranking_loss_sum(scores, pairs, reward_args.loss_fn, reward_args.center_rewards_coefficient)
                run.backward(loss, window.rows)
                sums["loss"] += loss.detach()
                for name, value in ranking_metrics(scores, pairs).items():
                    sums[name] += value
            run.finish_step(window, sums, window.rows)
            if held_out and run.evaluates_now:
                log_evaluation()
            run.save_if_due()

        # The statistics by which PPO normalises scores, of answers that were not trained on where there are any.
        statistics = evaluate(model, held_out or rows.samples, deal_to, pad, device, reward_args)
        set_normalization(model.config, statistics["mean"], statistics["std"])
        run.finish(source, lora_args, build)


def main(argv=None):
    exit_on_input_error(lambda: train(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith rm")))


if __name__ == "__main__":
    main()
