"""The doctor: closed forms, a task that PPO has to solve, and controls. What its tasks catch is in `test_mutants`."""

import itertools
import json
import math
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from megalith.rlhf import doctor, doctor_commands, doctor_curve, doctor_ptx, doctor_run, doctor_tasks
from megalith.rlhf.doctor_checks import Check, Trial
from megalith.rlhf.doctor_run import Setting, build_learner, run

RANKS = types.SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), is_first=True)
TRADE = replace(doctor_tasks.count(vocab=8, new_tokens=4), iterations=16)


def off_the_curve(task, measured):
    best = task.optimum
    return max(abs(measured.reward - best.reward) / best.reward, abs(measured.kl - best.kl) / best.kl)


@pytest.mark.parametrize("task", [TRADE, doctor_tasks.count(vocab=3, new_tokens=3, beta=0.2)])
def test_the_optimum_is_that_of_enumeration(task):
    answers = list(itertools.product(range(task.vocab), repeat=task.new_tokens))
    rewards = torch.tensor([task.reward([2], answer) for answer in answers], dtype=torch.float64)
    objective = task.beta * (torch.logsumexp(rewards / task.beta, 0) - math.log(len(answers)))
    best = torch.softmax(rewards / task.beta, 0)
    assert task.optimum.objective == pytest.approx(objective.item(), rel=1e-9)
    assert task.optimum.reward == pytest.approx((best * rewards).sum().item(), rel=1e-9)
    assert task.optimum.kl == pytest.approx((best * (best * len(answers)).log()).sum().item(), rel=1e-9)


def test_a_uniform_policy_is_measured_as_one():
    learner = build_learner(TRADE, 0, RANKS)
    reward, kl = doctor_run.enumerate_policy(TRADE, learner.actor.model)
    assert (reward, kl) == (pytest.approx(1 / 8, rel=1e-5), pytest.approx(0, abs=1e-5))


def test_ppo_reaches_the_optimum():
    measured = run(TRADE, 0, RANKS)
    assert off_the_curve(TRADE, measured) <= 0.1
    assert measured.objective >= 0.95 * TRADE.optimum.objective


@pytest.mark.parametrize(
    ("setting", "holds"),
    [
        (Setting(lr=0.0), lambda m: abs(m.kl) < 1e-6),
        (Setting(judge=lambda prompts, completions: [1.0] * len(completions)), lambda m: m.kl < 0.05),
        (Setting(judge=lambda *given: [-reward for reward in TRADE.rewards(*given)]), lambda m: m.reward < 1 / 8),
        (Setting(beta=10.0), lambda m: m.kl < 0.01),
    ],
    ids=["rate 0", "constant reward", "negated reward", "β 10"],
)
def test_controls_do_not_learn(setting, holds):
    assert holds(run(replace(TRADE, iterations=4), 0, RANKS, setting))


def test_the_price_of_a_kl():
    price = doctor_tasks.price_of(lambda beta: doctor_tasks.count(vocab=8, new_tokens=4, beta=beta), 4.0)
    assert doctor_tasks.count(vocab=8, new_tokens=4, beta=price).optimum.kl == pytest.approx(4.0, rel=1e-9)


# Stages, one after the other


def test_the_optimum_of_the_pipeline_is_that_of_enumeration():
    weights, longest, beta = np.array([0.3, -0.4, 1.1]), 3, 0.7
    answers = []
    for ids in itertools.product(range(3), repeat=longest):
        answers.append((1, *itertools.takewhile(lambda letter: letter != 0, ids), *([0] if 0 in ids else [])))
    share = {answer: count / 27 for answer, count in Counter(answers).items()}
    rewards = {answer: doctor_commands.true_reward(weights, np.array(answer)) for answer in share}
    objective = beta * math.log(sum(share[a] * math.exp(rewards[a] / beta) for a in share))
    reference = sum(share[a] * rewards[a] for a in share)
    expected = (pytest.approx(objective, rel=1e-9), pytest.approx(reference, rel=1e-9))
    assert doctor_commands.pipeline_optimum(weights, beta, longest) == expected


def test_preferences_a_reward_model_and_ppo(tmp_path):
    steps = []
    measured = doctor_commands.pipeline(0, steps.append, pairs=500, iterations=2)
    assert sum(steps) == 6
    assert measured.accuracy_of_bayes > 0.8
    assert 0 < measured.gain_share < 1

    for points in measured.curves.values():
        assert [point.iteration for point in points] == [1, 2]
        assert points[0].sqrt_kl < 1e-3 < points[1].sqrt_kl  # the first rollout is the reference's
        assert points[0].proxy == points[0].gold and points[1].proxy > points[0].proxy
    rng = np.random.default_rng([0, 5])
    weights = rng.normal(size=doctor_commands.LETTERS + 1)
    _, reference = doctor_commands.pipeline_optimum(weights - weights.mean())
    first = measured.curves[doctor_commands.BETA][0]
    assert abs(first.gold - reference) < 4 * first.gold_error

    printed = doctor_curve.leave([measured.curves], tmp_path / "new").splitlines()
    assert len(printed) == 1 + 2 * 3 and printed[1].split()[:2] == ["0.005", "1"]
    [of_seed] = json.loads((tmp_path / "new" / "over_optimisation.json").read_text())["seeds"]
    assert of_seed["0.5"][1]["gold"] == measured.curves[0.5][1].gold
    assert (tmp_path / "new" / "over_optimisation.png").read_bytes().startswith(b"\x89PNG")


def test_an_over_optimisation_curve_is_read_from_whole_rollouts(tmp_path):
    rows = [(1, -0.1, 1.0, 5.0), (1, 0.1, 2.0, 6.0), (2, 4.0, 7.0, 9.0), (2, 5.0, 8.0, 9.0)]
    lines = [
        json.dumps({"step": step, "kl": kl, "gold": gold, "score": score, "truncated": step == 2})
        for step, kl, gold, score in rows
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    points = doctor_curve.read_curve(tmp_path / "samples.jsonl", lambda r: r["gold"], lambda r: r["score"])
    assert points == [
        doctor_curve.Point(1, 0.0, 1.5, 0.5, 1.5, 0.5, 0.0),
        doctor_curve.Point(2, math.sqrt(4.5), 7.5, 0.5, 5.0, 0.0, 1.0),
    ]


def test_walks():
    edges = doctor_commands.graph(np.random.default_rng(0))
    shortest = doctor_commands.distances(edges)
    assert set(shortest) == set(range(1, doctor_commands.NODES + 1))
    for node, steps in shortest.items():
        following = [shortest[other] for other in np.flatnonzero(edges[node])]
        assert node == doctor_commands.GOAL or min(following) == steps - 1

    edges = np.zeros((4, 4), dtype=bool)
    edges[2, 1] = edges[3, 2] = edges[2, 3] = True
    score = {1: 0, 2: 1, 3: 2}
    walks = {(3, 2, 1, 0): 1.0, (2, 3, 2, 1, 0): 1 / 3, (3, 1, 0): 0.0, (3, 2, 0): 0.0, (3, 2, 1): 0.0, (3, 0): 0.0}
    assert {walk: doctor_commands.optimality(edges, score, walk) for walk in walks} == walks


def test_the_corpus_of_ptx_is_learned_first():
    counting = [doctor_ptx._sample([(first + step) % 8 for step in range(5)]) for first in range(3, 8)]
    model = doctor_ptx._pretrained(counting, seed=0)
    assert doctor_ptx._loss(model, counting) < 0.2
    logprobs, _ = doctor_run.enumerated(doctor_ptx.TASK, model)
    entropy = -(logprobs.exp() * logprobs).sum().item()
    assert entropy > 0.9 * 4 * math.log(8)  # after the prompt, anything


# The command


def test_a_line_that_is_missed_is_told_and_is_the_exit_status(monkeypatch, capsys):
    trial = Trial(2, lambda seed, progress: progress(2) or 0.5 + seed)
    good, bad = Check("reached", trial, float, 1.0, 1.5, True), Check("missed", trial, float, 1.0)
    monkeypatch.setattr(doctor, "checks", lambda: [good, bad])
    with pytest.raises(SystemExit) as caught:
        doctor.main([])
    printed = capsys.readouterr().out
    assert caught.value.code == 1 and "1 of 2 checks pass" in printed
    assert " -1.23e-05 -1.23e-05 to -1.23e-05 " in " ".join(doctor.table([(bad, [-1.234e-5], True)]).split())
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert rows["reached"][1:] == ["1.5", "0.5", "to", "2.5", "1.5", "≥", "1", "pass"]
    assert rows["missed"][1:] == ["1.5", "0.5", "to", "2.5", "≤", "1", "FAIL"]
    doctor.main(["--only", "reach"])
    with pytest.raises(SystemExit):
        doctor.main(["--only", "nothing"])
    assert "no check has this in its name" in capsys.readouterr().err
