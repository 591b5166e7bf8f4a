"""Records of benchmarks: what the table says of raw readings."""

import json

import pytest
from megalith.bench import report

RECORD = {
    "benchmark": "step",
    "environment": {"date": "2026-01-01", "device": "CPU", "cpu": "some", "memory_bytes": 2**30, "torch": "2"},
    "settings": {"lr": 0.001},
    "rows": [
        {"name": "ddp", "note": "", "metrics": {"tokens_per_s": [300.0, 100.0, 200.0], "peak_rss_bytes": [2**20] * 3}},
        {"name": "megalith", "note": "", "metrics": {"tokens_per_s": [400.0]}},
        {"name": "deepspeed", "note": "absent: no environment", "metrics": {}},
    ],
    "checks": [
        {"name": "fast", "values": [0.1, 1.5, 1.6], "at_least": 1.5},
        {"name": "slow", "values": [1.4, 1.4, 9.0], "at_least": 1.5},
        {"name": "large", "values": [1.01], "at_most": 1.0},
    ],
}


def line_of(name, text):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} "))


def test_table_shows_median_and_range_in_the_unit_of_the_metric():
    text = report.render(RECORD)
    cells = [cell.strip() for cell in line_of("ddp", text).split("|")]
    assert cells[2:4] == ["200 (100-300)", "1"]
    assert "tokens/s" in text and "peak rss [MiB]" in text and "memory [MiB]: 1,024" in text


def test_absent_row_keeps_its_reason():
    assert "absent: no environment" in line_of("deepspeed", report.render(RECORD))


@pytest.mark.parametrize(("name", "verdict"), [("fast", "pass"), ("slow", "MISS"), ("large", "MISS")])
def test_the_median_decides_a_check(name, verdict):
    assert line_of(name, report.render(RECORD)).split("|")[-2].strip() == verdict


def test_table_of_a_saved_record_is_that_of_the_run_and_can_be_plotted(tmp_path, capsys):
    report.save(RECORD, tmp_path / "made" / "record.json")
    report.main([str(tmp_path / "made" / "record.json"), "--plot", str(tmp_path / "plots" / "record.png")])
    assert capsys.readouterr().out == report.render(RECORD) + "\n"
    assert (tmp_path / "plots" / "record.png").read_bytes().startswith(b"\x89PNG")


def test_environment_can_be_written_as_json():
    facts = report.environment("cpu")
    assert facts["device"] == "CPU" and facts["cores"] >= 1 and json.dumps(facts)
