"""The terminal's chat: commands, memory of the conversation, and what a mistake leaves behind."""

import pytest
from fake_batcher import FakeBatcher
from megalith.rlhf.chat import Chat, converse
from megalith.rlhf.data import read_conversations
from megalith.rlhf.sampling import SamplingOptions
from serving import chat_model


class Terminal:
    """What is typed, and what is then seen."""

    def __init__(self, reply=lambda prompt: prompt, **model):
        self.model = chat_model(**model)
        self.batcher = FakeBatcher(self.model.tokenizer, reply)
        self.answers, self.notes = [""], []
        self.chat = Chat(self.model, self.batcher, SamplingOptions(max_new_tokens=1000), self._write)

    def _write(self, text):
        self.answers[-1] += text
        if text.endswith("\n"):
            self.answers.append("")

    def types(self, *lines):
        self.answers, self.notes = [""], []
        converse(self.chat, lines, self.notes.append)
        return "".join(self.answers)


@pytest.fixture
def terminal():
    opened = Terminal()
    yield opened
    opened.batcher.close()


def test_a_conversation_goes_on_and_is_cleared(terminal):
    assert terminal.types("one") == "<|user|>one\n<|assistant|>\n"
    second = terminal.types("two")
    assert second == "<|user|>one\n<|assistant|><|user|>one\n<|assistant|>\n<|user|>two\n<|assistant|>\n"
    assert terminal.types("/clear", "two") == "<|user|>two\n<|assistant|>\n"


def test_the_system_prompt(terminal):
    assert terminal.types("/system Be brief.", "hi") == "<|system|>Be brief.\n<|user|>hi\n<|assistant|>\n"
    terminal.types("/system", "/clear")
    assert terminal.notes[0] == "Be brief."
    assert terminal.types("hi").startswith("<|system|>Be brief."), "/clear keeps it"


def test_options_are_set_all_or_none(terminal):
    terminal.types("/set temperature=0.5 max_tokens=7 seed=3", "hello you")
    options = terminal.batcher.streams[-1].answer.options
    assert (options.temperature, options.max_new_tokens, options.seed) == (0.5, 7, 3)
    assert options.stop_ids == terminal.model.stop_ids
    assert "temperature=0.5" in terminal.notes[0]
    for wrong, words in [
        ("temperature=hot", "takes a number, not 'hot'"),
        ("max_tokens=1.5", "takes a whole number"),
        ("top_p=0.9 temperature=-1", "temperature"),
        ("temprature=1", "did you mean 'temperature'"),
        ("stop_ids=1", "no option"),
    ]:
        terminal.types(f"/set {wrong}")
        assert terminal.notes[0].startswith("error: /set") and words in terminal.notes[0]
    terminal.types("/set seed=none")
    assert (terminal.chat.options.seed, terminal.chat.options.top_p) == (None, 1.0)


def test_a_saved_conversation_is_a_row_of_training_data(terminal, tmp_path):
    path = tmp_path / "chats.jsonl"
    terminal.types("/system 简短。", "你好", f"/save {path}", "/clear", "again", f"/save {path}")
    _, rows = read_conversations(path)
    assert [message["role"] for message in rows[0].messages] == ["system", "user", "assistant"]
    assert rows[0].messages[1]["content"] == "你好"
    assert len(rows) == 2
    terminal.types(f"/save {tmp_path}/no/where", "/save")
    assert all(note.startswith("error: /save") for note in terminal.notes)


def test_unknown_commands_paths_and_empty_lines(terminal):
    assert terminal.types("/cleer", "", "   ", "/help") == ""
    assert "did you mean '/clear'" in terminal.notes[0]
    assert "/system" in terminal.notes[1]
    assert "/etc/passwd" in terminal.types("/etc/passwd is what?")


def test_exit_ends_it(terminal):
    assert terminal.types("/exit", "never said") == ""


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was():
    template = "{{ raise_exception('no system turn') if messages[0].role == 'system' }}{{ messages[-1].content }}"
    terminal = Terminal(lambda prompt: "fine", template=template, context_length=40)
    terminal.types("/system x", "hi")
    assert "no system turn" in terminal.notes[1]
    assert terminal.chat.messages == []
    terminal.chat.system = ""
    terminal.types("a" * 50)
    assert "context 40" in terminal.notes[0]
    assert terminal.types("hi") == "fine\n"
    assert terminal.types("a" * 30) == "fine\n"
    assert terminal.batcher.streams[-1].answer.options.max_new_tokens == 10
    terminal.batcher.close()


def test_ctrl_c_keeps_what_was_said(terminal):
    def interrupted(text):
        terminal.answers[-1] += text
        if terminal.answers[-1] == "<|user":
            raise KeyboardInterrupt

    terminal.chat = Chat(terminal.model, terminal.batcher, SamplingOptions(max_new_tokens=1000), interrupted)
    terminal.types("hello")
    assert terminal.batcher.streams[-1].is_cancelled
    assert terminal.chat.messages[-1] == {"role": "assistant", "content": "<|user"}


def test_a_model_that_fails_does_not_end_the_conversation():
    terminal = Terminal(lambda prompt: FloatingPointError("not finite") if "bad" in prompt else "fine")
    assert terminal.types("hi", "bad", "again") == "fine\n\nfine\n"
    assert terminal.notes[1] == "error: the answer failed: not finite"
    assert [message["content"] for message in terminal.chat.messages] == ["hi", "fine", "again", "fine"]
    terminal.batcher.close()
