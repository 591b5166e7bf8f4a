"""PPO on two ranks: the trajectory of one rank, and faults that end every rank with the reason."""

import pytest
import torch
from launch import run_ranks
from megalith.rlhf.experience import collect
from megalith.rlhf.ppo import learn
from megalith.rlhf.strategy import process_group
from ppo_cases import PROMPTS, cpu_ranks, iterate, make_learner

OPTIONS = dict(kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9, micro_batch_size=2)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_cpu")


def trajectories(rank, world_size):
    """Metrics of every strategy, then what faults lead to; one start of processes serves them all."""
    results = {}
    for strategy in STRATEGIES:
        learner = make_learner(cpu_ranks(rank, world_size), strategy, **OPTIONS)
        results[strategy] = iterate(learner, 2)
    results["average"] = dict(learner.average.whole_weights())
    results["model"] = iterate(make_learner(cpu_ranks(rank, world_size), judge=None), 2)
    results["streamed"] = iterate(make_learner(cpu_ranks(rank, world_size), gather_for_generation="never"), 2)
    results["raises"] = _message(lambda: collect(_judged(rank, world_size, _raising_on(1)), PROMPTS))
    results["short"] = _message(lambda: collect(_judged(rank, world_size, _too_few_on(0)), PROMPTS))
    results["lengths"] = [uneven(rank, world_size, gather) for gather in ("always", "never")]
    return results


def _judged(rank, world_size, judge):
    return make_learner(cpu_ranks(rank, world_size), judge=judge(rank))


def _raising_on(bad):
    def judge(rank):
        def reward(completions):
            if rank == bad:
                raise KeyError("no such answer")
            return [0.0] * len(completions)

        return reward

    return judge


def _too_few_on(bad):
    return lambda rank: lambda completions: [0.0] * (len(completions) - (rank == bad))


def _message(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "no error"


def uneven(rank, world_size, gather):
    """Rank 0's answers are empty but for the stop token, rank 1's are never ended: the head's weights say so."""
    learner = make_learner(cpu_ranks(rank, world_size), lr=0.0, gather_for_generation=gather, max_new_tokens=9)
    rows = range(rank, 8, world_size)
    stop = {row: frozenset(range(17)) if row % 2 == 0 else frozenset() for row in rows}
    learner.stop_ids = stop[rank]  # every token stops the one rank, and none the other
    experience = collect(learner, PROMPTS)
    metrics = learn(learner, experience)
    return experience.rollout.lengths.tolist(), experience.rollout.stopped.tolist(), metrics["val/num_eos_tokens"]


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, trajectories, timeout_s=200)


@pytest.fixture(scope="module")
def one_rank():
    with process_group(torch.device("cpu")) as ranks:
        learner = make_learner(ranks, "ddp", **OPTIONS)
        rows = iterate(learner, 2)
        return {
            "average": dict(learner.average.whole_weights()),
            "rows": rows,
            "model": iterate(make_learner(ranks, judge=None), 2),
            "streamed": iterate(make_learner(ranks), 2),
        }


def same(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=2e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_have_the_trajectory_of_one(results, one_rank, strategy):
    for of_rank in results:
        same(of_rank[strategy], one_rank["rows"])


@pytest.mark.parametrize("what", ["model", "streamed"])
def test_with_a_reward_model_and_with_weights_gathered_token_by_token(results, one_rank, what):
    for of_rank in results:
        same(of_rank[what], one_rank[what])


def test_the_average_is_put_together_from_all_ranks(results, one_rank):
    for name, tensor in one_rank["average"].items():
        torch.testing.assert_close(results[0]["average"][name], tensor, atol=1e-4, rtol=1e-3)
        assert torch.equal(results[0]["average"][name], results[1]["average"][name])


def test_a_reward_function_that_raises_on_one_rank_ends_both_with_its_words(results):
    for of_rank in results:
        assert of_rank["raises"] == "the rollout failed: rank 1: KeyError: 'no such answer'"
        assert "rank 0: RuntimeError: reward function" in of_rank["short"]
        assert "returned 3 rewards for 4 answers" in of_rank["short"]


def test_empty_answers_beside_answers_that_never_end(results):
    for of_rank in results:
        for lengths, stopped, count in of_rank["lengths"]:
            assert lengths == [1, 9] * 4
            assert stopped == [True, False] * 4
            assert count == 4
