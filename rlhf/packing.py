"""Packing: several documents in one row, each of which sees itself alone.

Positions begin at 0 in every document, and transformers turns such position ids into block-diagonal attention. A row
holds no label at the first token of a document, which nothing precedes.
"""

from dataclasses import dataclass

import torch

from .errors import InputError
from .losses import IGNORE
from .templates import Sample

# Families whose attention tells documents apart by position ids (tested); others would let them see one another.
PACKABLE = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "mixtral")


@dataclass(frozen=True)
class Pack:
    """A row of whole Samples."""

    documents: tuple[Sample, ...]

    def __len__(self):
        return sum(len(document) for document in self.documents)

    @property
    def loss_tokens(self):
        return sum(document.loss_tokens for document in self.documents)

    @property
    def positions(self):
        return max(document.positions for document in self.documents)

    @property
    def attended(self):
        return sum(document.attended for document in self.documents)

    def arrays(self):
        for document in self.documents:
            yield from document.arrays()

    def blank(self):
        return Pack(tuple(document.blank() for document in self.documents))


def check_packable(config):
    """Raises InputError for a model that would let the documents of a row see one another."""
    if config.model_type not in PACKABLE:
        raise InputError(
            f"--packing: {config.model_type} does not tell the documents of a row apart (these do: "
            f"{', '.join(PACKABLE)}); train it with --packing false"
        )


def pack(samples, max_len):
    """Put samples of at most `max_len` tokens into as few rows of `max_len` as best-fit decreasing finds: the longest
    first, each into the row with the least room that still holds it."""
    rows = []  # lists of samples
    with_room = [[] for _ in range(max_len + 1)]  # indices of rows by the room that they have left
    for sample in sorted(samples, key=len, reverse=True):
        room = next((room for room in range(len(sample), max_len + 1) if with_room[room]), max_len)
        if with_room[room]:
            index = with_room[room].pop()
        else:
            index = len(rows)
            rows.append([])
        rows[index].append(sample)
        with_room[room - len(sample)].append(index)
    return tuple(Pack(tuple(row)) for row in rows)


def collate_packs(packs, pad_id, device):
    """Right-padded (input_ids, position_ids, labels), int64 [B, T]. Padding is a document of its own."""
    length = max(len(pack) for pack in packs)
    input_ids = torch.full((len(packs), length), pad_id)
    position_ids = torch.zeros(len(packs), length, dtype=torch.int64)
    labels = torch.full((len(packs), length), IGNORE)
    for row, pack_ in enumerate(packs):
        start = 0
        for document in pack_.documents:
            ids, trained = torch.from_numpy(document.ids).long(), torch.from_numpy(document.trained)
            part = slice(start, start + len(document))
            input_ids[row, part] = ids
            position_ids[row, part] = torch.arange(len(document))
            labels[row, part] = torch.where(trained, ids, IGNORE)
            labels[row, start] = IGNORE
            start += len(document)
        position_ids[row, start:] = torch.arange(length - start)
    return input_ids.to(device), position_ids.to(device), labels.to(device)
