"""PPO on two ranks: the trajectory of one rank, and faults that end every rank with the reason."""

import socket

import pytest
import torch
from launch import run_ranks
from megalith.rlhf import decoding, rl_run
from megalith.rlhf.experience import collect
from megalith.rlhf.ppo import learn
from megalith.rlhf.rewards import http_reward
from megalith.rlhf.strategy import process_group
from ppo_cases import PROMPTS, cpu_ranks, iterate, make_learner, whole

OPTIONS = dict(kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9, micro_batch_size=2)
AT_ONCE = dict(old_logprobs="sampler", train_batch_size=4, micro_batch_size=4)  # a rank's half of a rollout
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_cpu")


def trajectories(rank, world_size, folder):
    """Metrics of every strategy, then what faults lead to; one start of processes serves them all."""
    results = {}
    for strategy in STRATEGIES:
        learner = make_learner(cpu_ranks(rank, world_size), strategy, **OPTIONS)
        results[strategy] = iterate(learner, 2)
    results["average"] = dict(learner.average.whole_weights())
    results["model"] = iterate(make_learner(cpu_ranks(rank, world_size), judge=None), 2)
    results["streamed"] = iterate(make_learner(cpu_ranks(rank, world_size), gather_for_generation="never"), 2)
    results["one_base"] = iterate(make_learner(cpu_ranks(rank, world_size), judge=None, share_base=True), 2)
    results["at_once"] = iterate(make_learner(cpu_ranks(rank, world_size), **AT_ONCE), 2)
    results["raises"] = _message(lambda: collect(_judged(rank, world_size, _raising_on(1)), PROMPTS))
    results["short"] = _message(lambda: collect(_judged(rank, world_size, _too_few_on(0)), PROMPTS))
    results["silent"] = _message(lambda: silent_server(rank, world_size))
    results["not_finite"] = _message(lambda: not_finite(rank, world_size))
    results["resumed"] = resumed(rank, world_size, folder)
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


def silent_server(rank, world_size):
    """A server that takes the second rank's question and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ask = http_reward(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3)

        def judge(completion_ids):
            return ask([""] * len(completion_ids), [""] * len(completion_ids)) if rank else [0.0] * len(completion_ids)

        collect(make_learner(cpu_ranks(rank, world_size), judge=judge), PROMPTS)


def not_finite(rank, world_size):
    """The second rank's logits are NaN after two tokens, while the first rank goes on and weights are streamed."""
    choose = decoding.choose_tokens

    def failing(logits, rows, steps, counts):
        return choose(logits * float("nan") if rank and steps.max() > 1 else logits, rows, steps, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "choose_tokens", failing)
        collect(make_learner(cpu_ranks(rank, world_size), gather_for_generation="never"), PROMPTS)


def resumed(rank, world_size, folder):
    """The metrics and weights of four iterations, and of two that go on from a checkpoint after two."""
    outcomes = []
    learner = make_learner(cpu_ranks(rank, world_size), **OPTIONS)
    rows = iterate(learner, 2)
    rl_run.save(folder / "step", learner, (2, 0), {"seed": 5})
    outcomes.append((rows[2:] + iterate(learner, 2), whole(learner.actor.model), whole(learner.critic.model)))
    again = make_learner(cpu_ranks(rank, world_size), **OPTIONS)
    assert rl_run.load(folder / "step", again, {"seed": 5}) == (2, 0) and again.iteration == 2
    outcomes.append((iterate(again, 2), whole(again.actor.model), whole(again.critic.model)))
    outcomes.append([dict(part.average.whole_weights()) for part in (learner, again)])
    return outcomes


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
def results(tmp_path_factory):
    return run_ranks(2, trajectories, tmp_path_factory.mktemp("ppo"), timeout_s=200)


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
            "one_base": iterate(make_learner(ranks, judge=None, share_base=True), 2),
            "at_once": iterate(make_learner(ranks, **{**AT_ONCE, "train_batch_size": 8, "micro_batch_size": 8}), 2),
        }


def same(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_have_the_trajectory_of_one(results, one_rank, strategy):
    for of_rank in results:
        same(of_rank[strategy], one_rank["rows"])


@pytest.mark.parametrize("what", ["model", "streamed", "one_base", "at_once"])
def test_with_other_judges_bases_and_ways_to_sample(results, one_rank, what):
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


def test_a_server_that_never_answers_and_logits_that_are_not_finite_end_both_ranks(results):
    for of_rank in results:
        assert "the rollout failed: rank 1: RuntimeError: the reward server" in of_rank["silent"]
        assert "timed out" in of_rank["silent"]
        assert "the rollout failed: rank 1: FloatingPointError: the model's logits after" in of_rank["not_finite"]


def test_going_on_from_a_checkpoint_of_two_ranks_gives_the_same_bits(results):
    for of_rank in results:
        whole_run, again, averages = of_rank["resumed"]
        assert whole_run[0] == again[0]
        for weights, others in (*zip(whole_run[1:], again[1:], strict=True), averages):
            assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_empty_answers_beside_answers_that_never_end(results):
    for of_rank in results:
        for lengths, stopped, count in of_rank["lengths"]:
            assert lengths == [1, 9] * 4
            assert stopped == [True, False] * 4
            assert count == 4
