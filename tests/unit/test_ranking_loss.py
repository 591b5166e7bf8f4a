"""The loss of ranked answers and the reading of preferences."""

import json
import math

import numpy as np
import pytest
import torch
from megalith.rlhf.errors import InputError
from megalith.rlhf.losses import ranking_loss_sum, ranking_metrics
from megalith.rlhf.preferences import (
    Comparison,
    Pairs,
    collate_comparisons,
    encode_preferences,
    fit_comparisons,
    read_preferences,
)
from megalith.rlhf.templates import Sample, prompt_renderer
from megalith.rlhf.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def one_pair(margin=0.0):
    return Pairs(torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.full((1,), margin))


def answer(prompt, text):
    ids = np.array([*prompt, *text], dtype=np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt))


def comparison(prompt, *texts, ranks=None, margin=0.0):
    return Comparison(tuple(answer(prompt, text) for text in texts), ranks or tuple(range(len(texts))), margin)


def test_both_losses_equal_the_formula_with_a_margin():
    scores = torch.tensor([0.3, -1.1], dtype=torch.float64)
    expected = math.log(1 + math.exp(-(0.3 + 1.1 - 0.5)))
    for name in ("log_sig", "log_exp"):
        assert ranking_loss_sum(scores, one_pair(0.5), name).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["log_sig", "log_exp"])
@pytest.mark.parametrize("delta", [-200.0, 200.0])
def test_value_and_gradient_stay_finite_far_out(name, delta):  # R3
    scores = torch.tensor([delta, 0.0], requires_grad=True)
    loss = ranking_loss_sum(scores, one_pair(), name)
    loss.backward()
    assert loss.item() == pytest.approx(max(-delta, 0.0), abs=1e-6)
    assert scores.grad.tolist() == pytest.approx([-1.0, 1.0] if delta < 0 else [0.0, 0.0], abs=1e-6)


def test_a_shift_changes_nothing_and_centering_penalises_it():  # R4
    scores = torch.tensor([1.0, 0.5])
    assert ranking_loss_sum(scores, one_pair()) == ranking_loss_sum(scores + 8, one_pair())
    centred = ranking_loss_sum(scores, one_pair(), center_coefficient=0.1) - ranking_loss_sum(scores, one_pair())
    assert centred.item() == pytest.approx(0.1 * 1.5**2, rel=1e-5)


def test_a_prompt_weighs_one_however_many_answers_it_has():  # R5
    rows = [comparison([1], [2], [3], [4], [5]), comparison([1], [6], [7])]
    _, _, _, pairs = collate_comparisons(rows, 0, "cpu")
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0))
    four, two = scores[:4].tolist(), scores[4:].tolist()
    naive = [math.log1p(math.exp(four[j] - four[i])) for i in range(4) for j in range(i + 1, 4)]
    expected = sum(naive) / 6 + math.log1p(math.exp(two[1] - two[0]))
    assert ranking_loss_sum(scores, pairs).item() == pytest.approx(expected, rel=1e-6)


def test_ties_are_not_compared_and_blanks_weigh_nothing():
    row = comparison([1], [2], [3], [4], ranks=(1, 1, 2))
    assert row.pairs == [(0, 2), (1, 2)]
    _, _, _, pairs = collate_comparisons([row, row.blank()], 0, "cpu")
    assert pairs.weight.tolist() == [0.5, 0.5, 0, 0]


def test_swapping_the_answers_turns_the_accuracy_round():  # R6
    rows = [comparison([1], [2], [3]) for _ in range(50)]
    _, _, _, pairs = collate_comparisons(rows, 0, "cpu")
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    metrics = ranking_metrics(scores, pairs)
    swapped = Pairs(pairs.worse, pairs.better, pairs.weight, pairs.margin)
    turned = ranking_metrics(scores, swapped)
    assert 0 < metrics["accuracy"] < 50
    assert turned["accuracy"] == 50 - metrics["accuracy"]
    assert turned["margin"] == -metrics["margin"]


# Reading


def read(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema, preferences = read_preferences(path)
    render = prompt_renderer(TOKENIZER, "plain")
    texts = [
        [
            (TOKENIZER.decode(a.ids[~a.trained]), TOKENIZER.decode(a.ids[a.trained]), p.ranks[i])
            for i, a in enumerate(c.answers)
        ]
        for p, c in zip(preferences, encode_preferences(preferences, render, TOKENIZER), strict=True)
    ]
    return schema.name, preferences, texts


EOS = "<|endoftext|>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, "preference"),
        ({"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}, "dialogues"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}, "dialogues"),
        (
            {
                "context": [{"from": "user", "content": "Q"}],
                "chosen": [{"from": "assistant", "content": "good"}],
                "rejected": [{"from": "assistant", "content": "bad"}],
            },
            "preference in context",
        ),
        ({"prompt": "Q", "responses": ["bad", "good"], "rank": [1, 0]}, "ranking"),
    ],
)
def test_every_schema_gives_the_same_comparison(row, schema, tmp_path):
    name, _, texts = read(tmp_path, row)
    assert name == schema
    assert sorted(texts[0], key=lambda entry: entry[2]) == [("Q", "good" + EOS, 0), ("Q", "bad" + EOS, 1)]


def test_only_the_last_turn_of_a_dialogue_is_the_answer(tmp_path):
    head = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    _, _, texts = read(tmp_path, {"chosen": head + " good", "rejected": head + " bad"})
    assert texts[0][0][:2] == ("one" + "two" + EOS + "three", "good" + EOS)


def test_margins_and_scores(tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 4.5, "score_rejected": 1},
    ]
    assert [preference.margin for preference in read(tmp_path, *rows)[1]] == [2.0, 3.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a"}, "field 'rejected' is missing"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "wide"}, "margin, .* have to be finite numbers"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": math.nan}, "have to be finite numbers"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": True}, "have to be finite numbers"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 3}, "have to be finite numbers"),
        ({"prompt": "Q", "responses": ["a"]}, "a list of two answers or more"),
        ({"prompt": "Q", "responses": ["a", "b"], "rank": [1]}, "a whole number for each"),
        ({"prompt": "Q", "chosen": [user("a")], "rejected": "b"}, "'chosen' does not end with an assistant turn"),
        ({"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q\n\nAssistant: b"}, "to end with an Assistant turn"),
    ],
)
def test_wrong_rows_are_named(row, message, tmp_path):
    with pytest.raises(InputError, match=f"rows.jsonl, line 1: .*{message}"):
        read(tmp_path, row)


def test_prompts_are_cut_on_the_left_and_what_cannot_be_compared_is_dropped():
    kept = comparison([1, 2, 3, 4], [5, 6], [7])
    too_long = comparison([1], [5] * 5, [6])
    same = comparison([1], [5], [5])
    tied = comparison([1], [5], [6], ranks=(0, 0))
    other_prompt = Comparison((answer([1, 2], [5]), answer([3, 2], [6])), (0, 1))
    fitted = fit_comparisons([kept, too_long, same, tied, other_prompt], max_len=5)
    assert (fitted.truncated, fitted.dropped) == (1, 4)
    (row,) = fitted.samples
    assert [a.ids.tolist() for a in row.answers] == [[2, 3, 4, 5, 6], [2, 3, 4, 7]]
    assert [a.trained.tolist() for a in row.answers] == [[False] * 3 + [True] * 2, [False] * 3 + [True]]


def test_a_batch_marks_answers_and_real_tokens():
    input_ids, answered, mask, pairs = collate_comparisons([comparison([1, 2], [5, 6], [7])], 9, "cpu")
    assert input_ids.tolist() == [[1, 2, 5, 6], [1, 2, 7, 9]]
    assert answered.tolist() == [[False, False, True, True], [False, False, True, False]]
    assert mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert (pairs.better.tolist(), pairs.worse.tolist()) == ([0], [1])
