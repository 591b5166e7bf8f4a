"""The inference benchmark: its ratios, and one run of our entries on a tiny model."""

import json

import pytest
from megalith.bench import inference, inference_worker

TINY = "llama-34m,hidden_size=128,intermediate_size=128,num_hidden_layers=2,vocab_size=64"


def reading(tokens_per_s, tokens=((1, 2),)):
    metrics = {"tokens_per_s": tokens_per_s, "first_token_s": 0.1, "peak_rss_bytes": 1.0, "other_load_share": 0.0}
    return {"metrics": metrics, "tokens": [list(row) for row in tokens]}


def record_of(readings, monkeypatch, tmp_path, *options):
    """Run main with `readings` (by row, one a round) in place of real processes."""
    left = {name: list(own) for name, own in readings.items()}
    monkeypatch.setattr(inference, "measure", lambda entry, size, args: left[f"{entry.name} x{size}"].pop(0))
    entries = list(dict.fromkeys(name.split()[0] for name in readings))
    sizes = list(dict.fromkeys(name.split(" x")[1] for name in readings))
    path = tmp_path / "record.json"
    rounds = str(max(len(own) for own in readings.values()))
    argv = ["--only", *entries, "--batch_sizes", *sizes, "--rounds", rounds, "--json", str(path), *options]
    return inference.main(argv), json.loads(path.read_text())


def test_ratios_are_taken_within_a_round(monkeypatch, tmp_path, capsys):
    readings = {
        "transformers x1": [reading(100), reading(10)],
        "megalith x1": [reading(110), reading(12)],
    }
    status, record = record_of(readings, monkeypatch, tmp_path)
    assert status == 0
    assert record["checks"][0]["values"] == pytest.approx([1.1, 1.2]) and record["checks"][0]["at_least"] == 1.0


def test_the_bars_of_a_gpu():
    """Half a second for 100 tokens of 4 GB at 1 TB/s is 0.8 of what the bandwidth allows."""
    args = inference.argparse.Namespace(device="cuda", precision="bf16", batch_sizes=[1], model="llama-7b")
    metrics = {"tokens_per_s": 180.0, "decoded_tokens_per_s": 200.0, "weights_read_bytes": 4e9, "copy_GB_per_s": 1000.0}
    own = {"metrics": {**metrics, "peak_cuda_bytes": 4.1e9, "kv_bytes": 0.2e9}}
    checks = list(inference.checks({"megalith-4bit x1": [own], "transformers x1": [reading(100.0)]}, args))
    assert [check["values"] for check in checks] == [[1.8], [pytest.approx(0.8)], [pytest.approx(3.9)]]
    assert all(inference.report.passes(check) for check in checks)
    own["metrics"] |= {"decoded_tokens_per_s": 140.0, "kv_bytes": 0.05e9}
    checks = list(inference.checks({"megalith-4bit x1": [own]}, args))
    assert not any(inference.report.passes(check) for check in checks)


def test_an_entry_that_decodes_wrongly_cannot_win(monkeypatch, tmp_path, capsys):
    readings = {"transformers x1": [reading(1)], "megalith x1": [reading(99, tokens=((1, 3),))]}
    status, record = record_of(readings, monkeypatch, tmp_path)
    assert status == 1 and record["checks"] == []
    assert record["rows"][1]["note"] == "WRONG TOKENS: not those of transformers x1"
    readings = {"transformers x1": [reading(1)], "megalith x1": [reading(99, tokens=((1, 3),))]}
    assert record_of(readings, monkeypatch, tmp_path, "--precision", "bf16")[0] == 0


def measure_in_process(entry, batch_size, args, folder):
    """As a fresh process would, which takes seconds to start."""
    options = inference.worker_options(entry, batch_size, args)
    path = folder / "result.json"
    inference_worker.main([json.dumps(options), str(path)])
    return json.loads(path.read_text())


def test_every_entry_of_ours_answers_as_transformers_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inference, "measure", lambda entry, size, args: measure_in_process(entry, size, args, tmp_path))
    path, plot = tmp_path / "record.json", tmp_path / "plot.png"
    options = ["--model", TINY, "--batch_sizes", "2", "--rounds", "1", "--prompt_tokens", "8", "--new_tokens", "6"]
    entries = [entry.name for entry in inference.ENTRIES if entry.name != "transformers-continuous"]  # takes 9 GB
    assert inference.main([*options, "--only", *entries, "--json", str(path), "--plot", str(plot)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [f"{entry} x2" for entry in entries]
    for row in rows:
        assert row["metrics"]["tokens_per_s"][0] > 0 and row["metrics"]["peak_rss_bytes"][0] > 2**20
        assert row["metrics"]["kv_bytes"] == [2 * 2 * 2 * 128 * 128 * 4]  # a block each: 2 prompts, 2 layers, K and V
    read = {row["name"]: row["metrics"]["weights_read_bytes"][0] for row in rows}
    assert read["megalith x2"] == read["transformers x2"] > 2 * read["megalith-4bit x2"]
    assert plot.stat().st_size > 0


def test_a_reading_is_taken_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "record.json"
    argv = ["--model", TINY, "--batch_sizes", "1", "--rounds", "1", "--new_tokens", "3", "--only", "megalith"]
    assert inference.main([*argv, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["rows"][0]["metrics"]["first_token_s"][0] > 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [(["--rounds", "0"], "--rounds"), (["--new_tokens", "1"], "--new_tokens"), (["--model", "llama-9"], "llama-9")],
)
def test_bad_options_are_named(argv, told, capsys):
    with pytest.raises(SystemExit):
        inference.main(argv)
    assert told in capsys.readouterr().err
