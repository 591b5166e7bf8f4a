"""The server as the official client sees it: a real uvicorn on loopback, an engine that answers with given texts."""

import json
import time

import httpx2
import openai
import pytest
from serving import chat_model, serving_replies

HTTP = httpx2.Client(verify=False, trust_env=False)
QUESTION = [{"role": "user", "content": "hello"}]
REPLY = "Hello 你好 👋🏽, a\tline\nand another."


def client_of(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server():
    """Answers REPLY, "slow" to a slow prompt, "echo:" and the prompt to an echo prompt; fails on a broken one."""

    def reply(prompt):
        if "broken" in prompt:
            return RuntimeError("the engine broke")
        return f"echo:{prompt}" if "echo" in prompt else "endless " * 400 if "slow" in prompt else REPLY

    with serving_replies(reply) as (address, batcher):
        yield address, batcher


def chat(server, **options):
    return client_of(server[0]).chat.completions.create(model="tiny", messages=QUESTION, **options)


def test_a_chat_answer(server):
    answer = chat(server)
    assert answer.choices[0].message.content == REPLY
    assert (answer.choices[0].finish_reason, answer.choices[0].message.role) == ("stop", "assistant")
    prompt_tokens = len("<|user|>hello\n<|assistant|>")
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == len(REPLY.encode()) + 1, "the end of sequence is a token too"
    assert answer.usage.total_tokens == prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_is_the_same_text_in_whole_characters(server):
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == REPLY
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20, "the answer came at once"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_not_streamed_unasked(server):
    assert all(chunk.usage is None and chunk.choices for chunk in chat(server, stream=True))


def test_several_choices(server):
    answer = chat(server, n=3, seed=5)
    assert [choice.message.content for choice in answer.choices] == [REPLY] * 3
    assert [stream.answer.options.seed for stream in server[1].streams[-3:]] == [5, 6, 7]
    texts = {}
    for chunk in chat(server, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: REPLY, 1: REPLY}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "expected"), [("好 👋", "Hello 你"), ([" and", "\nand"], "Hello 你好 👋🏽, a\tline")])
def test_stop_strings_end_an_answer_and_its_generation(server, stop, expected, stream):
    answer = chat(server, stop=stop, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")
    assert server[1].streams[-1].is_cancelled


def test_a_choice_that_stops_makes_room_while_others_go_on(server):
    prompts = ["echo and STOP", "slow"]
    stream = client_of(server[0]).completions.create(model="tiny", prompt=prompts, stop="STOP", stream=True)
    assert any(chunk.choices[0].finish_reason == "stop" for chunk in stream if chunk.choices[0].index == 0)
    assert [answer.is_cancelled for answer in server[1].streams[-2:]] == [True, False]
    stream.close()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_is_limited(server, name):
    answer = chat(server, **{name: 5})
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"


def test_sampling_options_reach_the_engine(server):
    chat(
        server,
        temperature=0.3,
        top_p=0.9,
        seed=11,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        max_tokens=7,
        extra_body={"top_k": 40, "repetition_penalty": 1.1},
    )
    options = server[1].streams[-1].answer.options
    assert (options.temperature, options.top_p, options.top_k, options.seed) == (0.3, 0.9, 40, 11)
    assert (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) == (1.1, 0.5, -0.25)
    assert options.max_new_tokens == 7


def test_the_chat_template_sees_every_turn(server):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "echo "}, {"type": "text", "text": "this"}]},
        chat(server).choices[0].message.model_dump(),  # as clients send answers back
        {"role": "user", "content": "again"},
    ]
    answer = client_of(server[0]).chat.completions.create(model="tiny", messages=messages)
    prompt = f"<|system|>Be brief.\n<|user|>echo this\n<|assistant|>{REPLY}\n<|user|>again\n<|assistant|>"
    assert answer.choices[0].message.content == f"echo:{prompt}"


def test_without_a_chat_template_the_alpaca_prompt_asks():
    with serving_replies(lambda prompt: prompt, model=chat_model(template=None)) as server:
        text = chat(server).choices[0].message.content
    assert text.startswith("Below is an instruction")
    assert text.endswith("### Instruction:\nhello\n\n### Response:\n")


def test_completions_of_text_and_of_tokens(server):
    completions = client_of(server[0]).completions
    assert completions.create(model="tiny", prompt="echo me").choices[0].text == "echo:echo me"
    both = completions.create(model="tiny", prompt=["echo 1", "echo 2"], n=2)
    assert [(choice.index, choice.text) for choice in both.choices] == [
        (0, "echo:echo 1"),
        (1, "echo:echo 1"),
        (2, "echo:echo 2"),
        (3, "echo:echo 2"),
    ]
    assert both.usage.prompt_tokens == 12
    ids = chat_model().tokenizer("echo 3").input_ids
    assert completions.create(model="tiny", prompt=ids).choices[0].text == "echo:echo 3"
    assert completions.create(model="tiny", prompt=[ids, ids]).choices[1].text == "echo:echo 3"
    streamed = list(completions.create(model="tiny", prompt="echo me", stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "echo:echo me"
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_models(server):
    client = client_of(server[0])
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'big'"):
        client.models.retrieve("big")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="big", messages=QUESTION)


def test_the_announcements_routes(server):
    history = [{"instruction": "echo one", "response": "1"}, {"instruction": "two", "response": ""}]
    body = {"history": history, "max_new_tokens": 200, "top_k": 50, "top_p": 0.5, "temperature": 0.7}
    expected = "echo:<|user|>echo one\n<|assistant|>1\n<|user|>two\n<|assistant|>"
    answer = HTTP.post(f"{server[0]}/generate", json=body)
    assert (answer.status_code, answer.json()) == (200, expected)
    with HTTP.stream("POST", f"{server[0]}/generate/stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event.split("\n") for event in response.read().decode().removesuffix("\n\n").split("\n\n")]
    assert [event[0] for event in events] == ["event: generate"] * (len(events) - 1) + ["event: end"]
    text = "".join("\n".join(line.removeprefix("data: ") for line in event[1:]) for event in events)
    assert text == expected
    assert len(events) > 20


def test_an_engine_that_fails_says_so(server):
    client, broken = client_of(server[0]), [{"role": "user", "content": "broken"}]
    with pytest.raises(openai.InternalServerError, match="the engine broke"):
        client.chat.completions.create(model="tiny", messages=broken)
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(client.chat.completions.create(model="tiny", messages=broken, stream=True))
    assert chat(server).choices[0].message.content == REPLY


def test_a_full_queue_is_429():
    with serving_replies(lambda prompt: "word " * 200, pause_s=0.005, max_queue=2) as server:
        first, second = chat(server, stream=True), chat(server, stream=True)
        with pytest.raises(openai.RateLimitError, match="which is the limit") as caught:
            chat(server)
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            chat(server, n=3)
        first.close(), second.close()
        wait_until(lambda: not server[1].running())
        assert chat(server, max_tokens=4).choices[0].message.content == "word"


def wait_until(holds):
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/generate"])
def test_a_client_that_goes_away_cancels_its_request(stream, route):
    body = {"messages": QUESTION, "n": 2, "stream": stream}
    if route == "/generate":
        route, body = route + "/stream" * stream, {"history": [{"instruction": "hello"}]}
    with serving_replies(lambda prompt: "endless " * 400, pause_s=0.005) as (address, batcher):
        with pytest.raises(httpx2.TimeoutException):
            if stream:
                with HTTP.stream("POST", address + route, json=body, timeout=5) as response:
                    next(response.iter_bytes())
                    raise httpx2.ReadTimeout("enough")
            HTTP.post(address + route, json=body, timeout=0.5)
        wait_until(lambda: batcher.streams and all(stream.is_cancelled for stream in batcher.streams))
        wait_until(lambda: not batcher.running())
        metrics = HTTP.get(f"{address}/metrics").text
        assert "megalith_cancelled_requests_total 1.0" in metrics


def test_metrics_health_and_stats(server):
    chat(server)
    HTTP.get(f"{server[0]}/nowhere")
    metrics = HTTP.get(f"{server[0]}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'megalith_requests_total{route="other",status="404"}' in metrics.text
    assert "megalith_first_token_seconds_count" in metrics.text
    assert HTTP.get(f"{server[0]}/health").json() == {"status": "ok"}
    stats = HTTP.get(f"{server[0]}/stats").json()
    assert stats["model"] == "tiny"
    assert stats["memory_bytes"] > 1e7


def test_a_running_answer_ends_before_the_server_does():
    with serving_replies(lambda prompt: "word " * 40, pause_s=0.005, grace_s=10) as server:
        stream = chat(server, stream=True)
        next(iter(stream))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "word " * 40


def test_json_is_not_escaped_into_ascii(server):
    with HTTP.stream("POST", f"{server[0]}/v1/chat/completions", json={"messages": QUESTION, "stream": True}) as r:
        lines = [line for line in r.iter_lines() if "你" in line]
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == "你"
