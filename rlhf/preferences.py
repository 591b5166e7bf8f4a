"""Preference data: answers to one prompt, ranked. Reading the schemas, and comparisons as tokens.

Pairs come as `{"prompt", "chosen", "rejected"}` (strings or message lists; `margin`, or `score_chosen` and
`score_rejected`, beside them), as `{"chosen", "rejected"}` whose common beginning is the prompt (message lists, or
HH-RLHF's strings with "\\n\\nHuman:" and "\\n\\nAssistant:"), or as ColossalChat's `{"context", "chosen", "rejected"}`.
Rankings of K answers are `{"prompt", "responses"}`, best first, or with a `rank` each: 1 is best, equal ranks are ties.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from .batches import SampleSet
from .data import Conversation, Schema, detect_schema, messages_of, read_rows, text_of
from .errors import InputError
from .templates import Sample, encode, segments_of

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """Answers to one prompt as conversations; a smaller rank is better, equal ranks are ties."""

    conversations: tuple[Conversation, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A Preference as tokens. Every answer's last turn is marked as trained."""

    answers: tuple[Sample, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0

    def __len__(self):
        return sum(len(answer) for answer in self.answers)

    @property
    def loss_tokens(self):
        return sum(answer.loss_tokens for answer in self.answers)

    @property
    def positions(self):
        return max(answer.positions for answer in self.answers)

    @property
    def attended(self):
        return sum(answer.attended for answer in self.answers)

    @property
    def pairs(self):
        """(better, worse) indices of every two answers that are not tied."""
        count = range(len(self.ranks))
        return [(i, j) for i in count for j in count if self.ranks[i] < self.ranks[j]]

    def arrays(self):
        for answer in self.answers:
            yield from answer.arrays()
        yield np.array([*self.ranks, self.margin])

    def blank(self):
        """One like it that weighs nothing, so that a rank without work takes part in the collectives of the others."""
        return replace(self, answers=tuple(answer.blank() for answer in self.answers))


@dataclass(frozen=True)
class Pairs:
    """Which answers of a batch are compared: four tensors [P].

    `weight` is 1 / (pairs of that prompt), so that every prompt weighs 1 however many answers it has, and 0 for a
    blank. `better` and `worse` index the answers of the batch.
    """

    better: torch.Tensor
    worse: torch.Tensor
    weight: torch.Tensor
    margin: torch.Tensor


# Reading


def _prompt(row, key):
    if isinstance(row.values.get(key), list):
        return tuple(messages_of(row, key, row.values[key])) if row.values[key] else ()
    return ({"role": "user", "content": text_of(row, key)},)


def _answer(row, key, prompt):
    """The whole conversation that ends with this answer."""
    if isinstance(row.values.get(key), list):
        messages = tuple(messages_of(row, key, row.values[key]))
        if messages[: len(prompt)] != prompt:
            messages = (*prompt, *messages)
    else:
        messages = (*prompt, {"role": "assistant", "content": text_of(row, key)})
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{row.source}: field '{key}' does not end with an assistant turn")
    return Conversation(messages, row.source)


def _margin(row):
    given = [row.values.get(name) for name in ("score_chosen", "score_rejected")]
    if given == [None, None]:
        margin = row.values.get("margin")
        given = [0.0 if margin is None else margin, 0.0]
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in given):
        raise InputError(f"{row.source}: margin, or score_chosen and score_rejected, have to be finite numbers")
    return float(given[0] - given[1])


def _from_pair(prompt_key):
    def convert(row):
        prompt = _prompt(row, prompt_key) if prompt_key else ()
        answers = tuple(_answer(row, key, prompt) for key in ("chosen", "rejected"))
        return Preference(answers, (0, 1), _margin(row))

    return convert


def _from_dialogues(row):
    """`chosen` and `rejected` without a prompt: message lists, HH-RLHF's dialogues, or two bare answers."""
    texts = [row.values["chosen"], row.values["rejected"]]
    if not all(isinstance(text, str) and _TURN.search(text) for text in texts):
        return _from_pair(None)(row)
    return Preference(tuple(_dialogue(row, text) for text in texts), (0, 1), _margin(row))


def _dialogue(row, text):
    first, *rest = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(rest[::2], rest[1::2], strict=True)
        if said.strip() or speaker == "Assistant"
    ]
    if first.strip() or messages[-1]["role"] != "assistant":
        raise InputError(f"{row.source}: a dialogue has to begin with a turn and to end with an Assistant turn")
    return Conversation(tuple(messages), row.source)


def _from_ranking(row):
    responses, ranks = row.values["responses"], row.values.get("rank")
    if not (isinstance(responses, list) and len(responses) >= 2):
        raise InputError(f"{row.source}: field 'responses' has to be a list of two answers or more")
    if ranks is None:
        ranks = range(len(responses))
    elif not (isinstance(ranks, list) and len(ranks) == len(responses) and all(isinstance(r, int) for r in ranks)):
        raise InputError(f"{row.source}: field 'rank' has to hold a whole number for each of the responses")
    prompt = _prompt(row, "prompt")
    conversations = []
    for response in responses:
        if not isinstance(response, str):
            raise InputError(f"{row.source}: every response has to be a string, one is {type(response).__name__}")
        conversations.append(Conversation((*prompt, {"role": "assistant", "content": response}), row.source))
    return Preference(tuple(conversations), tuple(ranks))


SCHEMAS = (
    Schema("ranking", ("prompt", "responses"), _from_ranking),
    Schema("preference", ("prompt", "chosen", "rejected"), _from_pair("prompt")),
    Schema("preference in context", ("context", "chosen", "rejected"), _from_pair("context")),
    Schema("dialogues", ("chosen", "rejected"), _from_dialogues),
)


def read_preferences(path, limit=None):
    """Return (schema, preferences) of the file; every row is checked against the schema of the first."""
    rows = read_rows(path, limit)
    schema = detect_schema(rows, SCHEMAS)
    for row in rows:
        for key in schema.required:
            if key not in row.values:
                raise InputError(f"{row.source}: field '{key}' is missing (schema {schema.name})")
    return schema, [schema.convert(row) for row in rows]


# Tokens


def encode_preferences(preferences, render, tokenizer):
    """Comparisons of the preferences: an answer is everything after the prompt, the end-of-sequence token included."""
    segments = []
    for preference in preferences:
        for conversation in preference.conversations:
            last = segments_of(conversation, render, tokenizer.eos_token)[-1]
            segments.append([*(replace(segment, trained=False) for segment in last[:-1]), last[-1]])
    answers = iter(encode(segments, tokenizer))
    return [
        Comparison(tuple(next(answers) for _ in preference.conversations), preference.ranks, preference.margin)
        for preference in preferences
    ]


def fit_comparisons(comparisons, max_len):
    """Cut prompts on the left until every answer fits into `max_len` tokens; what was cut and dropped is counted.

    Dropped are comparisons whose answers alone are too long, are all tied or the same, or do not follow one prompt.
    """
    kept, cut, dropped = [], 0, 0
    for comparison in comparisons:
        prompts = {answer.ids[: _prompt_numel(answer)].tobytes() for answer in comparison.answers}
        prompt_numel = _prompt_numel(comparison.answers[0])
        surplus = max(len(answer) for answer in comparison.answers) - max_len
        same = len({answer.ids.tobytes() for answer in comparison.answers}) == 1
        if len(prompts) > 1 or same or not comparison.pairs or surplus >= prompt_numel:
            dropped += 1
            continue
        if surplus > 0:
            answers = tuple(Sample(a.ids[surplus:], a.trained[surplus:]) for a in comparison.answers)
            comparison = replace(comparison, answers=answers)
            cut += 1
        kept.append(comparison)
    return SampleSet(tuple(kept), cut, dropped)


def _prompt_numel(answer):
    return int(answer.trained.argmax())


def collate_comparisons(comparisons, pad_id, device):
    """Return (input_ids int64 [N, T], answered bool [N, T], mask bool [N, T], Pairs) of the N answers of a batch,
    padded on the right. `mask` is True on real tokens and `answered` on the answers' own."""
    answers = [answer for comparison in comparisons for answer in comparison.answers]
    length = max(len(answer) for answer in answers)
    input_ids = torch.full((len(answers), length), pad_id)
    answered = torch.zeros(len(answers), length, dtype=torch.bool)
    mask = torch.zeros_like(answered)
    for row, answer in enumerate(answers):
        input_ids[row, : len(answer)] = torch.from_numpy(answer.ids).long()
        answered[row, : len(answer)] = torch.from_numpy(answer.trained)
        mask[row, : len(answer)] = True
    better, worse, weight, margin, first = [], [], [], [], 0
    for comparison in comparisons:
        pairs = comparison.pairs
        better += [first + i for i, _ in pairs]
        worse += [first + j for _, j in pairs]
        weight += [1 / len(pairs) if comparison.loss_tokens else 0.0] * len(pairs)
        margin += [comparison.margin] * len(pairs)
        first += len(comparison.answers)
    pairs = Pairs(
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weight, device=device),
        torch.tensor(margin, device=device),
    )
    return input_ids.to(device), answered.to(device), mask.to(device), pairs
