"""Decoding: prompts in, sampled tokens and their log-probabilities out. The one way to do it, for chat, rollouts and
evaluation.

`generate` answers a list of prompts; `batching.py` answers requests that come and go. Both step a `Decoder`, whose rows
join (`prefill`), get one token each (`step`) and leave (`drop`).

It calls the model's own forward with a cache of ours (`kv_cache.py` says why) and explicit positions, so it takes
causal models of transformers whose layers are plain attention, sharded ones and those with 4-bit linears included.
Outside of `engine.gathered(model)` the engine gathers one block after the other, fetching the next one while this one
computes: with placement="host", that is how a model answers that is larger than its `device_budget`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .kv_cache import KVCache
from .sampling import MAX_SEED, RowOptions, SamplingOptions, TokenCounts, choose_tokens
from .static_step import StaticStep, can_record

PREFILL_TOKENS = 4096  # padding included: more of them in one pass are no faster, and take more memory


@dataclass
class Answer:
    """One prompt's answer, while it grows."""

    prompt: list[int]
    options: SamplingOptions
    seed: int
    tokens: list[int] = field(default_factory=list)
    """New tokens; where one of `options.stop_ids` ended the answer, it is the last."""
    logprobs: list[float] = field(default_factory=list)
    """Of each new token (float32), as `sampling.choose_tokens` defines them."""

    @property
    def finish_reason(self) -> str | None:
        """ "stop" (a token of `stop_ids`), "length" (`max_new_tokens`), or None while it goes on."""
        if self.tokens and self.tokens[-1] in self.options.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.options.max_new_tokens else None


class Decoder:
    """A batch of answers that grow by a token a step. The model must be in eval mode. Not thread-safe."""

    def __init__(self, model: nn.Module) -> None:
        self.answers: list[Answer] = []
        self.cache = KVCache(model.config)
        self.device = model.get_input_embeddings().weight.device
        self._model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # what PEFT has wrapped
        parameters = inspect.signature(base.forward).parameters
        self._cache_keyword = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.2x
        self._takes_positions = "position_ids" in parameters  # BLOOM takes them from the mask
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self._is_static = can_record(model, self.device)
        self._static_step: StaticStep | None = None
        self._rows: RowOptions | None = None  # of all answers; None when they have changed
        self._counts: TokenCounts | None = None

    def prefill(self, answers: Sequence[Answer]) -> None:
        """Let `answers` join, and choose the first token of each. One forward pass over all prompts, which are padded
        to the longest."""
        lengths = [len(answer.prompt) for answer in answers]
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(a.prompt)) + a.prompt for a in answers], device=self.device)
        self._join(answers, self._forward(ids, self.cache, *self.cache.plan_prefill(lengths, self.device)))

    def extend(self, cache: KVCache, ids: Sequence[int]) -> torch.Tensor:
        """Run the next tokens of one prompt through the model, with a cache of its own. Returns the logits [1, V] after
        the last of them; with those of the whole prompt, `join` goes on."""
        plan = cache.plan_extend(len(ids), self.device)
        return self._forward(torch.tensor([ids], device=self.device), cache, *plan)

    def join(self, answer: Answer, cache: KVCache, logits: torch.Tensor) -> None:
        """Let an answer join whose whole prompt is in `cache`, and choose its first token from `logits` [1, V]."""
        self.cache.append(cache.read(0))
        self._join([answer], logits)

    def step(self) -> None:
        """Choose the next token of every answer."""
        ids = torch.tensor([[answer.tokens[-1]] for answer in self.answers], device=self.device)
        if self._is_static:
            lengths = self.cache.grow()
            if self._static_step is None or self._static_step.version != self.cache.version:
                self._static_step = None  # its memory first
                self._static_step = StaticStep(self._forward, self.cache, self.device)
            logits = self._static_step(ids, lengths)
        else:
            logits = self._forward(ids, self.cache, *self.cache.plan_decode(self.device))
        if self._rows is None:
            self._rows = self._options_of(self.answers)
            self._counts = self._counts_of(self.answers, self._rows, logits.shape[1])
        self._choose(self.answers, logits, self._rows, self._counts)

    def idle(self) -> None:
        """A forward pass of one token for nobody: for the sake of ranks that still gather weights together."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self._model(input_ids=ids, use_cache=False)

    def drop(self, index: int) -> Answer:
        """Take an answer out; the last one takes its place."""
        self._rows = self._counts = None
        self.cache.drop(index)
        answer = self.answers[index]
        self.answers[index] = self.answers[-1]
        self.answers.pop()
        return answer

    def _join(self, answers: Sequence[Answer], logits: torch.Tensor) -> None:
        self._rows = self._counts = None
        self.answers += answers
        rows = self._options_of(answers)
        self._choose(answers, logits, rows, self._counts_of(answers, rows, logits.shape[1]))

    def _forward(
        self, ids: torch.Tensor, cache: KVCache, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] after the last of ids [B, Q]."""
        arguments: dict[str, Any] = {"attention_mask": mask, self._cache_keyword: cache, "use_cache": True}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = 1
        with torch.no_grad():
            return self._model(input_ids=ids, **arguments).logits[:, -1]

    def _options_of(self, answers: Sequence[Answer]) -> RowOptions:
        return RowOptions.of([a.options for a in answers], [a.seed for a in answers], self.device)

    def _counts_of(self, answers: Sequence[Answer], rows: RowOptions, vocab_size: int) -> TokenCounts | None:
        if not rows.any_penalty:
            return None
        return TokenCounts.of([a.prompt for a in answers], [a.tokens for a in answers], vocab_size, self.device)

    def _choose(
        self, answers: Sequence[Answer], logits: torch.Tensor, rows: RowOptions, counts: TokenCounts | None
    ) -> None:
        steps = torch.tensor([len(answer.tokens) for answer in answers], device=self.device)
        tokens, logprobs = choose_tokens(logits, rows, steps, counts)
        if counts is not None:
            counts.add(tokens)
        # One transfer and the step's only sync point; float64 holds both exactly.
        chosen = torch.stack((tokens.double(), logprobs.double())).tolist()
        for answer, token, logprob in zip(answers, *chosen, strict=True):
            if not math.isfinite(logprob):
                raise FloatingPointError(
                    f"the model's logits after {len(answer.prompt) + len(answer.tokens)} tokens are not finite"
                )
            answer.tokens.append(int(token))
            answer.logprobs.append(logprob)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    options: SamplingOptions | Sequence[SamplingOptions],
    *,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    all_done: Callable[[bool], bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Answer]:
    """Answer `prompts`, `batch_size` at a time; the next ones join as answers end.

    Args:
        prompts: token ids, as lists or 1-D tensors.
        options: for all prompts, or one for each. With one for all, prompt i has the seed `options.seed + i`.
        generator: where seeds come from that `options` leaves open; by default torch's own for the CPU.
        all_done: for ranks that share the weights outside of `engine.gathered`. Called before every forward pass with
            whether this rank has nothing left to do; returns whether that is so on all ranks (an all-reduced flag).
            Until then this rank runs passes for nobody, so that all issue the same transfers.
        progress: called with the number of new tokens after every step.

    Returns the answers in the order of the prompts.
    Raises ValueError for a prompt that is empty or does not fit the model, FloatingPointError for logits that are NaN.
    """
    answers = _new_answers(model, prompts, options, generator)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    # The longest first: what does not fit in memory shows at once, and prompts of a pass are about equally long.
    waiting = sorted(range(len(answers)), key=lambda index: len(answers[index].prompt))
    decoder = Decoder(model)
    with evaluating(model):
        while True:
            is_done = not waiting and not decoder.answers
            if all_done(is_done) if all_done is not None else is_done:
                return answers
            room = batch_size - len(decoder.answers)
            if is_done:
                decoder.idle()
                count = 0
            elif waiting and room >= min(len(waiting), max(1, batch_size // 4)):
                longest = len(answers[waiting[-1]].prompt)
                count = min(room, len(waiting), max(1, PREFILL_TOKENS // longest))
                decoder.prefill([answers[waiting.pop()] for _ in range(count)])
            else:
                decoder.step()
                count = len(decoder.answers)
            if progress is not None:
                progress(count)
            for index in reversed(range(len(decoder.answers))):
                if decoder.answers[index].finish_reason:
                    decoder.drop(index)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards, what was in training mode is so again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_prompt(model: nn.Module, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises ValueError where a prompt is empty, has ids that the model does not know, or is longer with its answer
    than the model has positions."""
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue")
    vocab_size = model.get_input_embeddings().num_embeddings
    if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {unknown[0]} is not one of the model's {vocab_size}")
    limit = max_positions(model)
    if limit is not None and len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} do not fit the model's "
            f"{limit} positions: shorten one of them"
        )


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model was made for; None where it has no limit (ALiBi)."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _new_answers(
    model: nn.Module, prompts: Sequence, options: SamplingOptions | Sequence[SamplingOptions], generator
) -> list[Answer]:
    if isinstance(options, SamplingOptions):
        seed = torch.randint(MAX_SEED, (), generator=generator).item() if options.seed is None else options.seed
        rows = [(options, (seed + index) % MAX_SEED) for index in range(len(prompts))]
    else:
        if len(options) != len(prompts):
            raise ValueError(f"{len(options)} options for {len(prompts)} prompts: give one, or one for each")
        drawn = torch.randint(MAX_SEED, (len(prompts),), generator=generator).tolist()
        rows = [(row, drawn[index] if row.seed is None else row.seed) for index, row in enumerate(options)]
    answers = []
    for index, (prompt, (row, seed)) in enumerate(zip(prompts, rows, strict=True)):
        ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
        try:
            check_prompt(model, ids, row.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        answers.append(Answer(ids, row, seed))
    return answers
