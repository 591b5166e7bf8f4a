"""What a block of the model sees while it is quantised: calibration tokens, the block's inputs, its linears' Hessians.

Only the block at hand has weights; all others are on meta. `hidden` is a list of batches [B, T, D] on the CPU.
"""

import contextlib
import itertools
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .data import read_conversations, read_rows
from .errors import InputError
from .templates import encode, prompt_renderer, segments_of

_HESSIANS_BYTES = 2 << 30


def calibration_windows(path, tokenizer, prompt_format, count, length, seed):
    """Token ids, int64 [count, length]: windows of the whole file's text end to end, drawn by `seed`.

    The file is plain text (.txt), rows with a `text` field, or any that supervised fine-tuning takes. A file with fewer
    windows gives all it has, one with less than a whole window a shorter one. Raises InputError for one without text.
    """
    ids = np.concatenate([np.array(part, dtype=np.int64) for part in _token_ids(path, tokenizer, prompt_format)])
    if len(ids) < 2:
        raise InputError(f"{path}: has no text to calibrate with")
    length = min(length, len(ids))
    windows = len(ids) // length
    chosen = np.sort(np.random.default_rng(seed).permutation(windows)[:count])
    return torch.from_numpy(ids[: windows * length].reshape(windows, length)[chosen])


def _token_ids(path, tokenizer, prompt_format):
    if str(path).endswith(".txt"):
        try:
            with open(path, encoding="utf-8") as file:
                return [tokenizer(file.read()).input_ids]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from None
    rows = read_rows(path)
    if all(isinstance(row.values.get("text"), str) for row in rows):
        return tokenizer([row.values["text"] for row in rows]).input_ids
    _, conversations = read_conversations(path)
    render = prompt_renderer(tokenizer, prompt_format)
    samples = [segments for c in conversations for segments in segments_of(c, render, tokenizer.eos_token)]
    return [sample.ids for sample in encode(samples, tokenizer)]


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by name: the entries of the longest nn.ModuleList."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks, and is quantised block by block")
    name = max(lists, key=lambda name: len(lists[name]))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


@dataclass
class BlockCalls:
    """How a model calls its blocks, beside their hidden states."""

    arguments: list[dict[torch.Size, tuple[tuple, dict]]]
    """Masks, positions, rotary embeddings: by block, and by [B, T]."""
    gives_tuple: bool = False
    """Blocks return their hidden states in a tuple."""

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states [B, T, D]."""
        arguments, keywords = self.arguments[index][hidden.shape[:2]]
        output = block(hidden, *arguments, **keywords)
        return output[0] if self.gives_tuple else output


class _Recorder(nn.Module):
    """In the place of a block: notes how it is called. Only `runs` calls it, for the form of its output; elsewhere the
    hidden states pass through."""

    def __init__(self, block: nn.Module, calls: BlockCalls, index: int, runs: bool):
        super().__init__()
        self._block = (block,)  # in a tuple, because it is not to be registered a second time
        self.calls, self.index, self.runs = calls, index, runs

    def __getattr__(self, name):
        # Models may read a block's attributes, such as its kind of attention.
        block = self.__dict__.get("_block")
        return getattr(block[0], name) if block and name not in self.__dict__ else super().__getattr__(name)

    def forward(self, hidden, *arguments, **keywords):
        self.calls.arguments[self.index].setdefault(hidden.shape[:2], (arguments, keywords))
        if self.runs:
            self.calls.gives_tuple = isinstance(self._block[0](hidden, *arguments, **keywords), tuple)
            self.runs = False
        return (hidden,) if self.calls.gives_tuple else hidden


@torch.no_grad()
def record_calls(model, blocks, batches, device):
    """Run what precedes the blocks over `batches` of token ids; return (BlockCalls, hidden states of the first block).

    Of the blocks, only the first needs its weights.
    """
    calls, hidden = BlockCalls([{} for _ in blocks]), []
    first = next(iter(blocks.values()))
    for index, (name, block) in enumerate(blocks.items()):
        _set_submodule(model, name, _Recorder(block, calls, index, runs=block is first))
    catch = model.get_submodule(next(iter(blocks))).register_forward_pre_hook(
        lambda module, arguments: hidden.append(arguments[0].cpu())
    )
    try:
        for batch in batches:
            model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        catch.remove()
        for name, block in blocks.items():
            _set_submodule(model, name, block)
    return calls, hidden


class _Given(nn.Module):
    """In the place of a block: gives the hidden states that it was told to, whatever comes in."""

    def __init__(self, block: nn.Module, gives_tuple: bool):
        super().__init__()
        self._block = (block,)
        self.gives_tuple, self.hidden = gives_tuple, None

    __getattr__ = _Recorder.__getattr__

    def forward(self, hidden, *arguments, **keywords):
        return (self.hidden,) if self.gives_tuple else self.hidden


@contextlib.contextmanager
def after_blocks(model, blocks, calls, device):
    """A function from the last block's hidden states [B, T, D] to a call of what follows: the norm, then the head."""
    given = {name: _Given(block, calls.gives_tuple) for name, block in blocks.items()}
    for name, module in given.items():
        _set_submodule(model, name, module)

    def run(hidden):
        for module in given.values():
            module.hidden = hidden.to(device)
        model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device), use_cache=False)

    try:
        yield run
    finally:
        for name, block in blocks.items():
            _set_submodule(model, name, block)


def _set_submodule(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def linears_by_input(block, run):
    """The linears of `block` in the order in which `run()` calls them, those together that get the same tensor:
    [[name, ...], ...]. They share a Hessian."""
    stages, last = [], [None]

    def note(name, x):
        if x is not last[0]:
            stages.append([])
        stages[-1].append(name)
        last[0] = x

    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: note(name, arguments[0]))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with _removed_after(handles):
        run()
    names = [name for stage in stages for name in stage]
    if len(set(names)) < len(names):
        raise InputError(f"{type(block).__name__} calls a linear twice: {names}; it cannot be quantised in order")
    return stages


def calibration_passes(stages, true_sequential, inputs_of):
    """Which `stages` are calibrated by the same pass over the batches: [[[name, ...], ...], ...].

    With `true_sequential` each by its own, so that a linear's inputs come from linears quantised before it; those of a
    block's experts, which do not depend on each other, together. The Hessians of one pass take 2 GiB at most, or one
    more than that; `inputs_of(name)` is the width of one.
    """
    alike = (lambda stage: re.sub(r"\.\d+\.", ".", stage[0])) if true_sequential else None
    passes = []
    for _, group in itertools.groupby(stages, alike or (lambda stage: None)):
        taken_bytes = 0
        passes.append([])
        for stage in group:
            if taken_bytes > _HESSIANS_BYTES:
                taken_bytes = 0
                passes.append([])
            passes[-1].append(stage)
            taken_bytes += 4 * inputs_of(stage[0]) ** 2
    return passes


class _Reached(Exception):
    """The last linear that was waited for has seen its input: the rest of the block need not run."""


def input_hessians(block, names, run, batches):
    """{name: (2 / n * sum of x x^T, float32 [K, K], n)} of the inputs x of these linears over `run(batch)` of all
    batches, n being their number; zeros for an expert that no input was sent to. Raises InputError for a linear that
    is not called."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name, x):
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.T, rows)
        counts[name] += len(rows)
        if name == names[-1]:
            raise _Reached

    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: add(name, arguments[0])
        )
        for name in names
    ]
    with _removed_after(handles):
        for batch in batches:
            with contextlib.suppress(_Reached):
                run(batch)
    if len(sums) < len(names):
        raise InputError(f"no input reached {[name for name in names if name not in sums]}")
    return {name: (total.mul_(2 / max(1, counts[name])), counts[name]) for name, total in sums.items()}


@contextlib.contextmanager
def _removed_after(handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
