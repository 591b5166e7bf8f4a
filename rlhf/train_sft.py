"""Supervised fine-tuning: next-token loss on the answers only.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_sft --pretrain DIR --strategy zero3 --dataset
    data.json --save_path OUT

or `megalith sft …` with the same options. The loss of a step is the mean over every answer token of the whole batch,
over all ranks and micro-batches: how rows are split among them does not change it.
"""

import sys

import torch
import torch.distributed as dist

from .arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    PackingArguments,
    StrategyArguments,
    parse,
)
from .batches import deal, fit, language_model_inputs, split
from .data import read_conversations
from .errors import InputError, exit_on_input_error
from .eval_samples import answer_samples
from .lora import add_adapters
from .losses import completion_loss_sum
from .memory_plan import language_step, rows_on_meta
from .models import build_on_meta, check_positions, load_source
from .packing import check_packable, pack
from .strategy import process_group
from .templates import encode, prompt_renderer, segments_of
from .tokenizer import pad_id
from .training import RunOptions, TrainingRows, TrainingRun, prepare

GROUPS = (
    ModelArguments,
    LoraArguments,
    StrategyArguments,
    DataArguments,
    PackingArguments,
    OptimizationArguments,
    OutputArguments,
)


def load_samples(path, tokenizer, data_args, limit=None):
    """Return (schema name, SampleSet) of a dataset file. Raises InputError when no row has anything to learn."""
    schema, conversations = read_conversations(path, limit)
    render = prompt_renderer(tokenizer, data_args.prompt_format)
    samples = [segments for c in conversations for segments in segments_of(c, render, tokenizer.eos_token)]
    sample_set = fit(encode(samples, tokenizer), data_args.max_len)
    if not sample_set.samples:
        raise InputError(
            f"{path}: all {len(samples)} prompts fill --max_len {data_args.max_len} tokens, so nothing is left to learn"
        )
    return schema.name, sample_set


def describe_data(path, schema, sample_set, tokenizer):
    """What was found in the file: its schema, counts, and one sample with its loss mask."""
    sample = sample_set.samples[0]
    print(
        f"{path}: schema {schema}, {len(sample_set.samples)} samples, {sum(map(len, sample_set.samples))} tokens, "
        f"{sample_set.truncated} cut to the maximum length, {sample_set.dropped} dropped because their prompt fills it"
    )
    start = 0
    while start < len(sample):
        trained = sample.trained[start]
        end = start
        while end < len(sample) and sample.trained[end] == trained:
            end += 1
        print(f"  {'trained' if trained else 'not trained'}: {tokenizer.decode(sample.ids[start:end])!r}")
        start = end


@torch.no_grad()
def evaluate(model, samples, deal_to, pad, device):
    """Mean loss in nats a label over all samples; `deal_to`: (rank, world_size, batch_size)."""
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in deal(samples, *deal_to):
        inputs, labels = language_model_inputs(micro_batch, pad, device)
        loss_sum += completion_loss_sum(model(**inputs).logits, labels)
    dist.all_reduce(loss_sum)
    model.train()
    return {"eval_loss": loss_sum.item() / sum(sample.loss_tokens for sample in samples)}


def train_on(rows, held_out, model, source, ranks, preparation, options):
    """Train `model` on TrainingRows: the loop of supervised fine-tuning and of pretraining. Returns the ended run."""
    check_positions(source.config, [*rows.samples, *held_out])
    batch_size = options.optimization.batch_size
    pad, device = pad_id(source.tokenizer), preparation.device
    deal_to = (ranks.rank, ranks.world_size, batch_size)
    step = language_step(rows_on_meta(batch_size, max(map(len, rows.samples))))
    run = TrainingRun(model, source, rows, ranks, preparation, options, step)

    def log_evaluation():
        samples = answer_samples(model, held_out, source.tokenizer, ranks)
        run.log_evaluation(evaluate(model, held_out, deal_to, pad, device), samples)

    if held_out and run.step == 0:
        log_evaluation()

    for window in run.windows():
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch in window.micro_batches:
            inputs, labels = language_model_inputs(micro_batch, pad, device)
            loss = completion_loss_sum(model(**inputs).logits, labels)
            run.backward(loss, window.loss_tokens)
            loss_sum += loss.detach()
        run.finish_step(window, {"loss": loss_sum}, window.loss_tokens)
        if held_out and run.evaluates_now:
            log_evaluation()
        run.save_if_due()
    return run


def train(model_args, lora_args, strategy_args, data_args, packing_args, optim_args, output_args):
    groups = (model_args, lora_args, strategy_args, data_args, packing_args, optim_args, output_args)
    options = RunOptions(optim_args, output_args, groups)

    # Everything that a user can get wrong is read before any rank waits for another.
    preparation = prepare(model_args, lora_args, strategy_args, optim_args, output_args)
    source = load_source(model_args)

    def build():
        return build_on_meta(source, model_args.gradient_checkpointing)

    model = add_adapters(build(), lora_args, optim_args.seed)
    schema, found = load_samples(data_args.dataset, source.tokenizer, data_args, data_args.max_datasets_size)
    samples, held_out = split(found.samples, data_args.eval_fraction, optim_args.seed)
    if data_args.eval_dataset:
        held_out = load_samples(data_args.eval_dataset, source.tokenizer, data_args)[1].samples
    if packing_args.packing:
        check_packable(source.config)
        samples = pack(samples, data_args.max_len)

    with process_group(preparation.device) as ranks:
        if ranks.is_first:
            describe_data(data_args.dataset, schema, found, source.tokenizer)
        rows = TrainingRows(samples, found.fingerprint())
        run = train_on(rows, held_out, model, source, ranks, preparation, options)
        run.finish(source, lora_args, build)


def main(argv=None):
    exit_on_input_error(lambda: train(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith sft")))


if __name__ == "__main__":
    main()
