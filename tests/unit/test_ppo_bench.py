"""The PPO benchmark: it measures plain models and the engine's, plans, and refuses what cannot fit."""

import json
import types
from functools import partial

import pytest
import torch
from megalith.bench import ppo, ppo_trl

SMALL = "--model tiny --prompt_tokens 6 --new_tokens 4 --experience_batch_size 2 --train_batch_size 1 --rounds 1"
SMALL += " --device cpu"


def test_plain_models_and_the_engines_are_measured(tmp_path, capsys):
    strategies = ["torch", "colossalai_gemini_cpu", "gemini_nvme"]
    given = ["--nvme_dir", str(tmp_path), "--json", str(tmp_path / "record.json")]
    ppo.main([*SMALL.split(), "--strategy", *strategies, *given])
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["torch", "gemini_cpu", "gemini_nvme"]
    for row in record["rows"]:
        assert all(value > 0 for values in row["metrics"].values() for value in values)
    assert "host_stored_peak_bytes" in record["rows"][1]["metrics"]
    assert "nvme_stored_peak_bytes" in record["rows"][2]["metrics"]
    assert "6 + 4 forced" in capsys.readouterr().out


def test_a_table_is_collected_by_a_run_for_each_strategy(tmp_path):
    path = tmp_path / "record.json"

    def measured(strategy, *others):
        ppo.main([*SMALL.split(), "--strategy", strategy, "--json", str(path), *others])
        return {row["name"]: row for row in json.loads(path.read_text())["rows"]}

    first = measured("torch")
    both = measured("ddp")
    assert list(both) == ["torch", "ddp"] and both["torch"] == first["torch"]
    again = measured("torch")
    assert sorted(again) == ["ddp", "torch"] and again["torch"] != first["torch"] and again["ddp"] == both["ddp"]
    assert list(measured("ddp", "--max_epochs", "2")) == ["ddp"]  # another setting, another table


def test_operations_of_an_episode_by_hand():
    args = ppo.parse_args([*SMALL.split(), "--max_epochs", "2"])
    config = ppo.config_of("tiny")

    def forward(tokens):  # two layers of width 64; token t attends to t tokens
        return sum(2 * 1000 + 2 * 4 * 64 * t for t in range(1, tokens + 1))

    rest = (4 + 2 * 3 * 2) * forward(10)
    assert ppo.flops(args, 1000, config, cached=True) == forward(10) + rest
    assert ppo.flops(args, 1000, config, cached=False) == sum(forward(t) for t in (6, 7, 8, 9)) + rest


def test_the_plan_alone_and_what_cannot_fit(capsys):
    ppo.main(["--model", "xl", "--strategy", "colossalai_zero2", "--plan", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "xl, zero2" in printed and "reference: " in printed and "all 4 models" in printed
    with pytest.raises(SystemExit):
        ppo.main(["--model", "175b", "--strategy", "torch", "--device", "cpu"])
    output = capsys.readouterr()
    assert "four plain models" in output.out
    assert "error: --model 175b --strategy torch cannot run here: the host would have to hold" in output.err


def test_beside_trl_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(ppo_trl.TRL_VARIABLE, raising=False)
    small = {**ppo_trl.MODEL, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    shape = {**ppo_trl.SHAPE, "model": small, "batch_size": 2, "prompt_tokens": 4, "new_tokens": 3}
    monkeypatch.setattr(ppo_trl, "compare", partial(ppo_trl.compare, shape=shape))
    path = tmp_path / "record.json"
    ppo.main(["--recipe", "trl", "--rounds", "1", "--updates", "2", "--json", str(path)])
    record = json.loads(path.read_text())
    absent, own = record["rows"]
    assert absent["note"].startswith("absent") and not absent["metrics"] and record["checks"] == []
    assert own["metrics"]["tokens_per_s"][0] > 0 and own["metrics"]["peak_rss_bytes"][0] > 2**26
    assert "| trl      | -" in capsys.readouterr().out


def test_a_strategy_without_its_drive_is_refused_before_any_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(ppo, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        ppo.main([*SMALL.split(), "--strategy", "torch", "gemini_nvme"])
    assert "--strategy gemini_nvme needs --nvme_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ppo.main([*SMALL.split(), "--strategy", "torch", "gemini_nvme", "--nvme_dir", "/no/such/folder"])
    assert "--nvme_dir /no/such/folder: no such folder" in capsys.readouterr().err


def test_what_cannot_fit_is_counted_over_the_ranks_of_a_machine(monkeypatch, tmp_path):
    memory, drive = types.SimpleNamespace(total=100e9), types.SimpleNamespace(free=200e9)
    monkeypatch.setattr(ppo.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(ppo.shutil, "disk_usage", lambda folder: drive)
    totals, cpu = {"device": 20e9, "host": 30e9, "nvme": 80e9}, torch.device("cpu")
    assert ppo.why_it_cannot_fit(totals, cpu, tmp_path) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert ppo.why_it_cannot_fit(totals, cpu, tmp_path).startswith("the host would have to hold 150.0 GB and has 100.0")
    memory.total = 1e12
    assert ppo.why_it_cannot_fit(totals, cpu, tmp_path).startswith("the nvme would have to hold 240.0 GB and has 200.0")


def test_ratios_are_those_of_one_round():
    def reading(speed, memory):
        return {"metrics": {"tokens_per_s": speed, "peak_rss_bytes": memory}}

    checks = ppo_trl.checks_of(
        {"megalith": [reading(30.0, 8.0), reading(10.0, 8.0)], "trl": [reading(20.0, 10.0), reading(5.0, 16.0)]}
    )
    assert [check["values"] for check in checks] == [[1.5, 2.0], [0.8, 0.5]]
