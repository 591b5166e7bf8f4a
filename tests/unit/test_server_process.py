"""`megalith serve` and `megalith chat` as processes, with a real model: load, signals, pipes and a terminal.

MEGALITH_LOAD_SECONDS=60 makes the load test last a minute, as it is run by hand.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time

import httpx2
import psutil
import pytest
from megalith.rlhf.errors import InputError
from megalith.rlhf.server import main as server_main

LOAD_S = float(os.environ.get("MEGALITH_LOAD_SECONDS", 5))
CLIENTS = 32
MEGALITH = [sys.executable, "-m", "megalith.rlhf.cli"]


@contextlib.contextmanager
def serve(*argv):
    """A server process; yields it and its address."""
    process = subprocess.Popen(
        [*MEGALITH, "serve", *argv, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert " at http" in line, line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


@pytest.fixture(scope="module")
def server():
    with serve("llama-tiny", "--max_batch", str(CLIENTS), "--kv_budget_gb", "0.03") as started:
        yield started


def body_of(number, max_tokens=100):
    messages = [{"role": "user", "content": f"Question {number} " + "你好" * (number % 5)}]
    options = {"temperature": 0.9, "seed": number, "max_tokens": max_tokens}
    return {"messages": messages, **options, "stream": True, "stream_options": {"include_usage": True}}


async def one_answer(address, number):
    """The text and the number of tokens of a streamed answer; fails where the stream is not whole.

    Read from the socket: a client library would take more of the two cores than the server.
    """
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(body_of(number)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    text, usage, reason, last = "", None, None, b""
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async for line in reader:
        if not line.startswith(b"data: "):
            continue  # headers, lengths of chunks, empty lines
        last = line.removeprefix(b"data: ").strip()
        if last != b"[DONE]":
            chunk = json.loads(last)
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
    writer.close()
    assert last == b"[DONE]" and reason in ("stop", "length"), "an answer was lost"
    return text, usage["completion_tokens"]


async def load(address, clients, seconds):
    """Answers by number, and tokens a second, of `clients` that ask one question after the other."""
    answers, counts, began = {}, [], time.monotonic()

    async def ask(first):
        number = first
        while time.monotonic() - began < seconds:
            text, count = await one_answer(address, number % 40)
            assert answers.setdefault(number % 40, text) == text, "an answer is garbled"
            counts.append(count)
            number += clients

    await asyncio.gather(*(ask(index) for index in range(clients)))
    return answers, sum(counts) / (time.monotonic() - began)


def test_many_streaming_clients_lose_nothing_and_share_the_work(server):
    process, address = server
    alone, alone_speed = asyncio.run(load(address, 1, min(LOAD_S / 3, 10)))
    asyncio.run(load(address, CLIENTS, LOAD_S / 3))
    before = psutil.Process(process.pid).memory_info().rss
    answers, speed = asyncio.run(load(address, CLIENTS, LOAD_S))
    grown = psutil.Process(process.pid).memory_info().rss - before
    print(f"{alone_speed:.0f} tokens/s alone, {speed:.0f} with {CLIENTS} clients; grown by {grown / 1e6:.1f} MB")
    assert all(answers[number] == text for number, text in alone.items() if number in answers)
    assert speed > 4 * alone_speed
    assert grown < 32e6
    assert httpx2.get(f"{address}/stats").json()["running"] == 0


def test_a_signal_lets_the_running_answer_end_and_leaves_nothing_behind():
    with concurrent.futures.ThreadPoolExecutor() as pool:  # most of it is waiting for imports
        list(pool.map(_stop_while_answering, (signal.SIGTERM, signal.SIGINT)))


def _stop_while_answering(stop):
    with serve("llama-tiny", "--grace_s", "20") as (process, address):
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body_of(1, max_tokens=300)) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(stop)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=10) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")


def test_what_cannot_be_served_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, words in [
            (["llama-tiny", "--port", port], "cannot listen"),
            (["llama-tny"], "did you mean 'llama-tiny'"),
            (["llama-tiny", "--gptq_checkpoint", "x.pt"], "needs --quant"),
            (["llama-tiny", "--api_key", "two words"], "--api_key"),
            (["--port", "1"], "required: --pretrain"),
        ]:
            with pytest.raises(InputError, match=re.escape(words)):
                server_main(argv)


def test_a_pipe_gets_answers_alone():
    argv = [*MEGALITH, "chat", "llama-tiny"]
    lines = "/set max_tokens=5 seed=1 temperature=0\nhello\n/nonsense\n/clear\nhello\n"
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, timeout=60)
    first, second = done.stdout.removesuffix("\n").split("\n")[:2]
    assert done.returncode == 0
    assert first == second
    assert done.stderr.strip() == "error: no command /nonsense (/help lists them)"


class Screen:
    """A process at a pseudo-terminal."""

    def __init__(self, argv):
        self.child, self._end = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm", NO_COLOR="1", PYTHONUNBUFFERED="1")
            os.execvp(argv[0], argv)
        self.text = ""

    def types(self, text):
        os.write(self._end, text.encode())

    def shows(self, words, timeout_s=60):
        """Wait until `words` have appeared since this was last asked."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            left = deadline - time.monotonic()
            assert left > 0, f"'{words}' did not appear in: {self.text}"
            if select.select([self._end], [], [], left)[0]:
                self.text += os.read(self._end, 65536).decode(errors="replace")
        self.text = self.text.split(words, 1)[1]

    def ends(self):
        with contextlib.suppress(OSError):  # a terminal whose process has gone raises instead of ending
            while os.read(self._end, 65536):
                pass
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_at_a_terminal():
    screen = Screen([*MEGALITH, "chat", "llama-tiny"])
    screen.shows("/help lists the commands")
    screen.shows("> ")
    screen.types("/set max_tokens=8\n")
    screen.shows("max_new_tokens=8")
    screen.types("one \\\n")
    screen.shows(". ")
    screen.types("two 你好\n")
    screen.shows("8 tokens, ")
    screen.types("/set max_tokens=900\n")
    screen.shows("max_new_tokens=900")
    screen.types("/clear\nlong\n")
    screen.shows("forgotten")
    time.sleep(0.3)
    screen.types("\x03")
    screen.shows("tokens/s")
    screen.shows("> ")
    screen.types("\x04")
    assert screen.ends() == 0
