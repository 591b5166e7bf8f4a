"""Rows of a file as conversations: reading, finding the schema by its keys, and naming the line of a wrong row.

A conversation is a tuple of messages, each a dict with `role` and `content` (and whatever else its chat template
reads). Alpaca's own second field travels as `input` of the user's message, because the prompt formats place it
differently.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Row:
    """One parsed object and where it stands, for error messages."""

    values: dict
    source: str  # "file, line 12"


@dataclass(frozen=True)
class Conversation:
    messages: tuple[dict, ...]
    source: str
    tools: tuple[dict, ...] | None = None


@dataclass(frozen=True)
class Schema:
    """`required` keys identify it; `convert` turns a row that has them into a Conversation."""

    name: str
    required: tuple[str, ...]
    convert: Callable[[Row], Conversation]


def write_rows(path, rows):
    """Write dicts as jsonl; returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path, limit=None):
    """Rows of a jsonl file or a JSON array of objects, gzipped or not, or of a folder of Hugging Face datasets, at most
    `limit` of them.

    Raises InputError naming the file, and the line where there is one, when it is missing, unreadable, malformed or
    empty.
    """
    if Path(path).is_dir():
        return _folder_rows(path, limit)
    text = _read_text(path)
    objects = _array_items(path, text) if text.lstrip().startswith("[") else _jsonl_items(path, text)
    may_be_cut = "\\ud" in text or "\\uD" in text  # JSON can say what UTF-8 cannot
    rows = []
    for line, values in objects:
        source = f"{path}, line {line}"
        if not isinstance(values, dict):
            raise InputError(f"{source}: a row has to be an object, this one is {type(values).__name__}")
        if may_be_cut and re.search("[\ud800-\udfff]", json.dumps(values, ensure_ascii=False)):
            raise InputError(f"{source}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        rows.append(Row(values, source))
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{path}: the dataset is empty")
    return rows


def _folder_rows(path, limit):
    """Rows of a folder that `Dataset.save_to_disk` has written, or of a dataset's repository; of several splits, those
    of `train`."""
    try:
        import datasets  # large, and all other formats do without
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: is a folder; name a jsonl or JSON file in it, or pip install datasets, which reads folders of "
            "Hugging Face datasets"
        ) from None
    is_saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    read = datasets.load_from_disk if is_saved else datasets.load_dataset
    try:
        found = read(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: is no folder of Hugging Face datasets: {' '.join(str(error).split())}") from None
    if isinstance(found, dict):
        if "train" not in found:
            raise InputError(f"{path}: has no split 'train', but {', '.join(found)}")
        found = found["train"]
    chosen = found if limit is None else found.select(range(min(limit, len(found))))
    rows = [Row(values, f"{path}, row {index}") for index, values in enumerate(chosen, 1)]
    if not rows:
        raise InputError(f"{path}: the dataset is empty")
    return rows


def _read_text(path):
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such dataset file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a jsonl or JSON file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _jsonl_items(path, text):
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from None


def _array_items(path, text):
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = text.index("[") + 1
    separator = ""
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise InputError(f"{path}: text follows the end of the JSON array")
            return
        if separator and text[position : position + 1] == separator:
            position = _skip_space(text, position + 1)
        elif separator:
            line += text.count("\n", counted, position)
            raise InputError(f"{path}, line {line}: not JSON: ',' or ']' is missing after a row")
        line += text.count("\n", counted, position)
        counted = position
        try:
            values, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        yield line, values
        separator = ","


def _skip_space(text, position):
    while text[position : position + 1].isspace():
        position += 1
    return position


def text_of(row, key):
    """The string under `key` of a Row. Raises InputError that names the row where there is none."""
    if key not in row.values:
        raise InputError(f"{row.source}: field '{key}' is missing (the row has {', '.join(row.values) or 'no fields'})")
    value = row.values[key]
    if not isinstance(value, str):
        raise InputError(f"{row.source}: field '{key}' has to be a string, it is {type(value).__name__}")
    return value


def _from_alpaca(row):
    messages = []
    if row.values.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system")})
    for turn in row.values.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise InputError(f"{row.source}: field 'history' has to be a list of [question, answer] pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = {"role": "user", "content": text_of(row, "instruction")}
    if row.values.get("input"):
        question["input"] = text_of(row, "input")
    messages += [question, {"role": "assistant", "content": text_of(row, "output")}]
    return Conversation(tuple(messages), row.source)


def messages_of(row, key, turns):
    """Messages in either spelling, role/content or from/value (and any mixture of the two)."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{row.source}: field '{key}' has to be a list of messages that is not empty")
    messages = []
    for index, turn in enumerate(turns):
        where = f"{row.source}: {key}[{index}]"
        if not isinstance(turn, dict):
            raise InputError(f"{where} has to be an object, it is {type(turn).__name__}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role is None:
            raise InputError(f"{where} has no 'role' (or 'from')")
        if role not in ROLES:
            raise InputError(f"{where} has role {role!r}; known roles are {', '.join(ROLES)}")
        if content is None and not turn.get("tool_calls"):
            raise InputError(f"{where} has no 'content' (or 'value')")
        if not isinstance(content, str | None):
            raise InputError(f"{where}: the content has to be a string, it is {type(content).__name__}")
        others = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        messages.append({"role": ROLES[role], "content": content or "", **others})
    return messages


def _from_messages(key):
    def convert(row):
        messages = messages_of(row, key, row.values[key])
        if not any(message["role"] == "assistant" for message in messages):
            raise InputError(f"{row.source}: field '{key}' has no assistant turn, so there is nothing to train on")
        tools = row.values.get("tools") or []
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f"{row.source}: field 'tools' has to be a list of objects")
        return Conversation(tuple(messages), row.source, tuple(tools) or None)

    return convert


def _from_pair(prompt, completion):
    def side(row, key, role):
        if isinstance(row.values.get(key), list):
            return messages_of(row, key, row.values[key])
        return [{"role": role, "content": text_of(row, key)}]

    def convert(row):
        messages = side(row, prompt, "user") + side(row, completion, "assistant")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{row.source}: field '{completion}' does not end with an assistant turn")
        return Conversation(tuple(messages), row.source)

    return convert


SFT_SCHEMAS = (
    Schema("messages", ("messages",), _from_messages("messages")),
    Schema("sharegpt", ("conversations",), _from_messages("conversations")),
    Schema("alpaca", ("instruction", "output"), _from_alpaca),
    Schema("prompt/completion", ("prompt", "completion"), _from_pair("prompt", "completion")),
    Schema("question/answer", ("question", "answer"), _from_pair("question", "answer")),
)


def detect_schema(rows, schemas=SFT_SCHEMAS):
    """The schema whose required keys the first row has.

    When it has only a part of them, the error names the field that is missing of the schema it comes nearest to.
    """
    first = rows[0]
    keys = set(first.values)
    for schema in schemas:
        if keys.issuperset(schema.required):
            return schema
    closest = max(schemas, key=lambda schema: len(keys.intersection(schema.required)))
    if keys.intersection(closest.required):
        missing = ", ".join(f"'{key}'" for key in closest.required if key not in keys)
        raise InputError(
            f"{first.source}: field {missing} is missing (schema {closest.name}; the row has {', '.join(keys)})"
        )
    known = "; ".join(f"{schema.name}: {', '.join(schema.required)}" for schema in schemas)
    raise InputError(f"{first.source}: no schema has the fields {', '.join(first.values) or '(none)'}. Known: {known}")


def read_conversations(path, limit=None):
    """Return (schema, conversations) of the file; every row is checked against the schema of the first."""
    rows = read_rows(path, limit)
    schema = detect_schema(rows)
    for row in rows:
        for key in schema.required:
            if key not in row.values:
                raise InputError(f"{row.source}: field '{key}' is missing (schema {schema.name})")
    return schema, [schema.convert(row) for row in rows]


def holds_texts(path):
    """Whether the first row of the file is plain text (`text`) and no conversation."""
    keys = read_rows(path, 1)[0].values.keys()
    return "text" in keys and all(keys.isdisjoint(schema.required) for schema in SFT_SCHEMAS)


def read_texts(path, limit=None):
    """The `text` of every row of the file."""
    return [text_of(row, "text") for row in read_rows(path, limit)]
