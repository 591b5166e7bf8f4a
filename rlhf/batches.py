"""Samples as batches: fitting them to a length, the order of an epoch, and how a window of rows is dealt to ranks and
micro-batches.

Every rank holds the whole dataset and derives the same order from (seed, epoch), so the global token count of a
window, and the place to resume at, are known without communication.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from .errors import InputError
from .losses import IGNORE
from .packing import Pack, collate_packs
from .templates import Sample


@dataclass(frozen=True)
class SampleSet:
    # Samples, Packs or Comparisons: whatever has a length, loss_tokens, positions, attended, arrays, blank
    samples: tuple
    truncated: int  # cut to the length; a Sample on the right, and then it keeps no end-of-sequence label
    dropped: int  # nothing to learn was left within the length

    def fingerprint(self):
        """A short digest of every token and mask, by which a resumed run recognises its data."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for array in sample.arrays():
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def fit(samples, max_len):
    """Cut samples to `max_len` tokens and drop those whose prompt alone fills it; both are counted."""
    kept, truncated, dropped = [], 0, 0
    for sample in samples:
        if len(sample) > max_len:
            sample = Sample(sample.ids[:max_len], sample.trained[:max_len])
            truncated += sample.loss_tokens > 0
        if sample.loss_tokens > 0:
            kept.append(sample)
        else:
            dropped += 1
    return SampleSet(tuple(kept), truncated, dropped)


@dataclass(frozen=True)
class Window:
    """The rows of one optimizer step: this rank's micro-batches, and counts over all ranks."""

    micro_batches: list[list]
    rows: int
    loss_tokens: int
    tokens: int
    attended: int
    epoch: float  # how many epochs are behind it once it is done
    cursor: tuple[int, int]  # (epoch, row) at which the next window starts


def deal(samples, rank, world_size, batch_size):
    """This rank's micro-batches of `samples`, as many on every rank.

    Rows are sorted by length first: the rows of a micro-batch, and the ranks that wait for one another, then have
    nearly equal lengths. Where rows run out, a rank gets a row with nothing to learn, so that it takes part in the
    collectives of the others.
    """
    ordered = sorted(samples, key=len, reverse=True)
    blank = ordered[-1].blank()
    rows = world_size * batch_size
    return [ordered[start : start + rows][rank::world_size] or [blank] for start in range(0, len(ordered), rows)]


def epoch_order(count, seed, epoch):
    """A permutation of range(count) that depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def split(samples, eval_fraction, seed):
    """Return (training samples, held-out samples), the latter chosen by the seed."""
    held_out = max(1, round(len(samples) * eval_fraction)) if eval_fraction else 0
    if held_out >= len(samples):
        raise InputError(f"--eval_fraction {eval_fraction} leaves none of {len(samples)} rows to train on")
    order = epoch_order(len(samples), seed, epoch=0)
    return [samples[index] for index in order[held_out:]], [samples[index] for index in order[:held_out]]


def steps_per_epoch(count, world_size, batch_size, accumulation_steps):
    return -(-count // (world_size * batch_size * accumulation_steps))


def windows(samples, rank, world_size, batch_size, accumulation_steps, seed, cursor=(0, 0)):
    """Yield Windows without end, from `cursor` on. An epoch has every row once; its last window may be short."""
    epoch, row = cursor
    rows = world_size * batch_size * accumulation_steps
    while True:
        order = epoch_order(len(samples), seed, epoch)
        while row < len(samples):
            chosen = [samples[index] for index in order[row : row + rows]]
            row += rows
            done = min(row / len(samples), 1.0)
            yield Window(
                micro_batches=deal(chosen, rank, world_size, batch_size),
                rows=len(chosen),
                loss_tokens=sum(sample.loss_tokens for sample in chosen),
                tokens=sum(len(sample) for sample in chosen),
                attended=sum(sample.attended for sample in chosen),
                epoch=epoch + done,
                cursor=(epoch, row) if row < len(samples) else (epoch + 1, 0),
            )
        epoch, row = epoch + 1, 0


def collate(samples, pad_id, device):
    """Right-padded (input_ids, labels), both int64 [B, T]; labels are IGNORE where nothing is learned.

    `pad_id` may be any token: attention is causal, so no real token sees a pad, and labels come from the mask.
    """
    length = max(len(sample) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORE)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.ids).long()
        input_ids[row, : len(sample)] = ids
        labels[row, : len(sample)] = torch.where(torch.from_numpy(sample.trained), ids, IGNORE)
    return input_ids.to(device), labels.to(device)


def language_model_inputs(rows, pad_id, device):
    """Return (keywords of a causal language model's forward, labels) of a micro-batch of Samples or of Packs."""
    if isinstance(rows[0], Pack):
        input_ids, position_ids, labels = collate_packs(rows, pad_id, device)
        return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}, labels
    input_ids, labels = collate(rows, pad_id, device)
    return {"input_ids": input_ids, "use_cache": False}, labels
