"""Reading datasets: schemas found by their keys, and errors that name the file and the line."""

import gzip
import json
import sys

import pytest
from megalith.rlhf.data import read_conversations
from megalith.rlhf.errors import InputError

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}

ROWS = {
    "alpaca": {"instruction": "2+2?", "output": "4"},
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "prompt/completion": {"prompt": "2+2?", "completion": "4"},
    "question/answer": {"question": "2+2?", "answer": "4"},
}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_each_schema_is_found_by_its_keys_and_gives_the_same_conversation(tmp_path, name):
    schema, conversations = read_conversations(write_jsonl(tmp_path / "data.jsonl", {**ROWS[name], "id": 1}))
    assert schema.name == name
    assert conversations[0].messages == (QUESTION, ANSWER)


def test_sharegpt_with_content_keys_and_a_system_message(tmp_path):
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "user", "content": "2+2?"},
        {"from": "gpt", "value": "4"},
    ]
    _, conversations = read_conversations(write_jsonl(tmp_path / "data.jsonl", {"conversations": turns}))
    assert conversations[0].messages == ({"role": "system", "content": "be brief"}, QUESTION, ANSWER)


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    _, conversations = read_conversations(write_jsonl(tmp_path / "d", {"prompt": [QUESTION], "completion": [ANSWER]}))
    assert conversations[0].messages == (QUESTION, ANSWER)


def test_alpaca_input_system_and_history(tmp_path):
    row = {"system": "be brief", "history": [["1+1?", "2"]], "instruction": "add", "input": "2 2", "output": "4"}
    _, conversations = read_conversations(write_jsonl(tmp_path / "data.jsonl", row))
    assert conversations[0].messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "add", "input": "2 2"},
        ANSWER,
    )


def test_tools_and_other_message_fields_reach_the_chat_template(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    row = {"messages": [QUESTION, call, {"role": "tool", "content": "4"}, ANSWER], "tools": [{"name": "add"}]}
    _, conversations = read_conversations(write_jsonl(tmp_path / "data.jsonl", row))
    assert conversations[0].tools == ({"name": "add"},)
    assert conversations[0].messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}


def test_json_array_gzip_blank_lines_and_byte_order_mark_read_alike(tmp_path):
    rows = [ROWS["alpaca"], {**ROWS["alpaca"], "output": "四"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    array = json.dumps(rows, indent=2, ensure_ascii=False)
    (tmp_path / "lines").write_text(lines, encoding="utf-8")
    (tmp_path / "marked").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "array").write_text(array, encoding="utf-8")
    (tmp_path / "zipped").write_bytes(gzip.compress(array.encode()))
    read = [[c.messages for c in read_conversations(tmp_path / n)[1]] for n in ("lines", "marked", "array", "zipped")]
    assert len(read[0]) == 2
    assert read[0] == read[1] == read[2] == read[3]


def test_a_limit_reads_no_more_rows(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", *[ROWS["alpaca"]] * 5, "not a row")
    assert len(read_conversations(path, limit=3)[1]) == 3


def test_a_row_without_its_field_names_file_line_and_field(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS["alpaca"], ROWS["alpaca"], {"instruction": "2+2?"})
    with pytest.raises(InputError, match=r"data\.jsonl, line 3: field 'output' is missing"):
        read_conversations(path)


def test_the_line_of_a_row_in_an_array_is_that_of_the_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROWS["alpaca"], {"instruction": "2+2?", "output": 4}], indent=1))
    with pytest.raises(InputError, match="line 6: field 'output' has to be a string, it is int"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the dataset is empty"),
        ("\n \n", "the dataset is empty"),
        ("[]", "the dataset is empty"),
        ('{"instruction": "a", "output": "b"}\n{broken', "line 2: not JSON"),
        ('[{"instruction": "a", "output": "b"}\n {"instruction": "a", "output": "b"}]', "line 2: not JSON"),
        ('[{"instruction": "a", "output": "b"},\n\n{broken}]', "line 3: not JSON"),
        ('[{"instruction": "a", "output": "b"}', "not JSON"),
        ('[{"instruction": "a", "output": "b"}] x', "text follows the end"),
        ("[1]", "line 1: a row has to be an object, this one is int"),
        ('{"instruction": "a"}', "line 1: field 'output' is missing"),
        ('{"text": "a"}', "no schema has the fields text"),
        ('{"messages": []}', "line 1: field 'messages' has to be a list"),
        ('{"messages": ["a"]}', r"messages\[0\] has to be an object"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\] has no 'role'"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "role 'king'"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"instruction": "a", "output": "b", "history": ["c"]}', "field 'history'"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "a"}]}', "does not end with an assistant turn"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_conversations(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_input_errors(tmp_path):
    (tmp_path / "latin").write_bytes('{"instruction": "é"}'.encode("latin-1"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"instruction": "a", "output": "b"}' * 100)[:-20])
    for name, message in [
        ("absent", "no such dataset file"),
        (".", "is a folder"),
        ("latin", "not UTF-8"),
        ("cut.gz", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            read_conversations(tmp_path / name)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "whole \\ud83d\\ude00", "completion": "b"}\n{"prompt": "half \\ud83d", "completion": "b"}\n'
    )
    with pytest.raises(InputError, match="rows.jsonl, line 2: holds half of a surrogate pair"):
        read_conversations(path)


@pytest.mark.parametrize("tools", ["search", [1], 5])
def test_tools_are_objects(tmp_path, tools):
    path = write_jsonl(tmp_path / "rows.jsonl", {"messages": [QUESTION, ANSWER], "tools": tools})
    with pytest.raises(InputError, match="line 1: field 'tools' has to be a list of objects"):
        read_conversations(path)


def test_a_folder_asks_for_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="is a folder; .*pip install datasets"):
        read_conversations(tmp_path)


def test_folders_of_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="an extra that only these folders need")
    rows = [ROWS["messages"], {"messages": [QUESTION, {"role": "assistant", "content": "four"}]}]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "untrained")
    (tmp_path / "repository" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "nothing").mkdir()
    for name in ("saved", "splits", "repository"):
        schema, conversations = read_conversations(tmp_path / name)
        assert schema.name == "messages"
        assert [conversation.messages[1]["content"] for conversation in conversations] == ["4", "four"]
        assert len(read_conversations(tmp_path / name, limit=1)[1]) == 1
    for name, message in (("untrained", "has no split 'train', but test"), ("nothing", "is no folder of Hugging Face")):
        with pytest.raises(InputError, match=message):
            read_conversations(tmp_path / name)
