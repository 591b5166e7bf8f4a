"""Sampling against naive implementations, and against transformers' own filters and penalties."""

import pytest
import torch
from megalith.rlhf.sampling import (
    RowOptions,
    SamplingOptions,
    TokenCounts,
    choose_tokens,
    draw,
    filter_threshold,
    penalize,
    uniform_noise,
)
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

V = 300


def make_logits(rows: int, seed: int = 0, scale: float = 3) -> torch.Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.5), (0, 0.999), (40, 0.9), (500, 0.3)]
)
@pytest.mark.parametrize("scale", [3, 0.1])  # peaked; and flat, so that many tokens are needed for top_p
def test_filters_keep_what_transformers_keeps(top_k, top_p, scale):
    logits = make_logits(5, scale=scale)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    # The other rows' options change nothing.
    ks, ps = torch.tensor([top_k, 3, top_k, 0, top_k]), torch.tensor([top_p, 1.0, top_p, 0.7, top_p])
    threshold = filter_threshold(logits, ks, ps)
    for row in (0, 2, 4):
        assert torch.equal(logits[row] >= threshold[row], expected[row] > -torch.inf)


def test_penalties_equal_naive_ones():
    logits = make_logits(4)
    prompts = [[1, 2, 2], [5], [7, 7, 7, 8], [0]]
    answers = [[3, 3, 3, 1], [], [9, 8], [4]]
    options = [
        SamplingOptions(repetition_penalty=1.3),
        SamplingOptions(presence_penalty=0.7, frequency_penalty=-0.4),
        SamplingOptions(repetition_penalty=0.8, presence_penalty=-1.5, frequency_penalty=0.9),
        SamplingOptions(),
    ]
    counts = TokenCounts.of(prompts, answers, V, "cpu")
    answers[0].append(6)
    answers[1].append(5)
    answers[2].append(9)
    answers[3].append(4)
    counts.add(torch.tensor([6, 5, 9, 4]))
    actual = penalize(logits, counts, RowOptions.of(options, [0] * 4, "cpu"))
    for row, (prompt, answer, option) in enumerate(zip(prompts, answers, options, strict=True)):
        expected = logits[row].tolist()
        for token in range(V):
            if token in prompt + answer:
                expected[token] *= 1 / option.repetition_penalty if expected[token] > 0 else option.repetition_penalty
            if token in answer:
                expected[token] -= option.presence_penalty + option.frequency_penalty * answer.count(token)
        torch.testing.assert_close(actual[row], torch.tensor(expected))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompts[0] + answers[0]]), logits[:1])
    torch.testing.assert_close(actual[:1], theirs)
    assert torch.equal(actual[3], logits[3])


def test_samples_have_the_filtered_distribution_and_report_the_tempered_one():
    rows = 40_000
    logits = make_logits(1).expand(rows, V)
    options = SamplingOptions(temperature=1.5, top_k=6, top_p=0.95)
    tokens, logprobs = choose_tokens(
        logits, RowOptions.of([options] * rows, range(rows), "cpu"), torch.zeros(rows, dtype=torch.int64)
    )
    tempered = logits[0] / 1.5
    filtered = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(6)(None, tempered.unsqueeze(0)))[0]
    expected = filtered.softmax(dim=-1)
    counts = torch.bincount(tokens, minlength=V)
    deviation = (counts / rows - expected) / (expected * (1 - expected) / rows).sqrt().clamp(min=1e-12)
    assert counts[expected == 0].sum() == 0
    assert deviation[expected > 0].abs().max() < 4.5  # standard errors, over six tokens
    assert (logprobs - tempered.log_softmax(dim=-1)[tokens]).abs().max() < 1e-5


def test_greedy_rows_take_the_best_token_after_penalties():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    options = [SamplingOptions(temperature=0), SamplingOptions(temperature=0, presence_penalty=2)]
    counts = TokenCounts.of([[0], [0]], [[1], [1]], 3, "cpu")
    rows = RowOptions.of(options, [0, 0], "cpu")
    tokens, logprobs = choose_tokens(logits, rows, torch.ones(2, dtype=torch.int64), counts)
    assert tokens.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1)[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="counts=None"):
        choose_tokens(logits, rows, torch.ones(2, dtype=torch.int64))


def test_noise_is_uniform_and_a_function_of_seed_and_step_alone():
    seeds, steps = torch.arange(1000).repeat_interleave(100), torch.arange(100).repeat(1000)
    noise = uniform_noise(seeds, steps)
    assert 0 <= noise.min() and noise.max() < 1 and len(noise.unique()) > 0.99 * len(noise)
    assert abs(noise.mean() - 0.5) < 4 / (12 * len(noise)) ** 0.5
    table = noise.view(1000, 100).double()  # neighbouring seeds and steps are not correlated
    for shifted in (table[1:, :] * table[:-1, :], table[:, 1:] * table[:, :-1], table[1:, :-1] * table[:-1, 1:]):
        assert abs(shifted.mean() - 0.25) < 5 * (7 / 144 / shifted.numel()) ** 0.5
    order = torch.randperm(len(seeds), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_noise(seeds[order], steps[order]), noise[order])


def test_noise_at_its_ends_draws_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
        ("presence_penalty", "1"),
        ("frequency_penalty", float("inf")),
        ("stop_ids", (-1,)),
        ("stop_ids", "2"),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingOptions(**{field: value})


def test_what_ppo_may_sample_with():
    assert SamplingOptions(temperature=0.7).samples_as_reported
    for changes in ({"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.1}):
        assert not SamplingOptions(**changes).samples_as_reported
