"""A rollout: what the policy answered, as every rank holds it.

Each rank answers its own prompts. Then the answers, which are small, go to all ranks: from there on every rank knows
the whole rollout, so that token counts, means and orders are global without further communication, and rows can be
dealt anew by length for each pass through a model.

B: episodes of all ranks, T: tokens of the longest answer, b, t, L: the same of one micro-batch, and its tokens a row.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from transformers.hf_argparser import HfArg

from .. import engine
from ..engine.machine import host_available_bytes
from .decoding import Decoder, check_prompt, generate
from .errors import InputError, require
from .prompts import Prompt
from .sampling import SamplingOptions


@dataclass(frozen=True)
class RolloutArguments:
    """How answers are sampled: from the policy itself, at a temperature. Filters (top-k, top-p) would sample another
    policy than the one that is trained."""

    experience_batch_size: int = HfArg(default=8, help="prompts that each rank answers at once")
    update_timesteps: int = HfArg(default=1, help="such batches a rollout")
    max_new_tokens: int = HfArg(
        default=128, aliases=["--response_length", "--max_answer_len"], help="tokens an answer at most"
    )
    max_length: int | None = HfArg(default=None, help="tokens of prompt and answer together at most")
    temperature: float = HfArg(default=1.0, help="logits are divided by it, in sampling and in training")
    ignore_eos: bool = HfArg(default=False, help="answers of exactly --max_new_tokens, as benchmarks want them")
    gather_for_generation: Literal["auto", "always", "never"] = HfArg(
        default="auto", help="whole weights for the time of a rollout, instead of block by block for each token"
    )

    def __post_init__(self):
        for name in ("experience_batch_size", "update_timesteps", "max_new_tokens", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")

    def new_tokens(self, prompt):
        """How long the answer to `prompt` may be. Raises InputError where --max_length leaves it none."""
        if self.max_length is None:
            return self.max_new_tokens
        room = self.max_length - len(prompt.ids)
        require(room > 0, "max_length", self.max_length, f"more than a prompt's {len(prompt.ids)} tokens")
        return min(self.max_new_tokens, room)


def check_room(model, prompts, rollout_args, path):
    """Raises InputError where a prompt of the file `path` and its answer do not fit the model's positions."""
    for prompt in prompts:
        try:
            check_prompt(model, prompt.ids, rollout_args.new_tokens(prompt))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Answer:
    """`ids`: the stop token included, if there is one (`stopped`). `logprobs`: the sampler's, one a token."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool
    score: float | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through a model together, padded on the right; nothing is inferred from token ids."""

    rows: list[int]  # of the rollout
    real: bool  # False: this rank has no rows left and takes part for the others' sake
    input_ids: torch.Tensor  # int64 [b, L], prompts and answers
    scored: torch.Tensor  # bool [b, L], True on answer tokens; nowhere if not real
    places: torch.Tensor  # int64 [b, t], where in a row its answer's token t stands (somewhere, beyond the end)
    mask: torch.Tensor  # bool [b, t], True on answer tokens; nowhere if not real
    most_scored: int  # answer tokens of the rank that has most

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """These rows of a rollout's [B, T], as [b, t] on their device."""
        return values[self.rows, : self.mask.shape[1]].to(self.mask.device)

    def of_answers(self, values: torch.Tensor) -> torch.Tensor:
        """Values that belong to tokens, [b, L], aligned to the answers [b, t]."""
        return values.gather(1, self.places)

    def of_states(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the states before the answers' tokens: at the token before each; [b, L] to [b, t]."""
        return values.gather(1, self.places - 1)


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]
    answers: list[Answer]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def lengths(self) -> torch.Tensor:
        """Answer tokens, int64 [B]."""
        return torch.tensor([len(answer.ids) for answer in self.answers])

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, T], True on answer tokens."""
        lengths = self.lengths
        return torch.arange(int(lengths.max())) < lengths[:, None]

    @property
    def stopped(self) -> torch.Tensor:
        return torch.tensor([answer.stopped for answer in self.answers])

    @property
    def sampler_logprobs(self) -> torch.Tensor:
        """float32 [B, T]."""
        result = torch.zeros(self.mask.shape)
        return result.masked_scatter(self.mask, torch.tensor([x for a in self.answers for x in a.logprobs]))

    def micro_batches(self, rows: list[int], size: int, pad_id: int, ranks) -> Iterator[MicroBatch]:
        """This rank's part of `rows`, `size` at a time: as many micro-batches on every rank.

        Rows are sorted by length first, so that there is little padding and ranks wait little for one another.
        """

        def row_length(row: int) -> int:
            return len(self.prompts[row].ids) + len(self.answers[row].ids)

        ordered = sorted(rows, key=lambda row: (-row_length(row), row))  # whatever order `rows` are in
        for start in range(0, len(ordered), ranks.world_size * size):
            dealt = [
                ordered[start : start + ranks.world_size * size][rank :: ranks.world_size]
                for rank in range(ranks.world_size)
            ]
            most_scored = max(sum(len(self.answers[row].ids) for row in rows_of_rank) for rows_of_rank in dealt)
            mine = dealt[ranks.rank]
            yield self._collate(mine or ordered[-1:], bool(mine), most_scored, pad_id, ranks.device)

    def _collate(self, rows: list[int], real: bool, most_scored: int, pad_id: int, device) -> MicroBatch:
        prompt_lengths = torch.tensor([len(self.prompts[row].ids) for row in rows])[:, None]
        lengths = torch.tensor([len(self.answers[row].ids) for row in rows])[:, None]
        input_ids = torch.full((len(rows), int((prompt_lengths + lengths).max())), pad_id)
        for place, row in enumerate(rows):
            ids = torch.tensor([*self.prompts[row].ids, *self.answers[row].ids])
            input_ids[place, : len(ids)] = ids
        columns, steps = torch.arange(input_ids.shape[1]), torch.arange(int(lengths.max()))
        scored = (columns >= prompt_lengths) & (columns < prompt_lengths + lengths) & real
        places = (prompt_lengths + steps).clamp(max=input_ids.shape[1] - 1)
        mask = (steps < lengths) & real
        return MicroBatch(
            rows, real, input_ids.to(device), scored.to(device), places.to(device), mask.to(device), most_scored
        )

    @torch.no_grad()
    def map(
        self, function: Callable[[MicroBatch], tuple[torch.Tensor, ...]], size: int, pad_id: int, ranks
    ) -> list[torch.Tensor]:
        """`function` gives float32 [b, t] (or [b]) tensors of a micro-batch; returns each for the whole rollout,
        float32 [B, T] (or [B]) on the CPU and the same on every rank, 0 outside of the mask."""
        mask = self.mask
        results: list[torch.Tensor] = []
        for micro in self.micro_batches(list(range(len(self))), size, pad_id, ranks):
            values = [value.float() for value in function(micro)]
            if not results:
                results = [torch.zeros(mask.shape if v.dim() == 2 else len(self), device=ranks.device) for v in values]
            if micro.real:
                for result, value in zip(results, values, strict=True):
                    if value.dim() == 2:
                        result[micro.rows, : value.shape[1]] = value.where(micro.mask, 0.0)
                    else:
                        result[micro.rows] = value
        if ranks.world_size > 1:
            for result in results:  # exact: a row is 0 on all ranks but one
                dist.all_reduce(result)
        return [result.cpu() for result in results]


def share(mine: list[Answer], error: Exception | None, ranks) -> list[list[Answer]]:
    """Every rank's answers, on every rank. Where any rank brings an error, all raise: RuntimeError that names it."""
    failures, answers = [error], [mine]
    if ranks.world_size > 1:
        message = None if error is None else f"{type(error).__name__}: {error}"
        gathered = [None] * ranks.world_size
        dist.all_gather_object(gathered, (message, mine))
        failures, answers = ([entry[part] for entry in gathered] for part in (0, 1))
    for rank, failure in enumerate(failures):
        if failure is not None:
            where = f"rank {rank}: " if ranks.world_size > 1 else ""
            raise RuntimeError(f"the rollout failed: {where}{failure}") from error
    return answers


def sample(learner, prompts, rows):
    """Answers to this rank's `prompts`, which are `rows` of the rollout. A collective.

    A row's random numbers depend on the seed, the iteration and the row alone: not on the rank, on the batch, or on how
    many ranks there are.
    """
    args, model, ranks = learner.rollout_args, learner.actor.model, learner.ranks
    stop_ids = () if args.ignore_eos else tuple(learner.stop_ids)
    options = [
        SamplingOptions(
            max_new_tokens=args.new_tokens(prompt),
            temperature=args.temperature,
            stop_ids=stop_ids,
            seed=int(np.random.SeedSequence([learner.seed, learner.iteration, row]).generate_state(1)[0]),
        )
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    prompts = [prompt.ids for prompt in prompts]
    answers = generate_on_ranks(model, prompts, options, args.experience_batch_size, ranks, args.gather_for_generation)
    return [Answer(answer.tokens, answer.logprobs, answer.finish_reason == "stop") for answer in answers]


def generate_on_ranks(model, prompts, options, batch_size, ranks, gather="auto"):
    """`decoding.generate` on every rank, each with prompts of its own, of a model that the engine shards. A collective;
    `gather` as in RolloutArguments."""
    gathers = _gathers(gather, model, ranks)
    all_done = None if gathers or ranks.world_size == 1 else _agreement(ranks)
    with engine.gathered(model) if gathers else nullcontext():
        try:
            return generate(model, prompts, options, batch_size=batch_size, all_done=all_done)
        except FloatingPointError:  # of this rank's answers alone: the others still gather weights with it
            while all_done is not None and not all_done(True):
                Decoder(model).idle()
            raise


def _agreement(ranks):
    """all_done(is_done): whether all ranks are. Until then each takes part in gathering weights."""

    def all_done(is_done):
        flag = torch.tensor(int(is_done), device=ranks.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    return all_done


def _gathers(choice, model, ranks):
    """Whether to hold whole weights during a rollout. "auto": where the device's budget has room for them, and they
    take no more than half of the memory that is free on every rank, so that the cache of keys and values has the other
    half."""
    if choice != "auto":
        return choice == "always"
    needed_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if ranks.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(ranks.device)[0]
        free_bytes += torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
    else:
        free_bytes = host_available_bytes() // ranks.world_size
    fits = torch.tensor(int(engine.can_gather(model) and needed_bytes <= free_bytes // 2), device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits)
