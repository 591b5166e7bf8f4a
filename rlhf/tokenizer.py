"""Tokenizers: from a folder, or the built-in one of bytes."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .errors import InputError


def byte_tokenizer():
    """256 bytes, `<|endoftext|>` and `<|pad|>`: needs no file, knows every string, and is what presets use."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def load_tokenizer(folder):
    """Read a tokenizer from a folder, offline. Raises InputError when there is none."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such tokenizer folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: holds no tokenizer that transformers can read ({error}); name one with --tokenizer"
        ) from None


def pad_id(tokenizer):
    """The id to fill batches with: any will do, because masks come from lengths."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
