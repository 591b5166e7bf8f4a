"""What the supervised stages share: one optimizer's way through the windows of a dataset, with metrics, checkpoints and
exact resumption. The loop itself, and what is computed in it, is each stage's own.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from transformers import get_scheduler

from .. import engine
from . import checkpoints, lora, memory_plan, reward_model
from .arguments import OptimizationArguments, OutputArguments, resolved, write_config
from .batches import steps_per_epoch, windows
from .errors import naming_input
from .metrics import MetricsLog, PeakMemory, Throughput, memory_table
from .models import decay_groups
from .samples import SamplesLog
from .strategy import check_checkpointing, check_world_size, choose_device, engine_options, split_budgets


@dataclass(frozen=True)
class Preparation:
    """What a user can get wrong in the options, read before any rank waits for another."""

    device: torch.device
    options: dict  # keywords of engine.initialize
    checkpoint: Path | None  # to resume from


def prepare(model_args, lora_args, strategy_args, optim_args, output_args):
    checkpoints.check_kind(output_args.save_path, is_adapter=lora_args.saves_adapters)
    check_world_size(strategy_args)
    check_checkpointing(strategy_args, model_args)
    device = choose_device(strategy_args.device)
    options = engine_options(strategy_args, device, optim_args.max_grad_norm, optim_args.seed)
    return Preparation(device, options, checkpoints.choose(output_args.save_path, output_args.resume))


NEW_PARAMETERS = (*lora.NEW_PARAMETERS, *reward_model.NEW_PARAMETERS)


def load_into_engine(model, optimizer, source, preparation, manager=None, allow_missing=NEW_PARAMETERS, rates=None):
    """`engine.initialize` with the weights of `source`; adapters and a new score head keep their own initial values.
    `manager`: has the budgets of `preparation`, for several models. `rates`: measured already."""
    options = preparation.options if manager is None else split_budgets(preparation.options)[1]
    with naming_input(ValueError):
        return engine.initialize(
            model,
            optimizer,
            pretrained=source.folder,
            allow_missing=allow_missing,
            stored_name=lora.stored_name,
            device=preparation.device,
            manager=manager,
            rates=rates,
            **options,
        )


@dataclass(frozen=True)
class RunOptions:
    """What a user has chosen, as far as a run reads it."""

    optimization: OptimizationArguments
    output: OutputArguments
    groups: tuple  # all argument groups of the stage, written beside the model


@dataclass(frozen=True)
class TrainingRows:
    """What windows are made of, and by what a resumed run knows that it is the same."""

    samples: tuple
    fingerprint: str


class TrainingRun:
    """The model, its optimizer and schedule, at some step of a run. Made by every rank, inside the process group.

    `step`: what the model does with a micro-batch, for the plan (memory_plan.Rehearsal); `others`: {name: Rehearsal} of
    the run's other models, which share its `manager`.
    """

    def __init__(self, model, source, rows, ranks, preparation, options, step, others=MappingProxyType({})):
        optim_args, output_args = options.optimization, options.output
        self.ranks, self.device = ranks, preparation.device
        self.save_path = checkpoints.open_folder(output_args.save_path)
        self._optim_args, self._output_args = optim_args, output_args
        self._samples = rows.samples
        count = len(rows.samples)
        self._data_key = {"fingerprint": rows.fingerprint, "samples": count, "seed": optim_args.seed}
        steps_an_epoch = steps_per_epoch(count, ranks.world_size, optim_args.batch_size, optim_args.accumulation_steps)
        self.total_steps = optim_args.max_steps or optim_args.max_epochs * steps_an_epoch
        optimizer = torch.optim.AdamW(
            decay_groups(model.parameters(), optim_args.weight_decay),
            lr=optim_args.lr,
            betas=(optim_args.adam_beta1, optim_args.adam_beta2),
        )
        of_model = memory_plan.Rehearsal(model, step, optim_args.accumulation_steps, optimizer)
        rates = memory_plan.describe({"model": of_model, **others}, self.device, preparation.options, ranks)
        if ranks.is_first:
            if source.folder is None and lora.adapted_layers(model):
                print(lora.RANDOM_BASE_WARNING)
            write_config(self.save_path / "arguments.yaml", options.groups)

        self._hooks = (Throughput(model, ranks.world_size), PeakMemory(preparation.device))
        self.manager = engine.Manager(**split_budgets(preparation.options)[0])
        self.model, self.optimizer = load_into_engine(model, optimizer, source, preparation, self.manager, rates=rates)
        self.model.train()
        warmup_steps = round(optim_args.warmup_ratio * self.total_steps)
        self._scheduler = get_scheduler(optim_args.lr_scheduler_type, self.optimizer, warmup_steps, self.total_steps)
        torch.manual_seed(optim_args.seed + ranks.rank)  # dropout differs between ranks

        self.step, self._cursor, self._sums, self._count = 0, (0, 0), {}, 0
        if preparation.checkpoint is not None:
            self._resume(preparation.checkpoint)
        self._log = MetricsLog(
            self.save_path,
            ranks.is_first,
            self.step,
            self.total_steps,
            output_args.tensorboard,
            output_args.wandb_project,
            resolved(options.groups),
        )
        self._samples_log = SamplesLog(self.save_path, ranks.is_first, self.step)
        self._start_interval()

    def _resume(self, checkpoint):
        state = checkpoints.load(checkpoint, self.model, self.optimizer)
        checkpoints.check_data(checkpoint, state["data"], self._data_key)
        checkpoints.check_steps(checkpoint, state["step"], self.total_steps)
        self.step, self._cursor = state["step"], tuple(state["cursor"])
        self._sums, self._count = state["sums"], state["count"]
        checkpoints.restore_scheduler(self._scheduler, self.optimizer, state["scheduler"])

    def windows(self):
        """The Windows that are left, from where the run stands."""
        deal_to = (self.ranks.rank, self.ranks.world_size, self._optim_args.batch_size)
        given = windows(
            self._samples, *deal_to, self._optim_args.accumulation_steps, self._optim_args.seed, self._cursor
        )
        return itertools.islice(given, self.total_steps - self.step)

    def backward(self, loss_sum, window_count):
        """Gradients of loss_sum / window_count, a micro-batch's share of the mean over the window on all ranks."""
        # The engine averages gradients over the ranks; what is wanted is their sum.
        self.optimizer.backward(loss_sum * (self.ranks.world_size / window_count))

    def finish_step(self, window, sums, count):
        """Take the optimizer's step and log. `sums`: {name: scalar tensor} of this rank over the window; what is logged
        is their sum over the ranks, divided by `count`, over the steps since the last line."""
        rate = self._scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._scheduler.step()
        totals = torch.stack([value.detach().double() for value in sums.values()])
        dist.all_reduce(totals)
        self.step += 1
        self._cursor = window.cursor
        self._count += count
        for name, value in zip(sums, totals.tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        for hook in self._hooks:
            hook.after_step(window)
        self._log.advance()
        if self.step % self._output_args.log_interval == 0 or self.step == self.total_steps:
            elapsed_s = time.perf_counter() - self._interval_start
            row = {"step": self.step, "epoch": window.epoch}
            row |= {name: value / self._count for name, value in self._sums.items()}
            row |= {"lr": rate, "grad_norm": self.optimizer.grad_norm}
            for hook in self._hooks:
                row |= hook.numbers(elapsed_s)
            row |= {"step_time_s": elapsed_s / (self.step - self._interval_step)}
            row |= {"skipped_steps": self.optimizer.skipped_steps}
            self._log.write(row)
            self._sums, self._count = {}, 0
            self._start_interval()

    def _start_interval(self):
        self._interval_start, self._interval_step = time.perf_counter(), self.step

    @property
    def evaluates_now(self):
        """At the start, at the end, and every --eval_interval steps."""
        interval = self._output_args.eval_interval
        return self.step in (0, self.total_steps) or bool(interval and self.step % interval == 0)

    def log_evaluation(self, numbers, samples=()):
        """`numbers` for metrics.jsonl, and held-out rows as dicts for samples.jsonl."""
        self._log.write({"step": self.step, **numbers})
        for sample in samples:
            self._samples_log.write_row({"step": self.step, **sample})

    def save_if_due(self):
        if not (self._output_args.save_interval and self.step % self._output_args.save_interval == 0):
            return
        state = {
            "step": self.step,
            "cursor": self._cursor,
            "sums": self._sums,
            "count": self._count,
            "scheduler": self._scheduler.state_dict(),
            "data": self._data_key,
        }
        engine.save_checkpoint(checkpoints.path_for(self.save_path, self.step), self.model, self.optimizer, state=state)
        if self.ranks.is_first:
            checkpoints.prune(self.save_path, self._output_args.save_total_limit)

    def finish(self, source, lora_args, build):
        """Write the model and its tokenizer; `build()` makes the model without adapters, on meta."""
        self._log.close()
        self._samples_log.close()
        save_model(self.save_path, self.model, source, lora_args, build, self.ranks)
        if self.ranks.is_first:
            print(memory_table(engine.memory_report(self.model)))
            print(f"saved to {self.save_path}", flush=True)


def save_model(folder, model, source, lora_args, build, ranks):
    """Save a model that the engine holds, with its tokenizer, in Hugging Face layout; of one with adapters the adapter,
    and with --lora_merge the merged model too. A collective."""
    folder = Path(folder)
    if not lora_args.lora_rank:
        engine.save_pretrained(folder, model)
    elif not lora_args.saves_adapters:
        plain = build()
        plain.config = model.config
        engine.save_pretrained(folder, model, written_as=plain, weights=lora.merged_weights(model))
        lora.save_adapter(folder / "adapter", model, source.folder, ranks.is_first)
    else:
        lora.save_adapter(folder, model, source.folder, ranks.is_first)
    if ranks.is_first:
        source.tokenizer.save_pretrained(folder)
