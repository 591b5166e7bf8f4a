"""Continuous batching: what one request gets does not depend on the others, and nothing is kept that is not needed."""

import threading
import time

import pytest
import torch
from decoding_cases import lively_model, make_prompts
from megalith.rlhf.batching import Batcher, BatchingOptions, ClosedError, QueueFullError
from megalith.rlhf.decoding import Decoder, generate
from megalith.rlhf.kv_cache import KVCache
from megalith.rlhf.prefixes import PrefixStore
from megalith.rlhf.sampling import SamplingOptions

WAIT_S = 20


@pytest.fixture(scope="module")
def model():
    return lively_model("llama", max_position_embeddings=512)


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, BatchingOptions(max_batch=4, max_queue=40, kv_budget_bytes=2**24, prefill_chunk=8))
    yield batcher
    batcher.close(timeout_s=0)


def options_of(index: int) -> SamplingOptions:
    if index % 3 == 0:
        return SamplingOptions(max_new_tokens=5 + index, temperature=0)
    return SamplingOptions(max_new_tokens=5 + index, seed=index, top_p=0.9 if index % 3 == 1 else 1.0)


def test_requests_that_join_and_leave_change_no_answer(model, batcher):
    prompts = make_prompts(*(3 + 5 * index % 31 for index in range(16)))
    expected = [generate(model, [prompt], [options_of(index)])[0] for index, prompt in enumerate(prompts)]
    streams = []
    for index, prompt in enumerate(prompts):  # more than the batch holds, some of them late, some cancelled
        streams.append(batcher.submit(prompt, options_of(index)))
        doomed = batcher.submit(prompt[::-1], SamplingOptions(max_new_tokens=300, seed=index))
        if index % 4 == 3:
            streams[-2].wait(1, WAIT_S)
        doomed.cancel()
    for stream, answer in zip(streams, expected, strict=True):
        assert list(stream) == answer.tokens
        assert stream.finish_reason == answer.finish_reason == "length"
        assert stream.answer.logprobs == pytest.approx(answer.logprobs, abs=1e-5)
    wait_until(lambda: batcher.stats().finished.get("cancelled") == 16)
    stats = batcher.stats()
    assert stats.finished["length"] == 16 and stats.running == stats.waiting == 0
    assert stats.kv_bytes == stats.prefix_bytes
    assert stats.first_tokens >= 16 and stats.first_token_s > 0 and stats.tokens_per_s > 0


def wait_until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_stop_token_ends_a_stream(model, batcher):
    [prompt] = make_prompts(6)
    free = generate(model, [prompt], SamplingOptions(max_new_tokens=20, temperature=0))[0].tokens
    stream = batcher.submit(prompt, SamplingOptions(max_new_tokens=20, temperature=0, stop_ids=(free[7],)))
    assert list(stream) == free[: free.index(free[7]) + 1]
    assert stream.finish_reason == "stop"


def test_conversations_reuse_their_keys_and_values(model, batcher):
    greedy = SamplingOptions(max_new_tokens=12, temperature=0)
    first, question, other = make_prompts(20, 5, 11)
    answer = list(batcher.submit(first, greedy))
    for prompt, reused in [
        (first + answer + question, len(first) + len(answer) - 1),  # the last token was never fed to the model
        (first + answer[:4] + other, len(first) + 4),  # a turn that was edited
        (first, len(first) - 1),  # asked again
        (other + first, None),
    ]:
        stream = batcher.submit(prompt, greedy)
        assert list(stream) == generate(model, [prompt], greedy)[0].tokens
        if reused is not None:
            assert stream.reused_prompt_tokens == reused
    assert batcher.stats().reused_prompt_tokens > 0


def test_prefixes_stay_within_their_budget(model):
    batcher = Batcher(model, BatchingOptions(kv_budget_bytes=2**20, prefix_share=0.05))
    for prompt in make_prompts(*[30] * 12):
        list(batcher.submit(prompt, SamplingOptions(max_new_tokens=10)))
        assert batcher.stats().prefix_bytes <= 2**20 * 0.05
    assert batcher.stats().prefix_bytes > 0
    batcher.close()


def test_the_store_forgets_what_was_used_longest_ago(model):
    first, second, third = prompts = make_prompts(18, 18, 18)
    rows = [filled_cache(model, prompt).read(0) for prompt in prompts]
    store = PrefixStore(2 * rows[0].nbytes)
    store.keep(first, rows[0])
    store.keep(second, rows[1])
    assert store.find([*first, 1]).length == 18
    store.keep(third, rows[2])
    assert [store.find([*prompt, 1]) is not None for prompt in prompts] == [True, False, True]
    assert len(store) == 2 and store.nbytes == store.budget_bytes


def filled_cache(model, prompt):
    cache = KVCache(model.config)
    Decoder(model).extend(cache, prompt)
    return cache


def test_prompts_that_wait_are_computed_together(model, monkeypatch):
    prompts = make_prompts(8, 7, 8, 40, 3)
    greedy = SamplingOptions(max_new_tokens=4, temperature=0)
    expected = [answer.tokens for answer in generate(model, prompts, greedy)]
    shapes = []
    embed = model.model.embed_tokens.forward
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: shapes.append(tuple(ids.shape)) or embed(ids))
    batcher = Batcher(model, BatchingOptions(max_batch=6, prefill_chunk=25, kv_budget_bytes=2**24))
    gate = threading.Event()
    first = batcher.submit([1], SamplingOptions(max_new_tokens=9), lambda: gate.wait(WAIT_S))
    first.wait(0, WAIT_S)  # and now the thread stands at the gate
    streams = [batcher.submit(prompt, greedy) for prompt in prompts]
    gate.set()
    assert [list(stream) for stream in streams] == expected
    batcher.close()
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 8), (1, 25), (1, 15), (1, 3)]


def test_progress_is_told_from_the_thread(model, batcher):
    seen, ended = [], threading.Event()

    def on_progress():
        seen.append((threading.current_thread().name, len(stream.answer.tokens)))
        if stream.finish_reason:
            ended.set()

    gate = threading.Event()
    stream = batcher.submit([1, 2, 3], SamplingOptions(max_new_tokens=6), lambda: (gate.wait(WAIT_S), on_progress()))
    gate.set()
    assert ended.wait(WAIT_S)
    assert [count for _, count in seen] == [1, 2, 3, 4, 5, 6]
    assert {name for name, _ in seen} == {"megalith-batcher"}


def test_a_full_queue_and_bad_requests_raise_at_once(model):
    batcher = Batcher(model, BatchingOptions(max_batch=1, max_queue=2, kv_budget_bytes=2**20))
    long = SamplingOptions(max_new_tokens=400)
    running = batcher.submit([1, 2], long)
    running.wait(0 + 1, WAIT_S)
    batcher.submit([1, 2], long)
    batcher.submit([1, 2], long)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        batcher.submit([1, 2], long)
    assert batcher.stats().rejected == 1
    for prompt, message in [
        ([], "empty"),
        ([3, 97], "token id 97"),
        ([-1], "token id -1"),
        ([1] * 200, "do not fit the model's 512"),
    ]:
        with pytest.raises(ValueError, match=message):
            batcher.submit(prompt, long)
    batcher.close(timeout_s=0)
    assert running.finish_reason == "cancelled"
    with pytest.raises(ClosedError):
        list(running)
    with pytest.raises(ClosedError):
        batcher.submit([1], long)
    tight = Batcher(model, BatchingOptions(kv_budget_bytes=1000))
    with pytest.raises(ValueError, match="bytes for keys and values, and there are 750"):
        tight.submit([1], long)
    tight.close()


def test_closing_answers_what_is_there(model):
    batcher = Batcher(model, BatchingOptions(max_batch=2, kv_budget_bytes=2**20))
    streams = [batcher.submit([1, 2, index], SamplingOptions(max_new_tokens=10)) for index in range(6)]
    batcher.close()
    assert all(stream.finish_reason == "length" and len(stream.answer.tokens) == 10 for stream in streams)


def test_an_error_ends_what_ran_and_nothing_else(model, monkeypatch):
    batcher = Batcher(model, BatchingOptions(max_batch=4, kv_budget_bytes=2**20))
    stream = batcher.submit([1, 2], SamplingOptions(max_new_tokens=400))
    stream.wait(1, WAIT_S)
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: forward(hidden) * torch.nan)
    with pytest.raises(FloatingPointError):
        list(stream)
    assert stream.finish_reason == "error"
    monkeypatch.setattr(model.lm_head, "forward", forward)
    assert len(list(batcher.submit([1, 2], SamplingOptions(max_new_tokens=4)))) == 4
    assert batcher.stats().finished == {"error": 1, "length": 1}
    batcher.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_batch", 0), ("max_queue", True), ("kv_budget_bytes", 0), ("prefix_share", 1), ("prefill_chunk", 1.5)],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        BatchingOptions(**{field: value})
