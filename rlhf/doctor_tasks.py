"""Tasks on which reinforcement learning from a KL-penalised reward has a known optimum.

The reference is uniform over V tokens (its head is zero), a reward r(x, y) is a function of the tokens, and what PPO
maximises is J(π) = E[r] - β KL(π ‖ reference). Its maximum is J* = β log E_ref[e^{r/β}], reached by
π*(y | x) ∝ π_ref(y | x) e^{r(x, y)/β} (Ziegler et al. 2019, eq. 3; Rafailov et al. 2023, eq. 4). The verdict on a run
is the gap to it, not the shape of a curve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import GPT2Config, LlamaConfig

GOOD = 1  # the token that is rewarded
STOP = 0  # ends an answer, in tasks that can end


@dataclass(frozen=True)
class Optimum:
    """Of a task at its β: the best objective, its reward, and its KL in nats an answer."""

    objective: float
    reward: float
    kl: float


@dataclass(frozen=True)
class Task:
    """`reward(prompt_ids, completion_ids)` -> float; both are lists of token ids, a stop token included."""

    name: str
    family: str  # "gpt2" (learned positions) or "llama" (rotary ones)
    vocab: int
    new_tokens: int
    beta: float
    reward: Callable
    optimum: Optimum
    prompts: tuple[tuple[int, ...], ...] = ((2,),)
    stops: bool = False  # whether STOP ends an answer
    iterations: int = 24
    episodes: int = 128
    lr: float = 4e-3

    def rewards(self, prompts, completions):
        """Of lists of answers."""
        return [self.reward(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)]

    def config(self):
        width, layers, heads = 64, 2, 4
        if self.family == "gpt2":
            return GPT2Config(
                vocab_size=self.vocab, n_embd=width, n_layer=layers, n_head=heads, n_positions=32,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, intermediate_size=2 * width, max_position_embeddings=32,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip


# Closed forms


def bernoulli_optimum(probability, beta):
    """Of a reward that is 1 with `probability` under the reference and else 0."""
    weight = probability * math.exp(1 / beta)
    success = weight / (1 - probability + weight)
    objective = beta * math.log(1 - probability + weight)
    return Optimum(objective, success, (success - objective) / beta)


def additive_optimum(probability, count, beta):
    """Of a reward that is a mean of `count` independent such rewards: each is a problem of its own at β · count."""
    one = bernoulli_optimum(probability, beta * count)
    return Optimum(one.objective, one.reward, (one.reward - one.objective) / beta)


def price_of(task_of, kl):
    """The β at which the optimum of `task_of(beta)` has this KL, by bisection: KL falls as β rises."""
    low, high = 1e-3, 10.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if task_of(middle).optimum.kl > kl else (low, middle)
    return low


# Tasks


def count(vocab=16, new_tokens=8, beta=0.05, **others):
    """Reward: the share of GOOD tokens. Catches signs and shifts, from end to end."""

    def reward(prompt, completion):
        return sum(token == GOOD for token in completion) / new_tokens

    optimum = additive_optimum(1 / vocab, new_tokens, beta)
    return Task("count", "gpt2", vocab, new_tokens, beta, reward, optimum, **others)


def stop(at=4, new_tokens=8, vocab=16, beta=0.05, **others):
    """Reward 1 for an answer that ends at its token `at`. Catches masks of the stop token and where the score lies."""

    def reward(prompt, completion):
        return float(len(completion) == at and completion[-1] == STOP)

    probability = (1 - 1 / vocab) ** (at - 1) / vocab
    optimum = bernoulli_optimum(probability, beta)
    return Task("stop", "gpt2", vocab, new_tokens, beta, reward, optimum, stops=True, **others)


def copy(family="gpt2", vocab=16, longest=6, beta=0.05, prompts=256, seed=0, **others):
    """Reward 1 for answering with the last token of the prompt, whose length varies. Catches padding and positions."""
    rng = np.random.default_rng(seed)
    made = tuple(tuple(rng.integers(1, vocab, rng.integers(1, longest + 1)).tolist()) for _ in range(prompts))

    def reward(prompt, completion):
        return float(completion[0] == prompt[-1])

    optimum = bernoulli_optimum(1 / vocab, beta)
    return Task(
        f"copy {family}",
        family,
        vocab,
        1,
        beta,
        reward,
        optimum,
        prompts=made,
        **{"iterations": 60, "episodes": 256, "lr": 2e-3, **others},
    )


def delayed(vocab=16, new_tokens=8, beta=0.05, **others):
    """Reward 1 when the first token was GOOD, paid at the last. Catches errors in credit assignment."""

    def reward(prompt, completion):
        return float(completion[0] == GOOD)

    optimum = bernoulli_optimum(1 / vocab, beta)
    return Task("delayed credit", "llama", vocab, new_tokens, beta, reward, optimum, **others)


def values(vocab=4, new_tokens=2, iterations=12, **others):
    """Delayed credit for a critic alone, beside a policy that stays uniform: V is P(GOOD) before the first token and
    the reward itself after it, so that 1 - 1/T of the returns' variance can be explained. A critic that reads its
    values one token later explains all of it, one token earlier less."""
    return delayed(vocab, new_tokens, iterations=iterations, **others)
