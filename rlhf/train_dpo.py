"""Direct preference optimisation: a policy that prefers the better answer more than its reference does.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_dpo --pretrain SFT_DIR --strategy zero3 --dataset
    pairs.jsonl --save_path OUT

or `megalith dpo …` with the same options. The reference is a frozen second copy of --pretrain; with --lora_rank it is
the policy with its adapters off, and takes no memory of its own.
"""

import sys
from dataclasses import dataclass, replace

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
from .batches import deal
from .decoding import evaluating
from .errors import InputError, exit_on_input_error
from .eval_samples import comparison_samples
from .logprobs import token_logprobs
from .lora import adapters_off, add_adapters
from .losses import ranking_loss_sum, ranking_metrics
from .memory_plan import Rehearsal, logprob_step
from .models import build_on_meta, disable_dropout, load_source
from .preferences import collate_comparisons
from .strategy import process_group
from .tokenizer import pad_id
from .train_rm import answers_on_meta, comparisons_of
from .training import RunOptions, TrainingRun, load_into_engine, prepare


@dataclass(frozen=True)
class DpoArguments:
    """How far the policy may go."""

    beta: float = HfArg(default=0.1, help="weight of the KL term that DPO stands for: larger stays nearer")

    def __post_init__(self):
        if self.beta <= 0:
            raise InputError(f"--beta is {self.beta}; it has to be > 0")


GROUPS = (
    ModelArguments,
    LoraArguments,
    StrategyArguments,
    DataArguments,
    OptimizationArguments,
    OutputArguments,
    DpoArguments,
)


def answer_logprobs(model, input_ids, answered):
    """log p(answer | prompt) [N], summed over the answers' own tokens."""
    return token_logprobs(model, input_ids, answered)[0].sum(1)


def with_adapters_off(step):
    """A Rehearsal's step that asks the policy without its adapters first."""

    def loss_of(policy):
        with torch.no_grad(), adapters_off(policy):
            step(policy)
        return step(policy)

    return loss_of


def implicit_rewards(policy, reference, comparisons, beta, pad, device):
    """(β (log π(answer) - log π_ref(answer)) float32 [N], the batch's Pairs): the rewards for which the policy is
    optimal under KL weight β (Rafailov et al. 2023, eq. 5), up to a term of the prompt alone. `reference`: a frozen
    model, or None for the policy without its adapters. Margins between answers are for reward models: here they are 0.
    """
    input_ids, answered, _, pairs = collate_comparisons(comparisons, pad, device)
    with torch.no_grad():
        if reference is not None:
            expected = answer_logprobs(reference, input_ids, answered)
        else:
            with adapters_off(policy):
                expected = answer_logprobs(policy, input_ids, answered)
    rewards = beta * (answer_logprobs(policy, input_ids, answered) - expected)
    return rewards, replace(pairs, margin=torch.zeros_like(pairs.margin))


@torch.no_grad()
def evaluate(policy, reference, comparisons, deal_to, beta, pad, device):
    """Mean loss, accuracy and margin over comparisons; `deal_to`: (rank, world_size, batch_size)."""
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(policy):
        for micro_batch in deal(comparisons, *deal_to):
            rewards, pairs = implicit_rewards(policy, reference, micro_batch, beta, pad, device)
            numbers = [ranking_loss_sum(rewards, pairs), *ranking_metrics(rewards, pairs).values()]
            totals += torch.stack([number.double() for number in numbers])
    dist.all_reduce(totals)
    names = ("eval_loss", "eval_accuracy", "eval_margin")
    return {name: total / len(comparisons) for name, total in zip(names, totals.tolist(), strict=True)}


def train(model_args, lora_args, strategy_args, data_args, optim_args, output_args, dpo_args):
    groups = (model_args, lora_args, strategy_args, data_args, optim_args, output_args, dpo_args)
    options = RunOptions(optim_args, output_args, groups)
    preparation = prepare(model_args, lora_args, strategy_args, optim_args, output_args)
    source = load_source(model_args)
    pad, device, beta = pad_id(source.tokenizer), preparation.device, dpo_args.beta

    def build():
        model = build_on_meta(source, model_args.gradient_checkpointing)
        disable_dropout(model)
        return model

    policy = add_adapters(build(), lora_args, optim_args.seed)
    rows, held_out, found = comparisons_of(source, data_args, optim_args.seed)

    with process_group(device) as ranks:
        if ranks.is_first:
            print(found)
        step = logprob_step(answers_on_meta(rows.samples, optim_args.batch_size))
        reference, others = None, {}
        if lora_args.lora_rank:
            step = with_adapters_off(step)
        else:
            reference = build().requires_grad_(False)
            others = {"reference": Rehearsal(reference, step, optim_args.accumulation_steps)}
        run = TrainingRun(policy, source, rows, ranks, preparation, options, step, others)
        if reference is not None:
            reference, _ = load_into_engine(reference, None, source, preparation, run.manager)
        deal_to = (ranks.rank, ranks.world_size, optim_args.batch_size)

        def log_evaluation():
            samples = comparison_samples(
                policy,
                held_out,
                source.tokenizer,
                lambda shown: implicit_rewards(policy, reference, shown, beta, pad, device)[0],
            )
            run.log_evaluation(evaluate(policy, reference, held_out, deal_to, beta, pad, device), samples)

        if held_out and run.step == 0:
            log_evaluation()

        for window in run.windows():
            sums = {name: torch.zeros((), device=device) for name in ("loss", "accuracy", "margin")}
            for micro_batch in window.micro_batches:
                rewards, pairs = implicit_rewards(policy, reference, micro_batch, beta, pad, device)
                loss = ranking_loss_sum(rewards, pairs)
                run.backward(loss, window.rows)
                sums["loss"] += loss.detach()
                for name, value in ranking_metrics(rewards, pairs).items():
                    sums[name] += value
            run.finish_step(window, sums, window.rows)
            if held_out and run.evaluates_now:
                log_evaluation()
            run.save_if_due()
        run.finish(source, lora_args, build)


def main(argv=None):
    exit_on_input_error(lambda: train(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith dpo")))


if __name__ == "__main__":
    main()
