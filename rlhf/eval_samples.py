"""What the supervised stages write to `samples.jsonl` at every evaluation: a few held-out rows, as text."""

import torch

from .decoding import evaluating, max_positions
from .rollout import generate_on_ranks
from .sampling import SamplingOptions
from .templates import Sample

SHOWN = 4  # held-out rows an evaluation
NEW_TOKENS = 64


def answer_samples(model, samples, tokenizer, ranks):
    """The model's greedy answers to the first `samples`, as dicts {"prompt", "answer", "reference"}. A collective.

    The prompt is what stands before the first trained token; of a row that is trained from its start, as in
    pretraining, its first half. Rows that leave the model no position for an answer are left out.
    """
    limit = max_positions(model) or float("inf")
    prompts, references, options = [], [], []
    for sample in samples[:SHOWN]:
        border = _prompt_numel(sample)
        room = min(limit - border, NEW_TOKENS)
        if room > 0:
            prompts.append(sample.ids[:border].tolist())
            references.append(sample.ids[border:].tolist())
            stop_ids = (tokenizer.eos_token_id,)
            options.append(SamplingOptions(max_new_tokens=room, temperature=0, stop_ids=stop_ids, seed=0))
    answers = generate_on_ranks(model, prompts, options, SHOWN, ranks) if prompts else []
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "answer": tokenizer.decode(answer.tokens),
            "reference": tokenizer.decode(reference),
        }
        for prompt, reference, answer in zip(prompts, references, answers, strict=True)
    ]


def _prompt_numel(sample: Sample):
    first = int(sample.trained.argmax())
    return first if first else max(1, len(sample) // 2)


@torch.no_grad()
def comparison_samples(model, comparisons, tokenizer, score):
    """The first `comparisons` as dicts {"prompt", "answers": [{"text", "rank", "score"}]}. A collective where `score`
    is one: it gives the scores [N] that `model` gives all answers of a list of comparisons."""
    shown = comparisons[:SHOWN]
    with evaluating(model):
        scores = iter(score(shown).tolist())
    rows = []
    for comparison in shown:
        border = int(comparison.answers[0].trained.argmax())
        answers = [
            {"text": tokenizer.decode(answer.ids[border:].tolist()), "rank": rank, "score": next(scores)}
            for answer, rank in zip(comparison.answers, comparison.ranks, strict=True)
        ]
        rows.append({"prompt": tokenizer.decode(comparison.answers[0].ids[:border].tolist()), "answers": answers})
    return rows
