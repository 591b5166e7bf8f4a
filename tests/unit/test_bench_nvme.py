"""The NVMe benchmark: one small run, and its options."""

import json
import os

import pytest
from megalith.bench import nvme


def test_a_small_run_reports_every_mode_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "drive").mkdir()
    path = tmp_path / "record.json"
    argv = ["--folder", str(tmp_path / "drive"), "--bytes", "32MiB", "--rounds", "2", "--json", str(path)]
    assert nvme.main(argv) == 0
    record = json.loads(path.read_text())
    for row in record["rows"]:
        assert all(len(row["metrics"][f"{mode}_mb_per_s"]) == 2 for mode in nvme.MODES), row["name"]
    plain, own = (row["metrics"]["read_mb_per_s"] for row in record["rows"][:2])
    assert record["checks"][0]["values"] == [own[0] / plain[0], own[1] / plain[1]]
    assert os.listdir(tmp_path / "drive") == []


@pytest.mark.parametrize("argv", [["--bytes", "1MB"], ["--bytes", "many"], ["--rounds", "0"]])
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit):
        nvme.parse_args(argv)
    assert argv[0] in capsys.readouterr().err
