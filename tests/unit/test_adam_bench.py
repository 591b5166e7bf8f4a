"""The benchmark of the fused Adam runs, measures every entry, and says what is absent."""

import json

import pytest
from megalith.bench import adam


def test_a_run_measures_every_entry_and_keeps_the_record(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(adam.DEEPSPEED_VARIABLE, raising=False)
    path = tmp_path / "record.json"
    adam.main(["--numel", "10007", "--rounds", "2", "--threads", "1", "--json", str(path)])
    record = json.loads(path.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    measured = {name for name, row in rows.items() if row["metrics"]}
    assert set(rows) - measured == set(adam.DEEPSPEED_UPDATES)
    assert {name for bar in adam.BARS for name in bar[:2]} <= set(rows)
    for name in measured:
        assert len(rows[name]["metrics"]["GB_per_s"]) == 2 and min(rows[name]["metrics"]["GB_per_s"]) > 0
    for name in adam.DEEPSPEED_UPDATES:
        assert rows[name]["note"].startswith("absent")
    assert "megalith split bf16 / torch fused fp32" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--numel", "--rounds", "--threads"])
def test_a_count_of_zero_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        adam.main([option, "0"])
    assert f"{option} is 0" in capsys.readouterr().err
