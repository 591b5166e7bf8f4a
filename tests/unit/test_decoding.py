"""Batched decoding with a cache against the plain model, shown each answer on its own and without one."""

from dataclasses import replace

import pytest
import torch
from decoding_cases import check_greedy, check_logprobs, lively_model, make_prompts, plain_logits
from megalith import engine
from megalith.rlhf import decoding
from megalith.rlhf.decoding import generate
from megalith.rlhf.sampling import SamplingOptions
from tiny import FAMILIES

GREEDY = SamplingOptions(max_new_tokens=20, temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_in_batches_are_those_of_the_plain_model(family):
    model = lively_model(family)
    prompts = make_prompts(3, 9, 1, 14, 7, 14, 2)
    answers = generate(model, prompts, GREEDY, batch_size=3)  # rows leave, and others join
    check_greedy(model, prompts, answers)
    assert all(answer.finish_reason == "length" for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_fixed_shapes_give_the_same_answers(family, monkeypatch):
    """All that a CUDA graph replays, but for the recording."""
    monkeypatch.setattr(decoding, "can_record", lambda model, device: True)
    shapes = []
    plan = decoding.KVCache.plan_static
    monkeypatch.setattr(decoding.KVCache, "plan_static", lambda self, x: shapes.append(self.allocated) or plan(self, x))
    model = lively_model(family)
    prompts = make_prompts(3, 9, 1, 14, 7, 14, 2)
    options = [replace(GREEDY, max_new_tokens=count) for count in (4, 20, 9, 3, 12, 6, 11)]
    check_greedy(model, prompts, generate(model, prompts, options, batch_size=4))
    assert (4, 128) in shapes and len(shapes) > 15


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_eager_attention(family):
    model = lively_model(family, attn_implementation="eager")
    prompts = make_prompts(5, 2, 9)
    check_greedy(model, prompts, generate(model, prompts, GREEDY))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_logprobs_are_those_of_the_tempered_distribution(temperature):
    model = lively_model("gpt2")
    prompts = make_prompts(3, 9, 5)
    options = SamplingOptions(max_new_tokens=20, temperature=temperature, seed=3)
    for prompt, answer in zip(prompts, generate(model, prompts, options), strict=True):
        check_logprobs((plain_logits(model, prompt, answer.tokens) / temperature).log_softmax(dim=-1), answer)


def test_the_cache_grows_over_many_blocks():
    model = lively_model("llama", max_position_embeddings=512)
    prompts = make_prompts(100, 140)
    answers = generate(model, prompts, SamplingOptions(max_new_tokens=200, temperature=0))
    check_greedy(model, prompts, answers)


def test_an_answer_ends_with_its_first_stop_token():
    model = lively_model("gpt2")
    prompts = make_prompts(3, 9, 5)
    free = generate(model, prompts, GREEDY)
    stop_ids = (free[0].tokens[4], free[1].tokens[0])
    for plain, answer in zip(free, generate(model, prompts, replace(GREEDY, stop_ids=stop_ids)), strict=True):
        ends = [index for index, token in enumerate(plain.tokens) if token in stop_ids]
        assert answer.tokens == plain.tokens[: ends[0] + 1 if ends else None]
        assert answer.finish_reason == ("stop" if ends else "length")
        assert len(answer.logprobs) == len(answer.tokens) > 0


def test_seeds_are_the_same_in_any_batch_and_advance_without_one():
    model = lively_model("gpt2")
    prompts = make_prompts(3, 9, 5, 9)
    options = SamplingOptions(max_new_tokens=12, seed=7)
    together = [answer.tokens for answer in generate(model, prompts, options)]
    for index, prompt in enumerate(prompts):
        alone = generate(model, [prompt], replace(options, seed=7 + index))
        assert alone[0].tokens == together[index]
    same = generate(model, [prompts[0]] * 2, [options, options])
    assert same[0].tokens == same[1].tokens == together[0]

    unseeded = SamplingOptions(max_new_tokens=12)
    torch.manual_seed(0)
    first, second = (generate(model, prompts, unseeded) for _ in range(2))
    assert [a.tokens for a in first] != [a.tokens for a in second]
    torch.manual_seed(0)
    assert [a.tokens for a in first] == [a.tokens for a in generate(model, prompts, unseeded)]


def test_each_row_keeps_its_own_options():
    model = lively_model("llama")
    prompts = make_prompts(3, 9, 5, 4)
    options = [
        GREEDY,
        SamplingOptions(max_new_tokens=9, seed=1, top_k=3),
        SamplingOptions(max_new_tokens=15, seed=2, top_p=0.8, temperature=1.5),
        SamplingOptions(max_new_tokens=12, temperature=0, repetition_penalty=1.5, presence_penalty=0.5),
    ]
    for prompt, row, answer in zip(prompts, options, generate(model, prompts, options), strict=True):
        assert answer.tokens == generate(model, [prompt], [row])[0].tokens
        assert len(answer.tokens) == row.max_new_tokens


def test_a_sharded_model_answers_the_same_streamed_and_gathered():
    plain = lively_model("llama", num_hidden_layers=8)
    prompts = make_prompts(3, 9, 5)
    expected = [answer.tokens for answer in generate(plain, prompts, GREEDY)]
    weight_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    model = lively_model("llama", num_hidden_layers=8).requires_grad_(False).train()
    model, _ = engine.initialize(model, None, placement="host", device_budget=weight_bytes // 3, device="cpu")
    assert [answer.tokens for answer in generate(model, prompts, GREEDY)] == expected
    assert engine.memory_report(model)["device"]["total"]["peak_bytes"] <= weight_bytes // 3
    with engine.gathered(model):
        assert [answer.tokens for answer in generate(model, prompts, GREEDY)] == expected
    assert model.training and all(module.training for module in model.modules())


def test_bad_prompts_are_named():
    model = lively_model("gpt2")
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        generate(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match="prompt 0: a prompt of 60 tokens and max_new_tokens=20 do not fit .* 64"):
        generate(model, make_prompts(60), GREEDY)
    with pytest.raises(ValueError, match="2 options for 1 prompts"):
        generate(model, [[1]], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="batch_size=0"):
        generate(model, [[1]], GREEDY, batch_size=0)


def test_logits_that_are_not_finite_are_an_error():
    model = lively_model("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits after 2 tokens"):
        generate(model, [[1, 2]], GREEDY)


def test_sliding_windows_are_refused_once_they_matter():
    model = lively_model("mixtral", sliding_window=8)
    check_greedy(model, [[1, 2]], generate(model, [[1, 2]], SamplingOptions(max_new_tokens=4, temperature=0)))
    with pytest.raises(NotImplementedError, match="sliding window of 8"):
        generate(model, [[1, 2]], GREEDY)
