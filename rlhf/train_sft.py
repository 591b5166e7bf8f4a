"""Supervised fine-tuning: next-token loss on the answers only.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_sft --pretrain DIR --strategy zero3 --dataset
    data.json --save_path OUT

or `megalith sft …` with the same options. The loss of a step is the mean over every answer token of the whole batch,
over all ranks and micro-batches: how rows are split among them does not change it.
"""

import itertools
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import get_scheduler

from .. import engine
from . import checkpoints
from .arguments import (
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    StrategyArguments,
    parse,
    resolved,
    write_config,
)
from .batches import collate, deal, epoch_order, fit, steps_per_epoch, windows
from .data import read_conversations
from .errors import InputError, exit_on_input_error
from .losses import completion_loss_sum
from .metrics import MetricsLog, memory_table, peak_memory_bytes
from .models import build_on_meta, decay_groups, load_source
from .strategy import check_world_size, choose_device, engine_options, process_group
from .templates import encode, prompt_renderer, segments_of
from .tokenizer import pad_id

GROUPS = (ModelArguments, StrategyArguments, DataArguments, OptimizationArguments, OutputArguments)


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


def split(samples, eval_fraction, seed):
    """Return (training samples, held-out samples), the latter chosen by the seed."""
    held_out = max(1, round(len(samples) * eval_fraction)) if eval_fraction else 0
    if held_out >= len(samples):
        raise InputError(f"--eval_fraction {eval_fraction} leaves none of {len(samples)} rows to train on")
    order = epoch_order(len(samples), seed, epoch=0)
    return [samples[index] for index in order[held_out:]], [samples[index] for index in order[:held_out]]


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
        input_ids, labels = collate(micro_batch, pad, device)
        loss_sum += completion_loss_sum(model(input_ids=input_ids, use_cache=False).logits, labels)
    dist.all_reduce(loss_sum)
    model.train()
    return loss_sum.item() / sum(sample.loss_tokens for sample in samples)


def train(model_args, strategy_args, data_args, optim_args, output_args):
    groups = (model_args, strategy_args, data_args, optim_args, output_args)
    save_path = Path(output_args.save_path)

    # Everything that a user can get wrong is read before any rank waits for another.
    check_world_size(strategy_args)
    device = choose_device(strategy_args.device)
    options = engine_options(strategy_args, device, optim_args.max_grad_norm, optim_args.seed)
    checkpoint = checkpoints.choose(save_path, output_args.resume)
    source = load_source(model_args)
    tokenizer, pad = source.tokenizer, pad_id(source.tokenizer)
    model = build_on_meta(source, model_args.gradient_checkpointing)
    schema, sample_set = load_samples(data_args.dataset, tokenizer, data_args, data_args.max_datasets_size)
    samples, eval_samples = split(sample_set.samples, data_args.eval_fraction, optim_args.seed)
    if data_args.eval_dataset:
        eval_samples = load_samples(data_args.eval_dataset, tokenizer, data_args)[1].samples
    data_key = {"fingerprint": sample_set.fingerprint(), "samples": len(samples), "seed": optim_args.seed}

    with process_group(device) as ranks:
        deal_to = (ranks.rank, ranks.world_size, optim_args.batch_size)
        steps_an_epoch = steps_per_epoch(
            len(samples), ranks.world_size, optim_args.batch_size, optim_args.accumulation_steps
        )
        total_steps = optim_args.max_steps or optim_args.max_epochs * steps_an_epoch
        if ranks.is_first:
            describe_data(data_args.dataset, schema, sample_set, tokenizer)
            print(engine.plan(model, world_size=ranks.world_size, **options), flush=True)
            save_path.mkdir(parents=True, exist_ok=True)
            write_config(save_path / "arguments.yaml", groups)

        optimizer = torch.optim.AdamW(
            decay_groups(model, optim_args.weight_decay),
            lr=optim_args.lr,
            betas=(optim_args.adam_beta1, optim_args.adam_beta2),
        )
        model, optimizer = engine.initialize(model, optimizer, pretrained=source.folder, device=device, **options)
        model.train()
        warmup_steps = round(optim_args.warmup_ratio * total_steps)
        scheduler = get_scheduler(optim_args.lr_scheduler_type, optimizer, warmup_steps, total_steps)
        torch.manual_seed(optim_args.seed + ranks.rank)  # dropout differs between ranks

        step, cursor, loss_sum, loss_tokens = 0, (0, 0), 0.0, 0
        if checkpoint is not None:
            state = engine.load_checkpoint(checkpoint, model, optimizer)
            checkpoints.check_data(checkpoint, state["data"], data_key)
            step, cursor = state["step"], tuple(state["cursor"])
            loss_sum, loss_tokens = state["loss_sum"], state["loss_tokens"]
            checkpoints.restore_scheduler(scheduler, optimizer, state["scheduler"])

        log = MetricsLog(
            save_path,
            ranks.is_first,
            step,
            total_steps,
            output_args.tensorboard,
            output_args.wandb_project,
            resolved(groups),
        )
        if eval_samples and step == 0:
            log.write({"step": 0, "eval_loss": evaluate(model, eval_samples, deal_to, pad, device)})
        interval_start, interval_step, tokens = time.perf_counter(), step, 0

        for window in itertools.islice(
            windows(samples, *deal_to, optim_args.accumulation_steps, optim_args.seed, cursor), total_steps - step
        ):
            window_loss = torch.zeros((), dtype=torch.float64, device=device)
            for micro_batch in window.micro_batches:
                input_ids, labels = collate(micro_batch, pad, device)
                loss = completion_loss_sum(model(input_ids=input_ids, use_cache=False).logits, labels)
                # The engine averages gradients over the ranks; what is wanted is their sum over the tokens of the
                # whole window.
                optimizer.backward(loss * (ranks.world_size / window.loss_tokens))
                window_loss += loss.detach()
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            dist.all_reduce(window_loss)
            step += 1
            loss_sum += window_loss.item()
            loss_tokens += window.loss_tokens
            tokens += window.tokens
            log.advance()

            if step % output_args.log_interval == 0 or step == total_steps:
                elapsed_s = time.perf_counter() - interval_start
                log.write(
                    {
                        "step": step,
                        "epoch": window.epoch,
                        "loss": loss_sum / loss_tokens,
                        "lr": rate,
                        "grad_norm": optimizer.grad_norm,
                        "tokens_per_s": tokens / elapsed_s,
                        "step_time_s": elapsed_s / (step - interval_step),
                        "skipped_steps": optimizer.skipped_steps,
                        "peak_memory_bytes": peak_memory_bytes(device),
                    }
                )
                loss_sum, loss_tokens, tokens = 0.0, 0, 0
                interval_start, interval_step = time.perf_counter(), step
            at_end = step == total_steps
            if eval_samples and (at_end or (output_args.eval_interval and step % output_args.eval_interval == 0)):
                log.write({"step": step, "eval_loss": evaluate(model, eval_samples, deal_to, pad, device)})
            if output_args.save_interval and step % output_args.save_interval == 0:
                state = {
                    "step": step,
                    "cursor": window.cursor,
                    "loss_sum": loss_sum,
                    "loss_tokens": loss_tokens,
                    "scheduler": scheduler.state_dict(),
                    "data": data_key,
                }
                engine.save_checkpoint(checkpoints.path_for(save_path, step), model, optimizer, state=state)
                if ranks.is_first:
                    checkpoints.prune(save_path, output_args.save_total_limit)

        log.close()
        engine.save_pretrained(save_path, model)
        if ranks.is_first:
            tokenizer.save_pretrained(save_path)
            print(memory_table(engine.memory_report(model)))
            print(f"saved to {save_path}", flush=True)


def main(argv=None):
    exit_on_input_error(lambda: train(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith sft")))


if __name__ == "__main__":
    main()
