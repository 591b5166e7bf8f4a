"""`megalith chat MODEL`: a conversation in the terminal, streamed. Lines from a pipe are answered one by one.

Commands begin with a slash; everything else is said to the model. Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time

import jinja2

from .arguments import parse
from .chat_model import BatchingArguments, ChatModelArguments, positional_model, start
from .chat_text import TextStream
from .errors import InputError, nearest
from .sampling import SamplingOptions
from .templates import encode_prompt

GROUPS = (ChatModelArguments, BatchingArguments)
HELP = """\
/system [TEXT]   set the system prompt, or show it      /clear       forget the conversation
/set [K=V …]     set sampling options, or show them     /save FILE   append the conversation as a row of JSON
/help            this                                   /exit        end (so does Ctrl-D)
A line that ends with a backslash goes on in the next. Ctrl-C stops an answer."""


class Chat:
    """One conversation: its messages, system prompt and sampling options."""

    def __init__(self, model, batcher, options, write):
        self._model, self._batcher, self._write = model, batcher, write
        self.options, self.system, self.messages = options, "", []

    def say(self, text):
        """Ask and write the answer as it comes; returns its number of tokens and the seconds they took.

        Raises InputError where it cannot be asked and RuntimeError where the model fails; the conversation is then as
        before. KeyboardInterrupt ends the answer, and what there is of it stays in the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self._submit(messages)
        text, pieces, count, began = TextStream(self._model.tokenizer), [], 0, time.monotonic()
        try:
            for token in stream:
                count += 1
                if token not in self._model.stop_ids:
                    pieces.append(text.push(token))
                    self._write(pieces[-1])
        except KeyboardInterrupt:
            stream.cancel()
        except Exception as error:
            self._write("\n")
            raise RuntimeError(f"the answer failed: {error}") from error
        pieces.append(text.finish())
        self._write(pieces[-1] + "\n")
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        return count, time.monotonic() - began

    def _submit(self, messages):
        """The stream of an answer's tokens."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompt = encode_prompt(system + messages, self._model.render, self._model.tokenizer)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error}") from None
        room = self._model.context_length - len(prompt)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt)} tokens, the model's context {self._model.context_length}: /clear"
            )
        length = min(self.options.max_new_tokens, room)
        options = dataclasses.replace(self.options, max_new_tokens=length, stop_ids=self._model.stop_ids)
        try:
            return self._batcher.submit(prompt, options)
        except ValueError as error:
            raise InputError(str(error)) from None


def _set(chat, words):
    """`/set k=v …`: change sampling options, all or none."""
    fields = [field.name for field in dataclasses.fields(chat.options) if field.name != "stop_ids"]
    changes = {}
    for word in words.split():
        name, _, value = word.partition("=")
        name = "max_new_tokens" if name == "max_tokens" else name
        if name not in fields:
            raise InputError(f"/set: no option '{name}'{nearest(name, fields)}")
        changes[name] = _number(name, value, getattr(SamplingOptions(), name))
    try:
        chat.options = dataclasses.replace(chat.options, **changes)
    except ValueError as error:
        raise InputError(f"/set: {error}") from None
    return " ".join(f"{name}={getattr(chat.options, name)}" for name in fields)


def _number(name, text, example):
    if text.lower() == "none":
        return None
    try:
        return float(text) if isinstance(example, float) else int(text)
    except ValueError:
        kind = "a number" if isinstance(example, float) else "a whole number"
        raise InputError(f"/set: {name} takes {kind}, not '{text}'") from None


def _save(chat, path):
    """`/save FILE`: one JSON line, as `megalith sft --dataset FILE` reads it."""
    if not path:
        raise InputError("/save wants a file: /save chats.jsonl")
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    row = json.dumps({"messages": system + chat.messages}, ensure_ascii=False)
    try:
        with open(os.path.expanduser(path), "a", encoding="utf-8") as file:
            file.write(row + "\n")
    except OSError as error:
        raise InputError(f"/save {path}: {error.strerror}") from None
    return f"{len(chat.messages)} messages appended to {path}"


def _system(chat, text):
    chat.system = text or chat.system
    return chat.system or "no system prompt"


def _clear(chat, _):
    chat.messages = []
    return "forgotten"


COMMANDS = {"/system": _system, "/set": _set, "/save": _save, "/clear": _clear, "/help": lambda chat, _: HELP}


def converse(chat, lines, note):
    """Answer each of `lines` until they end or one says /exit. `note(text)` tells the user what is no answer."""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command in ("/exit", "/quit"):
                return
            if command in COMMANDS:
                note(COMMANDS[command](chat, rest.strip()))
            elif command.startswith("/") and "/" not in command[1:]:
                raise InputError(f"no command {command}{nearest(command, COMMANDS)} (/help lists them)")
            elif line.strip():
                count, seconds = chat.say(line)
                note(f"{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s")
        except (InputError, RuntimeError) as error:  # the conversation is worth more than the program's end
            note(f"error: {error}")


def _typed_lines():
    """Lines from the keyboard, with editing and history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 — importing it is what gives input() its editing

    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(". ")
            yield line
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _piped_lines():
    for line in sys.stdin:
        yield line.rstrip("\n")


def main(argv=None):
    model_args, batching_args = parse(GROUPS, positional_model(argv), prog="megalith chat")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")
    model, batcher = start(model_args, batching_args)
    typed = sys.stdin.isatty()

    def write(text):
        print(text, end="", flush=True)

    def note(text):
        dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        if typed or text.startswith("error"):
            print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)

    try:
        if typed:
            note(f"{model.name} ({model.precision} on {model.device}); /help lists the commands")
        converse(
            Chat(model, batcher, SamplingOptions(max_new_tokens=512), write),
            _typed_lines() if typed else _piped_lines(),
            note,
        )
    finally:
        batcher.close(timeout_s=0)


if __name__ == "__main__":
    main()
