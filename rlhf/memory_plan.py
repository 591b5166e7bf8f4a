"""What a run will store, move and take, printed before it begins: its step on meta (engine/rehearsal.py).

Rows are as long as the run's longest, and every token of an answer counts: the most that a step takes.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from .. import engine
from .logprobs import last_logprobs
from .strategy import split_budgets

LIMIT_S = 30.0
"""A rehearsal that takes longer is left: the run waits for it."""

SHOWN_AFTER_S = 3.0

TRIAL_S = 0.02
"""For each of the rates by which a step is timed: half a second in all."""


@dataclass(frozen=True)
class Rehearsal:
    """A model, and what the run does with it."""

    model: torch.nn.Module
    step: Callable[[torch.nn.Module], torch.Tensor] | None = None
    """From a copy of it on meta to the loss of a micro-batch; None: the plan is of what is at rest."""
    micro_batches: int = 1
    optimizer: torch.optim.Optimizer | None = None
    """Whose groups count, where there is one already."""


def rows_on_meta(count, length):
    """Tokens [count, length] without memory."""
    return torch.empty(count, length, dtype=torch.long, device="meta")


def minibatch_on_meta(size, micro_size, length):
    """(rows of one of its micro-batches, how many there are)."""
    return rows_on_meta(min(size, micro_size), length), -(-size // micro_size)


# What models do with rows [B, T]: each gives a Rehearsal's step.


def language_step(rows):
    """Learn every token."""

    def loss_of(model):
        logits = model(input_ids=rows, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")

    return loss_of


def score_step(rows):
    """Score every token."""
    return lambda model: model(rows).sum()


def logprob_step(rows, scored=None):
    """Log-probabilities of the last `scored` tokens of each row, by default of all that have one before them."""
    return lambda model: last_logprobs(model, rows, scored or rows.shape[1] - 1).sum()


def in_turn(steps):
    """A step that does one of `steps` for each micro-batch."""
    count = 0

    def loss_of(model):
        nonlocal count
        count += 1
        return steps[(count - 1) % len(steps)](model)

    return loss_of


# The plan


def describe(rehearsals, device, options, ranks):
    """Print the plan of {name: Rehearsal}, in the order in which the engine takes them, on the first rank. A collective
    of the ranks, whose speed is measured first: returns their rates. `options`: keywords of `engine.initialize`, whose
    budgets are for all models together."""
    drive = options.get("nvme_dir") if options["placement"] in ("nvme", "auto") else None
    group = dist.group.WORLD if ranks.world_size > 1 else None
    states = options.get("state_precision", "exact")
    rates = engine.measure_rates(device, options["precision"], drive, group, TRIAL_S, states)
    if ranks.is_first:
        print(plans(rehearsals, options, ranks.world_size, rates), flush=True)
    return rates


def plans(rehearsals, options, world_size, rates=None):
    """The plan of every model as text, and where there are several, their sum beside the budgets."""
    budgets, others = split_budgets(options)
    manager = engine.Manager(**budgets)
    lines, at_rest, at_most, activations = [], Counter(), Counter(), 0
    for name, rehearsal in rehearsals.items():
        plan, note = _planned(name, rehearsal, others, world_size, rates, manager)
        lines += [f"{name}: {plan}", *note]
        at_rest.update({tier: sum(payloads.values()) for tier, payloads in plan.bytes_at_rest.items()})
        at_most.update(plan.peak_bytes)
        activations = max(activations, plan.forecast.activation_peak_bytes if plan.forecast else 0)
    if len(rehearsals) > 1:
        lines.append(f"all {len(rehearsals)} models, per rank, each at its peak, without activations:")
        for tier, nbytes in at_most.items():
            budget = manager.budgets.get(tier)
            of_budget = "" if budget is None else f", budget {budget / 1e6:,.1f}"
            rest = at_rest[tier] / 1e6
            lines.append(f"{tier.value:8}{'at rest':14}{rest:14,.1f}  MB, at most {nbytes / 1e6:,.1f}{of_budget}")
        if activations:
            lines.append(f"{'device':8}{'activations':14}{activations / 1e6:14,.1f}  MB at most, of one at a time")
    return "\n".join(lines)


def _planned(name, rehearsal, options, world_size, rates, manager):
    """(the plan, lines on why it is without a step)."""
    model, optimizer, patience = rehearsal.model, rehearsal.optimizer, Patience(name)
    options = {"world_size": world_size, "rates": rates, "manager": manager, **options}
    of_step = {"step": rehearsal.step, "accumulation_steps": rehearsal.micro_batches}
    try:
        return engine.plan(model, optimizer, watch=patience, **of_step, **options), []
    except engine.OutOfBudgetError:
        raise
    except Exception as error:  # whatever a model does on meta, the run does not depend on it
        return engine.plan(model, optimizer, **options), [f"its step was not rehearsed: {error}"]
    finally:
        patience.close()


class Patience:
    """Called with every operation of a rehearsal: shows that it goes on, and ends it by a TimeoutError."""

    def __init__(self, name):
        self._name, self._start, self._bar = name, time.monotonic(), None

    def __call__(self):
        elapsed = time.monotonic() - self._start
        if elapsed > LIMIT_S:
            raise TimeoutError(f"it takes longer than {LIMIT_S:.0f} s; `megalith plan` has no limit")
        if elapsed > SHOWN_AFTER_S and self._bar is None:
            self._bar = tqdm(desc=f"rehearsing a step of {self._name}", unit="operation", leave=False)
        if self._bar is not None:
            self._bar.update()

    def close(self):
        if self._bar is not None:
            self._bar.close()
