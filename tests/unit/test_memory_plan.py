"""The plan that a run prints before it begins: rehearsed with its own rows, several models beside their budgets."""

import re

import pytest
import torch
from megalith.rlhf import memory_plan
from megalith.rlhf.logprobs import last_logprobs, token_logprobs
from megalith.rlhf.memory_plan import Rehearsal, language_step, logprob_step, plans, rows_on_meta
from tiny import batches, make_model

OPTIONS = {"zero_stage": 3, "placement": "host", "precision": "fp32", "max_grad_norm": 1.0}


def test_longer_rows_take_more_and_each_models_plan_is_there():
    def activations(length):
        step = language_step(rows_on_meta(2, length))
        text = plans({"model": Rehearsal(make_model("llama"), step)}, OPTIONS, world_size=1)
        return float(re.search(r"activations +([\d,.]+)  at most", text)[1].replace(",", ""))

    assert activations(64) > 3 * activations(16) > 0

    rows = rows_on_meta(2, 16)
    rehearsals = {
        "policy": Rehearsal(make_model("llama"), logprob_step(rows, 4), micro_batches=2),
        "reference": Rehearsal(make_model("llama").requires_grad_(False), logprob_step(rows)),
    }
    text = plans(rehearsals, {**OPTIONS, "device_budget": "40MB", "host_budget": 10**9}, world_size=2)
    assert "policy: " in text and "reference: " in text and text.count("TFLOP a rank") == 2
    rests = [float(each) for each in re.findall(r"host +at rest +([\d.]+)  MB, at most .*budget", text)]
    singles = [
        sum(float(each) for each in re.findall(r"host +\w+ +([\d.]+)$", part, re.M))
        for part in text.split("all 2 models")[0].split("reference: ")
    ]
    assert rests == [pytest.approx(sum(singles), abs=0.3)] and "budget 40.0" in text


def test_models_are_placed_in_what_those_before_them_leave():
    def on_host(budget):
        options = {**OPTIONS, "placement": "auto", "device_budget": budget, "host_budget": "1GB"}
        models = {name: Rehearsal(make_model("llama", num_hidden_layers=6)) for name in ("actor", "critic")}
        text = plans(models, options, world_size=1)
        return [part.count("host    exp_avg ") for part in text.split("critic: ")]

    assert on_host("1GB") == [0, 0]
    assert on_host("1MB") == [0, 1]


def test_a_step_that_cannot_be_rehearsed_is_told_and_ends_in_time(monkeypatch):
    broken = Rehearsal(make_model("llama"), lambda model: model.no_such_part)
    text = plans({"model": broken}, OPTIONS, world_size=1)
    assert "parameters in" in text and "not rehearsed: 'LlamaForCausalLM' object has no attribute" in text
    monkeypatch.setattr(memory_plan, "LIMIT_S", -1.0)
    text = plans({"model": Rehearsal(make_model("llama"), language_step(rows_on_meta(1, 8)))}, OPTIONS, world_size=1)
    assert "parameters in" in text and "not rehearsed: it takes longer" in text


def test_the_rehearsed_logprobs_are_those_that_are_trained():
    model, rows = make_model("llama"), batches(1)[0]
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, -3:] = True
    ours = last_logprobs(model, rows, 3)
    assert torch.equal(ours, token_logprobs(model, rows, scored)[0][:, -3:].flatten())
