"""What is wrong with a request is answered with a clean 4xx, and the server goes on as if nothing had been."""

import contextlib
import json
import socket
import time

import httpx2
import openai
import pytest
from serving import chat_model, serving_replies

HTTP = httpx2.Client(verify=False, trust_env=False)
KEY = "sk-Secret_123"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def address():
    with serving_replies(lambda prompt: "fine", max_body_bytes=200_000, max_tokens=100, body_timeout_s=1.0) as (at, _):
        yield at


@pytest.fixture(autouse=True)
def nothing_is_logged_and_the_server_still_answers(address, caplog):
    yield
    assert HTTP.post(address + CHAT, json={"messages": [USER]}).json()["choices"][0]["message"]["content"] == "fine"
    assert not caplog.records


def check_refused(response, status, words):
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


BAD_BODIES = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "empty": (b"", "Field required"),
    "a list": (b"[]", "valid dictionary"),
    "no UTF-8": (b'{"messages": "\xff\xfe"}', "parsing"),
    "too deep": (b'{"messages":' + b"[" * 90_000 + b"]" * 90_000 + b"}", ""),
    "a huge number": (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", "parsing"),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "content"),
    "not a number": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_no_request(address, name):
    body, words = BAD_BODIES[name]
    response = HTTP.post(address + CHAT, content=body, headers={"content-type": "application/json"})
    check_refused(response, 400, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"n": 0}, "n:"),
        ({"n": 100}, "one request gets 16"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens is 101 and this server's limit is 100"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"seed": 2**80}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "only for 'stream': true"),
        ({"tools": [{"type": "function"}]}, "'tools' is not supported"),
        ({"logprobs": True}, "'logprobs' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_fields_that_are_wrong_are_named(address, change, words):
    body = {key: value for key, value in {"messages": [USER], **change}.items() if value is not None}
    check_refused(HTTP.post(address + CHAT, json=body), 400, words)


def test_fields_that_ask_for_nothing_are_taken(address):
    nothing = {"tools": [], "logprobs": False, "response_format": {"type": "text"}, "user": "me", "stop": None}
    assert HTTP.post(address + CHAT, json={"messages": [USER], **nothing, "logit_bias": {}}).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, 320]}, "token id 320"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 17}, "one request gets 16"),
        ({"prompt": "a" * 5000}, "context has 4096 tokens; the prompt has 5000"),
        ({"prompt": "a" * 4090, "max_tokens": 10}, "context has 4096 tokens"),
        ({"prompt": "a", "echo": True}, "'echo' is not supported"),
        ({"prompt": "a", "best_of": 2}, "'best_of' is not supported"),
        ({"prompt": "a", "messages": [USER]}, "messages"),
    ],
)
def test_completions_that_cannot_be(address, body, words):
    check_refused(HTTP.post(f"{address}/v1/completions", json=body), 400, words)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"history": []},
        {"history": [{"instruction": 1}]},
        {"history": [{"instruction": "a", "response": "done"}]},
        {"history": [{"instruction": "a"}], "max_new_tokens": 101},
    ],
)
@pytest.mark.parametrize("route", ["/generate", "/generate/stream"])
def test_the_announcements_routes_refuse_too(address, route, body):
    check_refused(HTTP.post(address + route, json=body), 400, "")


def test_what_the_chat_template_refuses():
    template = "{{ raise_exception('roles must alternate') if messages|length > 1 }}{{ messages[0].content }}"
    with serving_replies(lambda prompt: "fine", model=chat_model(template)) as (at, _):
        check_refused(HTTP.post(at + CHAT, json={"messages": [USER, USER]}), 400, "roles must alternate")
        assert HTTP.post(at + CHAT, json={"messages": [USER]}).status_code == 200


def test_other_content_types_and_methods(address):
    form = HTTP.post(address + CHAT, content=json.dumps({"messages": [USER]}), headers={"content-type": "text/plain"})
    check_refused(form, 415, "application/json")
    check_refused(HTTP.get(address + CHAT), 405, "Method Not Allowed")
    check_refused(HTTP.get(f"{address}/v2"), 404, "Not Found")
    check_refused(HTTP.get(f"{address}/../../etc/passwd"), 404, "Not Found")
    for page in ("/docs", "/openapi.json"):
        check_refused(HTTP.get(address + page), 404, "Not Found")


def test_bodies_beyond_the_limit(address):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}]}).encode()
    json_type = {"content-type": "application/json"}
    check_refused(HTTP.post(address + CHAT, content=body, headers=json_type), 413, "the limit is 200000")
    in_chunks = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    check_refused(HTTP.post(address + CHAT, content=in_chunks, headers=json_type), 413, "the limit is 200000")


def raw(address, sent, half_close=False):
    """Send bytes as they are; return what comes back until the server closes, or for two seconds."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.sendall(sent)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(TimeoutError):
            while piece := connection.recv(65536):
                received += piece
    return received


def head(length, *more, host="localhost"):
    lines = [f"POST {CHAT} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def test_a_large_body_that_waits_for_leave_is_refused_unsent(address):
    assert raw(address, head(300_000, "Expect: 100-continue")).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_not_waited_for(address):
    began = time.monotonic()
    received = raw(address, head(500) + b'{"messages"')
    assert received.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 1.9


WHOLE = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}).encode()


@pytest.mark.parametrize(
    "sent",
    [
        head(500) + b'{"messages"',
        head(0),
        head(len(WHOLE)) + WHOLE,
        b"POST ",
        b"GET /health HTTP/1.1\r\nHost:",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_connections_that_close_halfway(address, sent, caplog):
    received = raw(address, sent, half_close=True)
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))  # 200: it was answered before the end was seen
    assert received.count(b"HTTP/1.1") == 1
    assert not caplog.records


def test_a_connection_that_closes_halfway_between_requests_is_just_closed(address):
    assert raw(address, b"", half_close=True) == b""


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"NONSENSE\r\n\r\n"])
def test_what_is_not_http(address, sent, caplog):
    assert raw(address, sent).startswith(b"HTTP/1.1 400")
    assert {record.message for record in caplog.records} == {"Invalid HTTP request received."}
    caplog.clear()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "[::2]"])
def test_names_that_are_not_this_machines(address, host):
    """A page of another site, its name pointed at 127.0.0.1, sends that name."""
    response = raw(address, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"])
def test_names_that_are(address, host):
    response = raw(address, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.1 200")


@pytest.fixture(scope="module")
def locked():
    with serving_replies(lambda prompt: "fine", api_key=KEY) as (at, _):
        yield at


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xff"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/generate", "/metrics", "/stats", "/nowhere"])
def test_without_the_key_nothing_is_answered(locked, path, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    check_refused(HTTP.get(locked + path, headers=headers), 401, "a valid key is needed")


def test_with_the_key_all_is(locked):
    client = openai.OpenAI(base_url=f"{locked}/v1", api_key=KEY, max_retries=0)
    assert client.chat.completions.create(model="tiny", messages=[USER]).choices[0].message.content == "fine"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-other").models.list()
    for path in ("/", "/health"):
        assert HTTP.get(locked + path).status_code == 200
    assert HTTP.get(f"{locked}/metrics", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_the_page_may_run_its_own_script_alone(locked):
    response = HTTP.get(f"{locked}/")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert "unsafe" not in response.headers["content-security-policy"]
    page = response.text
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page and "document.write" not in page
    outside = [word for word in page.split() if "//" in word and ("src=" in word or "href=" in word or "url(" in word)]
    assert all("data:image" in word for word in outside)
