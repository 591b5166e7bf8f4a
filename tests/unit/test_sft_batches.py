"""Batches and the loss: every row once an epoch, the same windows at any number of ranks, one normaliser."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megalith.rlhf.batches import collate, deal, fit, steps_per_epoch, windows
from megalith.rlhf.losses import IGNORE, completion_loss_sum
from megalith.rlhf.models import PRESETS, Source, build_on_meta
from megalith.rlhf.templates import Sample


def make_samples(count, seed=0):
    """Samples of various lengths; the first id is the sample's number."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        length = int(rng.integers(3, 12))
        ids = rng.integers(3, 300, length).astype(np.int32)
        ids[0] = number
        trained = np.arange(length) >= rng.integers(1, length)
        samples.append(Sample(ids, trained))
    return samples


def numbers(window):
    return [int(sample.ids[0]) for rows in window.micro_batches for sample in rows if sample.trained.any()]


def test_loss_is_the_shifted_cross_entropy_over_labels():  # S1
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE, 3], [4, IGNORE, 5, 6, IGNORE]])
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=IGNORE)
    torch.testing.assert_close(completion_loss_sum(logits, labels) / 5, expected)


def test_an_oracle_has_loss_zero_and_any_other_shift_has_not():  # S1
    labels = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    one_hot = 50.0 * F.one_hot(labels, 10).float()
    oracle = one_hot.roll(-1, dims=1)
    assert completion_loss_sum(oracle, labels) < 1e-6
    for shift in (0, -2, 1):
        assert completion_loss_sum(one_hot.roll(shift, dims=1), labels) / 7 > 1


def test_gradient_is_exactly_zero_on_prompt_and_padding():  # S2
    (sample,) = fit([Sample(np.arange(6, dtype=np.int32), np.array([0, 0, 0, 1, 1, 1], bool))], 10).samples
    longer = Sample(np.arange(9, dtype=np.int32), np.arange(9) >= 2)
    _, labels = collate([sample, longer], pad_id=0, device="cpu")
    logits = torch.randn(2, 9, 16, requires_grad=True)
    completion_loss_sum(logits, labels).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert touched[0].tolist() == [False, False, True, True, True, False, False, False, False]
    assert touched[1].tolist() == [False, *[True] * 7, False]


def test_a_batch_without_labels_gives_a_zero_that_reaches_the_graph():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = completion_loss_sum(logits, torch.full((1, 3), IGNORE))
    loss.backward()
    assert loss == 0 and logits.grad.abs().sum() == 0


def test_loss_of_half_precision_logits_is_taken_in_float32():
    logits = torch.randn(1, 4, 8).bfloat16()
    labels = torch.tensor([[0, 1, 2, 3]])
    loss = completion_loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    assert loss == completion_loss_sum(logits.float(), labels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_has_every_row_once_over_all_ranks(world_size):
    samples = make_samples(23)
    steps = steps_per_epoch(23, world_size, 2, 3)
    for epoch in (0, 1):
        seen = []
        for rank in range(world_size):
            stream = windows(samples, rank, world_size, 2, 3, seed=1)
            for window in itertools.islice(stream, epoch * steps, (epoch + 1) * steps):
                seen += numbers(window)
        assert sorted(seen) == list(range(23))


def test_epochs_and_seeds_have_different_orders():
    samples = make_samples(40)
    order = [numbers(w) for w in itertools.islice(windows(samples, 0, 1, 4, 1, seed=0), 20)]
    assert order[:10] != order[10:]
    assert order[:10] != [numbers(w) for w in itertools.islice(windows(samples, 0, 1, 4, 1, seed=1), 10)]


def test_windows_hold_the_same_rows_and_counts_however_they_are_split():  # S9
    samples = make_samples(50)
    splits = [(1, 1, 8), (1, 8, 1), (2, 2, 2), (4, 2, 1)]  # world size, batch size, accumulation: 8 rows each
    seen = []
    for world_size, batch_size, accumulation in splits:
        streams = [
            itertools.islice(windows(samples, rank, world_size, batch_size, accumulation, seed=5), 10)
            for rank in range(world_size)
        ]
        seen.append(
            [
                (sorted(sum(map(numbers, ws), [])), ws[0].loss_tokens, ws[0].tokens, ws[0].cursor)
                for ws in zip(*streams, strict=True)
            ]
        )
    assert all(other == seen[0] for other in seen)


def test_every_rank_has_as_many_micro_batches_as_the_others():
    for count in range(1, 14):
        dealt = [deal(make_samples(count), rank, 3, 2) for rank in range(3)]
        assert len({len(micro_batches) for micro_batches in dealt}) == 1
        assert all(rows for micro_batches in dealt for rows in micro_batches)


def test_windows_go_on_from_a_cursor():
    samples = make_samples(23)
    whole = list(itertools.islice(windows(samples, 0, 1, 4, 1, seed=3), 14))
    for stop in (1, 5, 6, 9):
        rest = itertools.islice(windows(samples, 0, 1, 4, 1, seed=3, cursor=whole[stop - 1].cursor), 14 - stop)
        assert [numbers(window) for window in rest] == [numbers(window) for window in whole[stop:]]


def test_short_rows_are_padded_on_the_right_without_labels():
    rows = [
        Sample(np.array([7, 8], np.int32), np.array([0, 1], bool)),
        Sample(np.array([1, 2, 3], np.int32), np.ones(3, bool)),
    ]
    input_ids, labels = collate(rows, pad_id=0, device="cpu")
    assert input_ids.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert labels.tolist() == [[IGNORE, 8, IGNORE], [1, 2, 3]]


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "opt-tiny", "bloom-tiny"])
def test_padding_without_an_attention_mask_changes_no_loss(preset):
    torch.manual_seed(0)
    config = PRESETS[preset]()
    model = type(build_on_meta(Source(config, None, None)))(config).eval()
    samples = fit(make_samples(4), 10).samples
    with torch.no_grad():
        alone = sum(
            completion_loss_sum(model(input_ids=ids).logits, labels)
            for ids, labels in (collate([s], 0, "cpu") for s in samples)
        )
        for pad_id in (0, 257):
            input_ids, labels = collate(samples, pad_id, "cpu")
            torch.testing.assert_close(completion_loss_sum(model(input_ids=input_ids).logits, labels), alone)


def test_how_a_window_is_split_changes_neither_loss_nor_gradient():  # S9
    config = PRESETS["llama-tiny"]()
    torch.manual_seed(0)
    model = type(build_on_meta(Source(config, None, None)))(config)
    samples = make_samples(8)

    def gradient(world_size, batch_size, accumulation):
        model.zero_grad()
        total = 0.0
        for rank in range(world_size):
            window = next(windows(samples, rank, world_size, batch_size, accumulation, seed=0))
            for rows in window.micro_batches:
                input_ids, labels = collate(rows, 0, "cpu")
                loss = completion_loss_sum(model(input_ids=input_ids).logits, labels) / window.loss_tokens
                loss.backward()
                total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, reference = gradient(1, 8, 1)
    for split in [(1, 1, 8), (2, 2, 2), (4, 1, 2)]:
        other_loss, other = gradient(*split)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other - reference).norm() / reference.norm() < 1e-5
