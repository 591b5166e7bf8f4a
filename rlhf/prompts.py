"""Prompts for reinforcement learning: reading them from files, and the endless order in which they are visited."""

import csv
import io
from dataclasses import dataclass, field

import jinja2

from .batches import epoch_order
from .data import Row, _read_text, messages_of, read_rows, text_of
from .errors import InputError
from .templates import encode_prompt, prompt_renderer


@dataclass(frozen=True)
class Prompt:
    """`ids`: what the policy continues. `text`: what the row said, and `columns` its other fields, for reward
    functions. Both may be None and empty where prompts are given as tokens."""

    ids: tuple[int, ...]
    text: str | None = None
    columns: dict = field(default_factory=dict)


# The field that identifies each schema, first match first.
_FIELDS = ("prompt", "instruction", "messages", "question")


def read_prompts(path, tokenizer, prompt_format="auto", max_prompt_len=512, limit=None):
    """Return (prompts, how many were dropped for being longer than `max_prompt_len` tokens).

    `path`: jsonl or a JSON array (rows with `prompt`, a string or messages; `instruction` and perhaps `input`;
    `messages`; or `question`), or csv with a column `prompt`. Strings are one user turn, rendered as in fine-tuning.
    Raises InputError that names the row, and where no prompt is left.
    """
    rows = _csv_rows(path, limit) if str(path).endswith(".csv") else read_rows(path, limit)
    key = next((key for key in _FIELDS if key in rows[0].values), None)
    if key is None:
        raise InputError(
            f"{rows[0].source}: no field holds a prompt: {', '.join(rows[0].values)} (one of {', '.join(_FIELDS)})"
        )
    render = prompt_renderer(tokenizer, prompt_format)
    prompts, dropped = [], 0
    for row in rows:
        messages = _prompt_messages(row, key)
        try:
            ids = tuple(encode_prompt(messages, render, tokenizer, row.values.get("tools")))
        except (InputError, jinja2.TemplateError) as error:
            raise InputError(f"{row.source}: the prompt cannot be rendered: {error}") from None
        if not ids:
            raise InputError(f"{row.source}: the prompt is empty")
        if len(ids) > max_prompt_len:
            dropped += 1
            continue
        columns = {name: value for name, value in row.values.items() if name not in (key, "input", "tools")}
        prompts.append(Prompt(ids, messages[-1]["content"] + messages[-1].get("input", ""), columns))
    if not prompts:
        raise InputError(f"{path}: all {dropped} prompts are longer than {max_prompt_len} tokens (--max_prompt_len)")
    return prompts, dropped


def _prompt_messages(row, key):
    if key not in row.values or isinstance(row.values[key], str):
        message = {"role": "user", "content": text_of(row, key)}
        if key == "instruction" and row.values.get("input"):
            message["input"] = text_of(row, "input")
        return [message]
    messages = messages_of(row, key, row.values[key])
    while messages and messages[-1]["role"] == "assistant":  # what was answered once is not the question
        messages.pop()
    if not messages:
        raise InputError(f"{row.source}: field '{key}' has no turn to answer")
    return messages


def _csv_rows(path, limit):
    text = _read_text(path)
    csv.field_size_limit(max(len(text), 1))
    # strict: a quote that is never closed would take all rows after it into its field
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for values in reader:
            if None in values or None in values.values():
                raise InputError(f"{path}, line {reader.line_num}: has not as many fields as the header")
            rows.append(Row(values, f"{path}, line {reader.line_num}"))
            if len(rows) == limit:
                break
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: is no csv: {error}") from None
    if not rows:
        raise InputError(f"{path}: the dataset is empty")
    return rows


def next_prompts(count, size, seed, cursor):
    """(indices [size], next cursor): the next of `count` prompts from `cursor` = (epoch, place in its order) on.

    An epoch visits every prompt once, in an order of its own; a batch goes on in the next epoch where one ends. A pure
    function, so that every rank knows it and a resumed run goes on where it stood.
    """
    epoch, row = cursor
    chosen = []
    while len(chosen) < size:
        order = epoch_order(count, seed, epoch)[row : row + size - len(chosen)]
        chosen += order.tolist()
        row += len(order)
        if row == count:
            epoch, row = epoch + 1, 0
    return chosen, (epoch, row)
