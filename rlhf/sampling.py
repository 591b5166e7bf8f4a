"""From logits to tokens: greedy, tempered, top-k, top-p and penalties, row by row, as pure functions.

Rows of one batch may have different options. The noise of a row's token depends on its seed and on the token's index in
the answer alone, so an answer is the same whatever else is in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an answer is sampled, and where it ends. Raises ValueError that names the field."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """What logits are divided by; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens (and those as likely as the last of them); 0 from all."""
    top_p: float = 1.0
    """Sample from the fewest tokens that have this probability together, after top_k."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or answer are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens, as often as they are in the answer."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one that did is its last token."""
    seed: int | None = None
    """None: another one in every call, drawn from torch's generator."""

    def __post_init__(self) -> None:
        def reject(field: str, rule: str) -> None:
            raise ValueError(f"{field}={getattr(self, field)!r}: {rule}")

        def is_whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for field in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                reject(field, "must be a finite number")
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            reject("max_new_tokens", "must be a whole number, at least 1")
        if self.temperature < 0:
            reject("temperature", "must be at least 0")
        if not is_whole(self.top_k) or self.top_k < 0:
            reject("top_k", "must be a whole number, 0 for no limit")
        if not 0 < self.top_p <= 1:
            reject("top_p", "must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            reject("repetition_penalty", "must be above 0")
        if isinstance(self.stop_ids, str) or not all(is_whole(token) and token >= 0 for token in self.stop_ids):
            reject("stop_ids", "must be token ids")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed <= MAX_SEED):
            reject("seed", "must be a whole number from 0 to 2**63 - 1")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def samples_as_reported(self) -> bool:
        """Whether tokens are drawn from the very distribution whose log-probabilities are returned, as PPO needs."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1 and not self.has_penalties


@dataclass(frozen=True)
class RowOptions:
    """The options of a batch's rows as tensors [B], and what none of them needs."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    seeds: torch.Tensor
    any_sampled: bool
    any_filtered: bool
    any_penalty: bool

    @staticmethod
    def of(options: Sequence[SamplingOptions], seeds: Sequence[int], device: torch.device | str) -> "RowOptions":
        """`seeds` [B] are those of the rows, which `options` may leave open."""

        def floats(field: str) -> torch.Tensor:
            return torch.tensor([getattr(row, field) for row in options], dtype=torch.float32, device=device)

        return RowOptions(
            temperature=floats("temperature"),
            top_k=torch.tensor([row.top_k for row in options], device=device),
            top_p=floats("top_p"),
            repetition_penalty=floats("repetition_penalty"),
            presence_penalty=floats("presence_penalty"),
            frequency_penalty=floats("frequency_penalty"),
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            any_sampled=any(row.temperature > 0 for row in options),
            any_filtered=any(row.temperature > 0 and (row.top_k > 0 or row.top_p < 1) for row in options),
            any_penalty=any(row.has_penalties for row in options),
        )


@dataclass
class TokenCounts:
    """Which tokens each row has had, for the penalties."""

    in_prompt: torch.Tensor
    """[B, V] bool"""
    in_answer: torch.Tensor
    """[B, V] int32"""

    @staticmethod
    def of(prompts: Sequence, answers: Sequence, vocab_size: int, device: torch.device | str) -> "TokenCounts":
        """`prompts` and `answers`: for each row, its token ids so far, as a list or a 1-D tensor."""
        in_prompt = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        in_answer = torch.zeros(len(prompts), vocab_size, dtype=torch.int32)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            in_prompt[row, torch.as_tensor(prompt, dtype=torch.int64)] = True
            in_answer[row] = torch.bincount(torch.as_tensor(answer, dtype=torch.int64), minlength=vocab_size)
        return TokenCounts(in_prompt.to(device), in_answer.to(device))

    def add(self, tokens: torch.Tensor) -> None:
        """One more token [B] for every row."""
        self.in_answer[torch.arange(len(tokens), device=tokens.device), tokens] += 1

    def keep(self, rows: torch.Tensor) -> "TokenCounts":
        return TokenCounts(self.in_prompt[rows], self.in_answer[rows])


def choose_tokens(
    logits: torch.Tensor, rows: RowOptions, steps: torch.Tensor, counts: TokenCounts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens [B] and their log-probabilities [B] in float32.

    Log-probabilities are those of the tempered distribution softmax(logits / temperature), at temperature 0 of
    softmax(logits), before penalties and filters: what a model gives that is shown the answer.

    Args:
        logits: [B, V], any floating-point dtype; computed in float32.
        steps: [B] int64, how many tokens each row's answer has.
        counts: needed where `rows.any_penalty`.
    """
    logits = logits.float()
    scale = torch.where(rows.temperature > 0, rows.temperature, 1.0).unsqueeze(1)
    tempered = logits / scale
    penalized = tempered
    if rows.any_penalty:
        if counts is None:
            raise ValueError("counts=None, but rows have penalties, which need the tokens so far")
        logits = penalize(logits, counts, rows)
        penalized = logits / scale
    tokens = logits.argmax(dim=-1)
    if rows.any_sampled:
        filtered = penalized
        if rows.any_filtered:
            threshold = filter_threshold(penalized, rows.top_k, rows.top_p)
            filtered = penalized.masked_fill(penalized < threshold.unsqueeze(1), -torch.inf)
        tokens = torch.where(rows.temperature > 0, draw(filtered, uniform_noise(rows.seeds, steps)), tokens)
    chosen = tempered.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, chosen - tempered.logsumexp(dim=-1)


def penalize(logits: torch.Tensor, counts: TokenCounts, rows: RowOptions) -> torch.Tensor:
    """Logits [B, V] after each row's repetition, presence and frequency penalties."""
    in_answer = counts.in_answer > 0
    repetition = torch.where(counts.in_prompt | in_answer, rows.repetition_penalty.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - rows.presence_penalty.unsqueeze(1) * in_answer
    return logits - rows.frequency_penalty.unsqueeze(1) * counts.in_answer


def filter_threshold(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit [B] that top_k [B] (0: all) and then top_p [B] (1: all) let pass.

    Looks at the most likely tokens alone until they hold top_p: sorting a whole vocabulary costs more than everything
    else here.
    """
    vocab_size = logits.shape[1]
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).unsqueeze(1)
    looked_at = min(vocab_size, max(64, int(top_k.max())))
    while True:
        best = logits.topk(looked_at, dim=1).values
        in_k = torch.arange(looked_at, device=logits.device) < limit
        total = torch.where(
            top_k.unsqueeze(1) > 0,
            best.masked_fill(~in_k, -torch.inf).logsumexp(dim=1, keepdim=True),
            logits.logsumexp(dim=1, keepdim=True),
        )
        probabilities = (best - total).exp().masked_fill(~in_k, 0)
        mass = probabilities.cumsum(dim=1)
        is_enough = (mass[:, -1] >= top_p) | (top_p == 1) | (limit.squeeze(1) <= looked_at)
        if looked_at == vocab_size or bool(is_enough.all()):
            break
        looked_at = min(vocab_size, 8 * looked_at)
    passes = in_k & ((mass - probabilities < top_p.unsqueeze(1)) | (top_p.unsqueeze(1) == 1))
    last = passes.sum(dim=1, keepdim=True).clamp(min=1) - 1
    threshold = best.gather(1, last).squeeze(1)
    return torch.where((top_k > 0) | (top_p < 1), threshold, -torch.inf)


def draw(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens [B] of softmax(logits [B, V]) by inverting its distribution function at noise [B] in [0, 1)."""
    # In float64: the rounding of a float32 sum over the vocabulary would favour or lose rare tokens.
    distribution = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
    targets = noise.double().unsqueeze(1) * distribution[:, -1:]
    return torch.searchsorted(distribution, targets, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def uniform_noise(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Uniform float32 numbers [B] in [0, 1), a function of seeds [B] and steps [B] (int64) alone.

    Counter-based: the finaliser of splitmix64 (Steele, Lea and Flood 2014) over a key made of the seed, plus the step
    in its stream.
    """
    stream = _mix(seeds) + (steps + 1) * _GOLDEN_GAMMA
    return _shift(_mix(stream), 40).float() / 2**24


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 30)) * _MULTIPLIERS[0]
    value = (value ^ _shift(value, 27)) * _MULTIPLIERS[1]
    return value ^ _shift(value, 31)
