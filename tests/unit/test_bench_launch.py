"""Ranks as fresh processes: the variables that they get, and that none outlives a failure."""

import os
import sys
import time

import pytest
from megalith.bench.launch import RankError, run_ranks


def python(code):
    return [sys.executable, "-c", code]


def test_ranks_get_the_variables_of_torchrun(tmp_path):
    code = (
        "import os, pathlib; e = os.environ; pathlib.Path(e['OUT'], e['RANK']).write_text("
        "' '.join([e['LOCAL_RANK'], e['WORLD_SIZE'], e['MASTER_ADDR'], e['MASTER_PORT']]))"
    )
    run_ranks(python(code), 2, timeout_s=30, env={"OUT": str(tmp_path)})
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first[:2] == ["0", "2"] and second[:2] == ["1", "2"] and first[2:] == second[2:]


def test_a_failing_rank_is_named_with_its_last_words_and_the_others_are_killed():
    code = "import os, sys, time; sys.exit('out of luck') if os.environ['RANK'] == '1' else time.sleep(60)"
    start_s = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 exited with 1.*out of luck"):
        run_ranks(python(code), 2, timeout_s=50)
    assert time.monotonic() - start_s < 40


def test_a_rank_that_hangs_is_killed_with_its_children(tmp_path):
    code = (
        "import os, pathlib, subprocess, time; child = subprocess.Popen(['sleep', '60']);"
        "pathlib.Path(os.environ['OUT'], 'child').write_text(str(child.pid));"
        "print('waiting', flush=True); time.sleep(60)"
    )
    with pytest.raises(RankError, match=r"(?s)still running after 2 s.*waiting"):
        run_ranks(python(code), 1, timeout_s=2, env={"OUT": str(tmp_path)})
    child = int((tmp_path / "child").read_text())
    deadline_s = time.monotonic() + 10  # the signal is sent when run_ranks returns, and it reaches the child soon after
    while running(child):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def running(pid):
    """A killed child may stay as a zombie until init has reaped it."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
