"""The step benchmark: its options, its ratios, and one run on a tiny model."""

import json

import pytest
from megalith.bench import step
from megalith.bench.launch import RankError


def reading(tokens_per_s, losses=(9.0, 5.0), rss_bytes=1.0):
    return {
        "metrics": {"tokens_per_s": tokens_per_s, "peak_rss_bytes": rss_bytes, "other_load_share": 0.0},
        "losses": list(losses),
        "model_numel": 1,
        "versions": {},
    }


def record_of(readings, monkeypatch, capsys, tmp_path, options=()):
    """Run main with `readings` (by entry, one a round; an exception is raised) in place of real processes."""
    left = {name: list(own) for name, own in readings.items()}

    def measure(entry, args):
        taken = left[entry.name].pop(0)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(step, "measure", measure)
    rounds = str(max(len(own) for own in readings.values()))
    path = tmp_path / "record.json"
    status = step.main(["--only", *readings, "--rounds", rounds, "--json", str(path), *options])
    capsys.readouterr()
    return status, json.loads(path.read_text())


def test_ratios_are_taken_within_a_round(monkeypatch, capsys, tmp_path):
    readings = {
        "ddp": [reading(100, rss_bytes=4), reading(10, rss_bytes=4)],
        "megalith-zero2": [reading(110, rss_bytes=2), reading(12, rss_bytes=8)],
    }
    status, record = record_of(readings, monkeypatch, capsys, tmp_path)
    speed, memory = record["checks"]
    assert status == 0
    assert speed["values"] == pytest.approx([1.1, 1.2]) and speed["at_least"] == 1.0
    assert memory["values"] == [0.5, 2.0] and memory["at_most"] == 1.0


def test_what_offloading_costs_is_told_where_the_device_has_memory_of_its_own():
    offloaded, resident = reading(80), reading(100)
    for own, peak_bytes in ((offloaded, 1.0), (resident, 4.0)):
        own["metrics"]["peak_cuda_bytes"] = peak_bytes
    readings = {"megalith-host-deferred": [offloaded], "megalith": [resident]}
    assert not list(step.checks(readings, "cpu"))
    speed, memory = step.checks(readings, "cuda")
    assert speed["values"] == [0.8] and speed["at_least"] == 0.85
    assert memory["values"] == [0.25]


@pytest.mark.parametrize("last_loss", [5.01, float("nan")])
def test_an_entry_that_trains_wrongly_cannot_win(last_loss, monkeypatch, capsys, tmp_path):
    readings = {"ddp": [reading(100)], "megalith-zero2": [reading(900, losses=(9.0, last_loss))]}
    status, record = record_of(readings, monkeypatch, capsys, tmp_path)
    assert status == 1 and record["checks"] == []
    assert record["rows"][1]["note"].startswith("WRONG LOSS") and "ddp" in record["rows"][1]["note"]


def test_losses_are_compared_only_between_entries_of_as_many_ranks(monkeypatch, capsys, tmp_path):
    readings = {"plain": [reading(100, losses=(8.0, 4.0))], "ddp": [reading(100)]}
    status, record = record_of(readings, monkeypatch, capsys, tmp_path)
    assert status == 0 and [row["note"][:4] for row in record["rows"]] == ["loss", "loss"]


def test_a_crashed_entry_takes_no_further_turn_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    readings = {"ddp": [reading(100), reading(100)], "fsdp2": [RankError("rank 1 exited with 1:\nout of luck")]}
    status, record = record_of(readings, monkeypatch, capsys, tmp_path)
    assert status == 1 and len(record["rows"][0]["metrics"]["tokens_per_s"]) == 2
    assert record["rows"][1]["note"] == "FAILED: out of luck"


def test_an_absent_peer_is_told_of_and_is_no_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(step.DEEPSPEED_VARIABLE, raising=False)
    readings = {"ddp": [reading(100)], "deepspeed-zero3": []}
    status, record = record_of(readings, monkeypatch, capsys, tmp_path)
    assert status == 0 and "--install_deepspeed" in record["rows"][1]["note"]


def test_model_is_a_preset_with_fields_replaced():
    assert step.parse_model("llama-34m,vocab_size=64")["vocab_size"] == 64
    assert step.MODELS["llama-34m"]["vocab_size"] == 8192


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model", "llama-35m"], "llama-34m"),
        (["--model", "llama-34m,layers=2"], "num_hidden_layers"),
        (["--model", "llama-34m,vocab_size=many"], "FIELD=INT"),
        (["--steps", "0"], "--steps is 0"),
        (["--only", "fsdp3"], "fsdp2"),
        (["--install_deepspeed", str(step.REPOSITORY / "peers")], "outside the repository"),
    ],
)
def test_a_wrong_option_is_refused_with_what_to_write_instead(argv, told, capsys):
    with pytest.raises(SystemExit):
        step.parse_args(argv)
    assert told in capsys.readouterr().err


def test_run_on_a_tiny_model(tmp_path, capsys):
    fields = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2"
    argv = ["--model", f"llama-34m,{fields},vocab_size=64", "--batch_size", "1", "--seq_len", "16", "--steps", "2"]
    argv += ["--rounds", "1", "--only", "megalith", "megalith-beside-plain", "--timeout_s", "120"]
    assert step.main([*argv, "--json", str(tmp_path / "r.json"), "--trace", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    record = json.loads((tmp_path / "r.json").read_text())
    for row in record["rows"]:
        assert row["metrics"]["tokens_per_s"][0] > 0 and row["metrics"]["peak_rss_bytes"][0] > 2**26
        assert json.loads((tmp_path / f"{row['name']}-rank0.json").read_text())["traceEvents"]
    assert record["settings"]["parameters"] == 64 * 32 * 2 + 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert [check["at_least"] for check in record["checks"]] == [0.97]
