"""Several ranks against plain PyTorch on one, for every stage and placement."""

import threading

import pytest
import torch
from launch import run_ranks
from tiny import update_error
from training import Recipe, reference, train

STAGES = [{"zero_stage": stage} for stage in (0, 1, 2, 3)]
PLACEMENTS = [{"placement": "device"}, {"placement": "host"}]
RECIPES = [
    Recipe(family="gpt2", accumulation=2),
    Recipe(family="llama_tied", max_grad_norm=None),
    Recipe(family="llama", reentrant_checkpoint=False, generates=True),
    Recipe(family="qwen2", reentrant_checkpoint=True, frozen=".1."),
    Recipe(family="mixtral"),
]


def _train_all(rank, world_size, jobs):
    return [train(recipe, rank, world_size, options) for recipe, options in jobs]


def test_every_stage_and_placement_matches_plain_pytorch_at_two_ranks():
    jobs = [(recipe, stage | place) for recipe in RECIPES for stage in STAGES for place in PLACEMENTS]
    first, second = run_ranks(2, _train_all, jobs, timeout_s=300)
    for (recipe, options), ours, theirs in zip(jobs, first, second, strict=True):
        expected = reference(recipe)
        assert update_error(ours.initial, ours.final, expected.final) < 2e-4, (recipe, options)
        assert ours.norms == pytest.approx(expected.norms, rel=1e-4), (recipe, options)
        assert ours.generated == expected.generated, (recipe, options)
        for name in ours.final:
            assert torch.equal(ours.final[name], theirs.final[name]), (recipe, options, name)
    for (recipe, options), device, host in zip(jobs[::2], first[::2], first[1::2], strict=True):
        for name in device.final:
            assert torch.equal(device.final[name], host.final[name]), (recipe, options, name)


def test_four_ranks_match_plain_pytorch():
    recipe = Recipe(family="llama_tied")
    jobs = [(recipe, {"zero_stage": stage, "max_chunk_numel": 3000}) for stage in (0, 1, 2, 3)]
    expected = reference(recipe)
    for ours in run_ranks(4, _train_all, jobs)[3]:
        assert update_error(ours.initial, ours.final, expected.final) < 2e-4


def _train_with_late_updates(rank, world_size, recipe, late_rank):
    def delay():
        return 0.05 if rank == late_rank and threading.current_thread().name == "megalith-updates" else 0.0

    options = {"zero_stage": 3, "placement": "host", "lane_delay": delay, "timeout_s": 10}
    return train(recipe, rank, world_size, options).final


@pytest.mark.parametrize("late_rank", [0, 1])
def test_ranks_issue_the_same_transfers_when_their_updates_end_at_different_moments(late_rank):
    # With checkpointing and generation, groups are prefetched after a step that the next pass does not use first.
    recipe = Recipe(reentrant_checkpoint=False, generates=True)
    expected = reference(recipe)
    for final in run_ranks(2, _train_with_late_updates, recipe, late_rank, timeout_s=60):
        assert update_error(expected.initial, final, expected.final) < 2e-4
