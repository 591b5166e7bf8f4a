"""Two tasks of the doctor that go through the commands, as a user would: preferences, a reward model, then PPO against
it; and walks on a graph, fine-tuning on them, then PPO for the shortest.

Texts are of single letters, a token each; `.` is the end-of-sequence token, and pads too.
"""

import contextlib
import io
import json
import math
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from . import doctor_curve, train_ppo, train_rm, train_sft
from .data import write_rows
from .decoding import generate
from .sampling import SamplingOptions

LETTER_IDS = ".abcdefghijklmnopqrstuvwxyz"
STOP = 0  # id of "."
MEASURED = 2048  # answers
EPISODES = 128  # a rollout


# Preferences, a reward model, PPO

LETTERS, LONGEST = 7, 6
BETA, MISSING_STOP = 0.5, 5.0  # the price of a nat of KL; what a truncated answer costs
FREE = 0.005  # a price of KL at which the policy strays as far as the reward model pays for


@dataclass(frozen=True)
class Pipeline:
    """What came out of pairs → reward model → PPO, all by the true reward that only drew the preferences."""

    accuracy_of_bayes: float  # the reward model's share of the accuracy that the noise of the preferences allows
    gain_share: float  # (J - J of the reference) / (J* - J of the reference)
    curves: dict[float, list[doctor_curve.Point]]  # by the price of KL


def true_reward(weights, answer):
    """Of ids, prompt first: the sum of the weights of what follows it, less the price of not ending."""
    return float(weights[answer[1:]].sum()) - MISSING_STOP * (answer[-1] != STOP)


def pipeline_optimum(weights, beta=BETA, longest=LONGEST):
    """(J*, J of the uniform reference). Exact, backwards over the length: Z = Σ_next e^{w/β} Z(next) / V, where Z is 1
    after the stop token and e^{-price/β} where there is no token left; the same for the reference's reward."""
    log_z, reference = -MISSING_STOP / beta, -MISSING_STOP
    for _ in range(longest):
        following = np.full(len(weights), log_z)
        following[STOP] = 0.0  # nothing follows it
        log_z = float(np.logaddexp.reduce(weights / beta + following) - math.log(len(weights)))
        reference = float(weights.mean() + reference * (1 - 1 / len(weights)))
    return beta * log_z, reference


def pipeline(seed, progress, pairs=2000, iterations=24):
    """A Pipeline; `progress(steps)` counts to `iterations` for the reward model and for each of two policies."""
    rng = np.random.default_rng([seed, 5])
    weights = rng.normal(size=LETTERS + 1)
    weights -= weights.mean()
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        _uniform_model(folder / "base", LETTERS + 1, seed)
        rows = []
        for better, worse in _drawn_pairs(weights, pairs, rng):
            rows.append({"prompt": _text(better[:1]), "chosen": _text(better[1:-1]), "rejected": _text(worse[1:-1])})
        write_rows(folder / "pairs.jsonl", rows)
        write_rows(folder / "prompts.jsonl", [{"prompt": _text([letter])} for letter in range(1, LETTERS + 1)])
        train_rm.main(
            f"--pretrain {folder}/base --dataset {folder}/pairs.jsonl --save_path {folder}/rm --prompt_format plain "
            "--batch_size 50 --accumulation_steps 1 --max_epochs 3 --lr 4e-3 --strategy zero2 --precision fp32 "
            f"--device cpu --tensorboard false --log_interval 1000 --seed {seed}".split()
        )
        progress(iterations)
        unit = json.loads((folder / "rm" / "config.json").read_text())["std"]  # of the scores that PPO is paid
        curves = {}
        for price in (FREE, BETA):  # the last one's actor is measured
            _ppo(
                folder,
                f"--pretrain {folder}/base --rm_path {folder}/rm --kl_coef {price / unit} --max_new_tokens {LONGEST} "
                f"--missing_eos_penalty {MISSING_STOP / unit} --value_clip 0 --sample_rows {EPISODES}",
                iterations,
                seed,
            )
            progress(iterations)
            curves[price] = doctor_curve.read_curve(folder / "out" / "samples.jsonl", _gold_of(weights), _paid)
        accuracy = _accuracy_of_bayes(folder / "rm", weights, rng)
        answers, logprobs = _answers(folder / "out" / "actor", [[i % LETTERS + 1] for i in range(MEASURED)], seed)
    rewards = np.array([true_reward(weights, answer) for answer in answers])
    lengths = np.array([len(answer) - 1 for answer in answers])
    kl = np.array(logprobs) + lengths * math.log(LETTERS + 1)
    best, reference = pipeline_optimum(weights)
    return Pipeline(accuracy, float(((rewards - BETA * kl).mean() - reference) / (best - reference)), curves)


def _gold_of(weights):
    """The true reward of a row of samples.jsonl."""

    def gold(row):
        end = "" if row["truncated"] else _text([STOP])
        ids = [LETTER_IDS.index(letter) for letter in row["prompt"] + row["response"] + end]
        return true_reward(weights, np.array(ids))

    return gold


def _paid(row):
    """What PPO is paid for it, up to a constant."""
    return row["score"] - MISSING_STOP * row["truncated"]


def _drawn_pairs(weights, count, rng):
    """(preferred, other): answers of the reference that end, drawn by Bradley and Terry's model."""
    pairs = []
    while len(pairs) < count:
        prompt = int(rng.integers(1, LETTERS + 1))
        one, other = _reference_answer(prompt, rng), _reference_answer(prompt, rng)
        if one == other:
            continue
        difference = true_reward(weights, one) - true_reward(weights, other)
        pairs.append((one, other) if rng.random() < 1 / (1 + math.exp(-difference)) else (other, one))
    return pairs


def _reference_answer(prompt, rng):
    """The prompt, at least one letter (a row of data needs some), and the end."""
    length = min(1 + rng.geometric(1 / (LETTERS + 1)), LONGEST - 1)
    return [prompt, *rng.integers(1, LETTERS + 1, length).tolist(), STOP]


@torch.no_grad()
def _accuracy_of_bayes(folder, weights, rng, pairs=2000):
    """The chance that the reward model agrees with a drawn preference, divided by that of the true reward's order."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    drawn = _drawn_pairs(weights, pairs, rng)
    answers = [answer for pair in drawn for answer in pair]
    lengths = torch.tensor([len(answer) for answer in answers])
    input_ids = torch.zeros(len(answers), int(lengths.max()), dtype=torch.int64)
    for row, answer in enumerate(answers):
        input_ids[row, : len(answer)] = torch.tensor(answer)
    scores = model.score(model.base_model(input_ids).last_hidden_state)[..., 0]
    scores = scores.gather(1, lengths[:, None] - 1)[:, 0].double().view(-1, 2)
    rewards = torch.tensor([true_reward(weights, answer) for answer in answers], dtype=torch.float64).view(-1, 2)
    difference = rewards[:, 0] - rewards[:, 1]
    agrees = torch.sigmoid(difference * torch.sign(scores[:, 0] - scores[:, 1])).mean()
    return float(agrees / torch.sigmoid(difference.abs()).mean())


# Walks, fine-tuning, PPO

NODES, STEPS, GOAL = 12, 8, 1  # nodes are 1 to NODES


@dataclass(frozen=True)
class Walks:
    legal: float  # share of moves along edges, after fine-tuning
    before: float  # mean over starts of shortest / taken steps, 0 for a walk that is illegal or does not arrive
    after: float  # the same after PPO


def graph(rng, edges_a_node=3):
    """Directed edges [N + 1, N + 1] by which every node reaches the goal: a random tree towards it, and others."""
    edges = np.zeros((NODES + 1, NODES + 1), dtype=bool)
    for node in range(2, NODES + 1):
        edges[node, rng.integers(max(1, node - 4), node)] = True
        edges[node, rng.choice(np.delete(np.arange(1, NODES + 1), node - 1), edges_a_node - 1)] = True
    return edges


def distances(edges):
    """{node: fewest steps to the goal}, breadth first."""
    found, waiting = {GOAL: 0}, deque([GOAL])
    while waiting:
        node = waiting.popleft()
        for before in np.flatnonzero(edges[:, node]).tolist():
            if before not in found:
                found[before] = found[node] + 1
                waiting.append(before)
    return found


def optimality(edges, shortest, answer):
    """Of ids, start first: shortest / taken steps of a legal walk that ends at the goal, else 0."""
    *walk, last = answer
    legal = all(edges[a, b] for a, b in zip(walk, walk[1:], strict=False))
    return shortest[walk[0]] / (len(walk) - 1) if last == STOP and len(walk) > 1 and legal and walk[-1] == GOAL else 0.0


def walks(seed, progress, rows=1500, iterations=30):
    """A Walks; `progress(steps)` counts to `iterations` and as many for fine-tuning."""
    rng = np.random.default_rng([seed, 6])
    edges = graph(rng)
    shortest = distances(edges)
    starts = list(range(2, NODES + 1))
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        _uniform_model(folder / "base", NODES + 1, seed)
        drawn = [_random_walk(edges, int(rng.choice(starts)), rng) for _ in range(rows)]
        write_rows(folder / "walks.jsonl", [{"prompt": _text(w[:1]), "completion": _text(w[1:])} for w in drawn])
        write_rows(folder / "prompts.jsonl", [{"prompt": _text([start])} for start in starts])
        train_sft.main(
            f"--pretrain {folder}/base --dataset {folder}/walks.jsonl --save_path {folder}/sft --prompt_format plain "
            "--batch_size 50 --accumulation_steps 1 --max_epochs 6 --lr 4e-3 --strategy zero2 --precision fp32 "
            f"--device cpu --tensorboard false --log_interval 1000 --seed {seed}".split()
        )
        progress(iterations)
        text = f"EDGES, SHORTEST = {np.argwhere(edges).tolist()}, {shortest}\n{_JUDGE}"
        (folder / "judge.py").write_text(text, encoding="utf-8")
        _ppo(
            folder,
            f"--pretrain {folder}/sft --reward_function {folder}/judge.py:reward --kl_coef 0.02 "
            f"--missing_eos_penalty 0 --max_new_tokens {STEPS + 1}",
            iterations,
            seed,
        )
        progress(iterations)
        prompts = [[starts[i % len(starts)]] for i in range(MEASURED)]
        before, after = (_answers(folder / part, prompts, seed, STEPS + 1)[0] for part in ("sft", "out/actor"))
    moves = [(a, b) for answer in before for a, b in zip(answer, answer[1:], strict=False) if b != STOP]
    return Walks(
        float(np.mean([edges[a, b] for a, b in moves])),
        *(float(np.mean([optimality(edges, shortest, answer) for answer in part])) for part in (before, after)),
    )


_JUDGE = f"""
def reward(prompt_ids, completion_ids, stopped):
    rewards = []
    for start, rest, ended in zip(prompt_ids, completion_ids, stopped):
        walk = [*start, *rest][: -1 if ended else None]
        legal = all([a, b] in EDGES for a, b in zip(walk, walk[1:]))
        arrived = ended and len(walk) > 1 and legal and walk[-1] == {GOAL}
        rewards.append(SHORTEST[walk[0]] / (len(walk) - 1) if arrived else 0.0)
    return rewards
"""


def _random_walk(edges, node, rng):
    walk = [node]
    while walk[-1] != GOAL and len(walk) <= STEPS:
        walk.append(int(rng.choice(np.flatnonzero(edges[walk[-1]]))))
    return walk


# Both


def _ppo(folder, options, iterations, seed):
    train_ppo.main(
        f"{folder}/prompts.jsonl --prompt_format plain --save_path {folder}/out {options} --score_clip 0 "
        f"--experience_batch_size {EPISODES} --train_batch_size {EPISODES} --ppo_epochs 4 --num_episodes {iterations} "
        "--max_timesteps 1 --lr 4e-3 --critic_lr 4e-3 --strategy zero2 --precision fp32 --device cpu "
        f"--tensorboard false --log_interval 1 --seed {seed}".split()
    )


def _answers(folder, prompts, seed, longest=LONGEST):
    """(ids with the prompt first, summed log-probability of each answer) of a model's samples."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    options = SamplingOptions(max_new_tokens=longest, stop_ids=(STOP,), seed=seed)
    answers = generate(model, prompts, options, batch_size=256)
    ids = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
    return ids, [math.fsum(answer.logprobs) for answer in answers]


def _uniform_model(folder, vocab, seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_embd=64, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=STOP,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({_text([i]): i for i in range(vocab)}, unk_token="."))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=".").save_pretrained(folder)


def _text(ids):
    return "".join(LETTER_IDS[i] for i in ids)


@contextlib.contextmanager
def _quiet():
    """The commands tell a user much that is not about the doctor. What went wrong is raised, so nothing is lost."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
