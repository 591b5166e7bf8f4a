"""Packed rows: the loss of unpacked ones, and documents that do not see one another."""

import numpy as np
import pytest
import torch
from megalith.rlhf import cut_text
from megalith.rlhf.batches import collate, deal, language_model_inputs
from megalith.rlhf.cut_text import cut
from megalith.rlhf.errors import InputError
from megalith.rlhf.losses import IGNORE, completion_loss_sum
from megalith.rlhf.models import PRESETS, Source, build_on_meta
from megalith.rlhf.packing import PACKABLE, Pack, check_packable, collate_packs, pack
from megalith.rlhf.templates import Sample
from transformers import AutoConfig


def sample(*ids, trained_from=0):
    return Sample(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= trained_from)


def random_samples(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [sample(*rng.integers(3, 250, n), trained_from=rng.integers(0, n)) for n in lengths]


def tiny(family):
    if f"{family}-tiny" in PRESETS:
        config = PRESETS[f"{family}-tiny"]()
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 320, "head_dim": 16}
        config = AutoConfig.for_model(family, **sizes, **({"num_local_experts": 2} if family == "mixtral" else {}))
    torch.manual_seed(0)
    return type(build_on_meta(Source(config, None, None)))(config).eval()


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_loss_is_the_loss_of_the_rows_alone(family):  # S8
    model, samples = tiny(family), random_samples(8, 12)
    with torch.no_grad():
        alone = 0.0
        for one in samples:
            input_ids, labels = collate([one], 0, "cpu")
            alone += completion_loss_sum(model(input_ids=input_ids).logits, labels).item()
        inputs, labels = language_model_inputs(pack(samples, 24), 0, "cpu")
        packed = completion_loss_sum(model(**inputs).logits, labels).item()
    assert packed == pytest.approx(alone, rel=1e-6 if family != "mixtral" else 1e-5)


@pytest.mark.parametrize("family", PACKABLE)
def test_a_document_does_not_see_its_neighbour(family):  # S8
    model = tiny(family)
    logits = []
    for first in ((5, 6, 7), (8, 9, 10)):
        input_ids, position_ids, _ = collate_packs([Pack((sample(*first), sample(11, 12, 13)))], 0, "cpu")
        with torch.no_grad():
            logits.append(model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits)
    assert torch.equal(logits[0][:, 3:], logits[1][:, 3:])
    assert not torch.equal(logits[0][:, :3], logits[1][:, :3])


def test_families_that_would_let_documents_see_one_another_are_refused():
    for family in ("opt", "bloom"):
        with pytest.raises(InputError, match=f"--packing: {family} does not tell"):
            check_packable(PRESETS[f"{family}-tiny"]())


def test_no_document_is_lost_or_cut_and_rows_are_full():
    samples = random_samples(500, 32)
    rows = pack(samples, 64)
    assert all(len(row) <= 64 for row in rows)
    assert sorted(id(d) for row in rows for d in row.documents) == sorted(map(id, samples))
    assert sum(map(len, samples)) / (64 * len(rows)) > 0.97
    assert sum(row.loss_tokens for row in rows) == sum(one.loss_tokens for one in samples)


def test_documents_begin_at_position_0_and_their_first_token_is_no_label():
    row = Pack((sample(5, 6), sample(7, 8, 9, trained_from=1)))
    input_ids, position_ids, labels = collate_packs([row, Pack((sample(1, 2, 3, 4, 5, 6),))], 99, "cpu")
    assert input_ids[0].tolist() == [5, 6, 7, 8, 9, 99]
    assert position_ids[0].tolist() == [0, 1, 0, 1, 2, 0]
    assert labels[0].tolist() == [IGNORE, 6, IGNORE, 8, 9, IGNORE]


def test_a_rank_without_rows_gets_a_blank_pack():
    rows = deal([Pack((sample(1, 2),))], rank=1, world_size=2, batch_size=1)
    assert [row.loss_tokens for batch in rows for row in batch] == [0]


TEXT = 'One. Two two! "Three?" 四四。五五五！ Six six six six\nseven and no end'


@pytest.mark.parametrize("max_chars", [1, 5, 9, 20, 1000])
def test_cutting_loses_nothing(max_chars):
    pieces = cut(TEXT, max_chars)
    assert "".join(pieces) == TEXT
    assert all(len(piece) <= max_chars for piece in pieces)


def test_text_is_cut_at_the_ends_of_sentences():
    assert cut(TEXT, 23) == ['One. Two two! "Three?" ', "四四。五五五！ ", "Six six six six\n", "seven and no end"]
    assert cut("A b. C d.", 100) == ["A b. C d."]
    assert cut("pi is 3.14 or so", 8) == ["pi is 3.", "14 or so"]
    assert cut("", 5) == []


def test_rows_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("One. Two.")
    with pytest.raises(SystemExit):
        cut_text.main([str(tmp_path / "book.txt"), str(tmp_path / "absent" / "rows.jsonl")])
    assert capsys.readouterr().err.endswith("rows.jsonl: cannot be written: No such file or directory\n")
