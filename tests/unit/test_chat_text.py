"""Streamed text: what arrives in pieces is what decoding at once gives, and stop strings leave nothing behind."""

import random

import pytest
from megalith.rlhf.chat_text import UNFINISHED, CharacterStream, TextStream
from megalith.rlhf.tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Hello, world!",
    "  two spaces",
    "你好，世界。",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag",
    "naïve café\n\n\tdone ",
    "𝔘𝔫𝔦 ﷽ ก็",
    "a\ufffdb",
]


def sentencepiece_like():
    """As LLaMA's: words begin with ▁, unknown characters become byte tokens, the first space is dropped."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for character in "▁Hello,wrd!twospaceïvéf":
        vocab.setdefault(character, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def byte_level_bpe():
    """As GPT-2's, with merges that join halves of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {"bytes": byte_tokenizer, "sentencepiece": sentencepiece_like, "bpe": byte_level_bpe}


def pieces(stream, ids):
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_whole_and_hold_no_half_character(name):
    tokenizer = TOKENIZERS[name]()
    for text in [*TEXTS, " ".join(TEXTS)]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        streamed = pieces(CharacterStream(tokenizer), ids)
        assert "".join(streamed) == tokenizer.decode(ids, skip_special_tokens=True)
        if UNFINISHED not in text:
            assert not any(UNFINISHED in piece for piece in streamed)


def test_text_leaves_as_soon_as_it_is_certain():
    tokenizer = byte_tokenizer()
    assert pieces(CharacterStream(tokenizer), tokenizer("a你b").input_ids) == ["a", "", "", "你", "b", ""]


def test_invalid_bytes_come_out_as_the_tokenizer_writes_them():
    tokenizer, numbers = byte_tokenizer(), random.Random(0)
    for _ in range(200):
        ids = [numbers.choice([0x41, 0xE4, 0xBD, 0xA0, 0xFF, 0xF0, 0x9F]) for _ in range(12)]
        ids = [tokenizer.convert_tokens_to_ids(BYTE_SYMBOLS[byte]) for byte in ids]
        assert "".join(pieces(CharacterStream(tokenizer), ids)) == tokenizer.decode(ids)


def _byte_symbols():
    """GPT-2's printable symbol of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_SYMBOLS = _byte_symbols()


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_invalid_bytes_for_ever_are_not_held_for_ever(name):
    tokenizer = TOKENIZERS[name]()
    token = tokenizer.convert_tokens_to_ids({"bytes": BYTE_SYMBOLS[0xFF], "sentencepiece": "<0xFF>"}[name])
    stream = CharacterStream(tokenizer)
    out = "".join(stream.push(token) for _ in range(300))
    assert 280 <= len(out) <= 300
    assert len(stream._pending) <= 17
    assert set(out) == {UNFINISHED}


def test_special_tokens_are_not_text():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("ab").input_ids, tokenizer.eos_token_id]
    assert "".join(pieces(CharacterStream(tokenizer), ids)) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one STOP two", ["STOP"], "one ", True),
        ("one STO two", ["STOP"], "one STO two", False),
        ("one STO", ["STOP"], "one STO", False),
        ("aab", ["ab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("xyz", ["yz", "xy"], "", True),
        ("你好。\n再见", ["。\n"], "你好", True),
        ("abc", [], "abc", False),
    ],
)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_stop_strings(name, text, stop, expected, stopped):
    tokenizer = TOKENIZERS[name]()
    stream, out = TextStream(tokenizer, stop), []
    for token in tokenizer(text).input_ids:
        out.append(stream.push(token))
        assert expected.startswith("".join(out)), "text of a stop string, or after it, has left"
    out.append(stream.finish())
    assert "".join(out) == expected
    assert stream.stopped is stopped
