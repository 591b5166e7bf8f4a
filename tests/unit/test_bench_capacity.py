"""The capacity benchmark: the search, its ladder, what it counts as a model that fits, the limits, one real run."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from megalith.bench import capacity, memory_limit
from megalith.bench.capacity import Rung, largest
from megalith.bench.launch import RankError
from megalith.bench.memory_limit import MemoryLimit, parent_groups
from megalith.engine.cgroups import V1, V2, left_in, parse_groups

# The search


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_search_finds_the_last_that_fits_from_anywhere_with_few_tries(count):
    for capacity_index in range(-1, count):
        for start in range(count):
            tried = []

            def fits(index, tried=tried, capacity_index=capacity_index):
                assert index not in tried, "a size is tried once"
                tried.append(index)
                return index <= capacity_index

            assert largest(fits, count, start) == capacity_index
            assert len(tried) <= 2 * math.log2(abs(capacity_index - start) + 2) + 2
            assert capacity_index == count - 1 or capacity_index + 1 in tried, "the next one was seen not to fit"


def test_ladder_is_in_order_with_small_steps():
    rungs = capacity.ladder()
    sizes = [rung.numel for rung in rungs]
    assert sizes[0] < 10e6 and sizes[-1] > 175e9
    useful = [numel for numel in sizes if numel > 100e6]
    assert all(1.02 <= b / a <= 1.12 for a, b in zip(useful, useful[1:], strict=False))


def test_sizes_are_those_of_the_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    for rung in capacity.ladder()[:6]:
        assert sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**rung.fields)).parameters()) == rung.numel


def test_nearest_size():
    rungs = [Rung(numel, {}) for numel in (100, 200, 400)]
    assert [capacity.nearest(rungs, numel) for numel in (1, 150, 290, 10**9)] == [0, 1, 2, 2]


def test_search_begins_with_the_memory_that_the_model_has_to_fit_in(monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "free_bytes", lambda folder: 20e9)
    entries = {entry.name: entry for entry in capacity.ENTRIES}

    def first(name, **limits):
        args = argparse.Namespace(nvme_dir=tmp_path, **limits)
        return entries[name].first_guess(args)

    assert first("native-fp32", device="cpu", device_budget=None, limit=4e9) == 4e9 / 20
    assert first("native-fp32", device="cuda", device_budget=80e9, limit=120e9) == 80e9 / 20
    assert first("megalith-host", device="cuda", device_budget=80e9, limit=120e9) == 120e9 / 15
    assert first("megalith-nvme", device="cuda", device_budget=80e9, limit=120e9) == 1e9  # by the drive


# What counts


def reading(*losses):
    return {"metrics": {"tokens_per_s": 5.0}, "losses": list(losses)}


def run(monkeypatch, tmp_path, worker, argv):
    """main, with `worker(options)` in place of the process: it returns a reading or raises."""

    def run_ranks(command, world_size, **keywords):
        options, result = command[-2:]
        Path(result).write_text(json.dumps(worker(json.loads(options))))

    monkeypatch.setattr(capacity, "run_ranks", run_ranks)
    path = tmp_path / "record.json"
    status = capacity.main([*argv, "--nvme_dir", str(tmp_path), "--json", str(path)])
    return status, json.loads(path.read_text())


def numel_of(options):
    return next(rung.numel for rung in capacity.ladder() if rung.fields == options["model"])


def test_record_has_the_largest_size_and_the_bar(monkeypatch, tmp_path, capsys):
    limits = {"native": 160e6, "megalith": 1.7e9}

    def worker(options):
        if numel_of(options) > limits[options["peer"]]:
            raise RankError("rank 0 exited with 3:\nout of memory", capacity.OUT_OF_MEMORY)
        return reading(10.0, 9.0, 8.0)

    status, record = run(monkeypatch, tmp_path, worker, ["--only", "native-fp32", "megalith-nvme"])
    native, nvme = record["rows"]
    assert status == 0
    assert native["metrics"]["model_numel"][0] == 155_466_752 and nvme["metrics"]["model_numel"][0] < 1.7e9
    assert "losses 10.0000 9.0000 8.0000" in native["note"] and "168 M: out of memory" in native["note"]
    assert record["checks"][0]["values"] == [nvme["metrics"]["model_numel"][0] / 155_466_752]
    assert record["checks"][0]["at_least"] == 10.3


def test_a_search_that_ends_early_says_so(monkeypatch, tmp_path, capsys):
    argv = ["--only", "native-fp32", "--most", "20e6"]
    status, record = run(monkeypatch, tmp_path, lambda _: reading(10.0, 9.0, 8.0), argv)
    assert status == 0 and record["rows"][0]["note"].endswith("larger ones were not tried")
    assert 18e6 < record["rows"][0]["metrics"]["model_numel"][0] <= 20e6


@pytest.mark.parametrize("losses", [(10.0, 9.0, 9.5), (10.0, 10.0, 9.0), (10.0, float("nan"), 9.0)])
def test_a_size_whose_losses_do_not_fall_is_a_failure_of_the_row(monkeypatch, tmp_path, losses, capsys):
    status, record = run(monkeypatch, tmp_path, lambda _: reading(*losses), ["--only", "native-fp32", "--size", "8e6"])
    assert status == 1 and record["rows"][0]["note"].startswith("FAILED: at ") and record["checks"] == []


def test_an_error_that_is_not_of_memory_says_nothing_of_capacity(monkeypatch, tmp_path, capsys):
    def worker(options):
        raise RankError("rank 0 exited with 1:\nTypeError: out of luck", 1)

    status, record = run(monkeypatch, tmp_path, worker, ["--only", "native-fp32"])
    assert status == 1 and "TypeError: out of luck" in record["rows"][0]["note"] and not record["rows"][0]["metrics"]


def test_verify_compares_with_a_run_without_the_limit(monkeypatch, tmp_path, capsys):
    losses = iter([(10.0, 9.0, 8.0), (10.0, 9.0, 8.5)])
    argv = ["--only", "megalith-host", "--size", "8e6", "--verify"]
    status, record = run(monkeypatch, tmp_path, lambda _: reading(*next(losses)), argv)
    assert status == 1 and "without the limit" in record["rows"][0]["note"]
    status, record = run(monkeypatch, tmp_path, lambda _: reading(10.0, 9.0, 8.0), argv)
    assert status == 0 and "the same without the limit" in record["rows"][0]["note"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--limit", "lots"], "--limit='lots'"),
        (["--limit", "0"], "--limit"),
        (["--device_budget", "24GB"], "--device_budget is for --device cuda"),
        (["--size", "-1"], "--size"),
        (["--most", "1e3"], "the smallest model has 8"),
        (["--nvme_dir", "/no/such/folder"], "no such folder"),
        (["--only", "native-fp64"], "native-fp32"),
        (["--seq_len", "0"], "--seq_len is 0"),
    ],
)
def test_wrong_options(argv, told, capsys):
    with pytest.raises(SystemExit):
        capacity.parse_args(argv)
    assert told in capsys.readouterr().err


# Limits

MOUNTS = """\
23 28 0:21 / /proc rw - proc proc rw
31 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
32 25 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
"""
MOUNTS_2 = "30 25 0:25 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_groups_of_version_1_are_made_below_our_own():
    own = list(parse_groups("4:memory:/job/7\n3:cpu:/\n0::/\n", MOUNTS))
    assert list(parent_groups(own)) == [(Path("/sys/fs/cgroup/memory/job/7"), V1)]


@pytest.mark.parametrize(("root", "path"), [("/", "/user/app/run"), ("/docker/5", "/docker/5/user/app/run")])
def test_groups_of_version_2_are_made_below_our_own_or_beside_it(root, path):
    groups = list(parent_groups(list(parse_groups(f"0::{path}\n", MOUNTS_2.format(root=root)))))
    own = Path("/sys/fs/cgroup/user/app/run")
    assert groups == [(own, V2), (own.parent, V2)]


def test_at_the_root_of_version_2_there_is_nothing_above():
    own = list(parse_groups("0::/\n", MOUNTS_2.format(root="/")))
    assert list(parent_groups(own)) == [(Path("/sys/fs/cgroup"), V2)]


@pytest.mark.parametrize("files", [V1, V2])
def test_what_a_group_leaves(tmp_path, files):
    (tmp_path / files.limit).write_text("1000\n")
    (tmp_path / files.usage).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 500\n{files.file_pages[0]} 40\n{files.file_pages[1]} 2\n")
    assert left_in(tmp_path, files) == 342
    (tmp_path / files.limit).write_text("max\n")
    assert left_in(tmp_path, files) is None
    assert left_in(tmp_path / "none", files) is None


LEFT = "from megalith.engine.cgroups import available_bytes; print(available_bytes())"


def test_a_process_sees_the_limit_that_it_runs_under():
    with memory_limit.memory_limit(400_000_000) as limit:
        if limit.group is None:
            pytest.skip("no control group can be made here")
        told = subprocess.run(limit.command([sys.executable, "-c", LEFT]), capture_output=True, text=True)
        assert 0 < int(told.stdout) < 400_000_000, told.stderr


GREEDY = "import sys; print(len(bytearray(int(sys.argv[1]))))"


def spend(limit, nbytes):
    return subprocess.run(limit.command([sys.executable, "-c", GREEDY, str(nbytes)]), capture_output=True, text=True)


def test_a_group_kills_past_its_limit_and_is_gone_afterwards():
    with memory_limit.memory_limit(100_000_000) as limit:
        if limit.group is None:
            pytest.skip("no control group can be made here")
        assert spend(limit, 50_000_000).stdout.strip() == "50000000"
        assert not limit.killed() and 50_000_000 < limit.peak_bytes() <= 100_000_000
        assert spend(limit, 200_000_000).returncode == -9 and limit.killed()
    assert not limit.group.exists()


def test_a_resource_limit_makes_allocations_fail():
    limit = MemoryLimit("RLIMIT_DATA", 100_000_000)
    assert spend(limit, 50_000_000).stdout.strip() == "50000000"
    ended = spend(limit, 200_000_000)
    assert ended.returncode == 1 and "MemoryError" in ended.stderr
    assert limit.peak_bytes() is None and not limit.killed()


def test_without_groups_the_resource_limit_is_taken(monkeypatch):
    monkeypatch.setattr(memory_limit, "parent_groups", lambda own: iter(()))
    with memory_limit.memory_limit(10**8) as limit:
        assert limit.kind == "RLIMIT_DATA" and limit.command(["x"])[-2:] == [str(10**8 // 1024), "x"]
    with memory_limit.memory_limit(10**8, or_mapped=False) as limit:
        assert limit.kind == "none"
    with memory_limit.memory_limit(None) as limit:
        assert limit.kind == "none" and limit.command(["x"]) == ["x"]


# One real run


def test_run_on_a_tiny_model_under_a_small_limit(tmp_path, capsys):
    argv = ["--limit", "900MB", "--size", "8e6", "--seq_len", "16", "--only", "native-fp32", "megalith-host"]
    path, plot = tmp_path / "record.json", tmp_path / "record.png"
    argv += ["--nvme_dir", str(tmp_path), "--json", str(path), "--plot", str(plot), "--timeout_s", "120"]
    assert capacity.main(argv) == 0, capsys.readouterr().out
    record = json.loads(path.read_text())
    assert plot.stat().st_size > 1000
    for row in record["rows"]:
        assert row["metrics"]["model_numel"] == [capacity.ladder()[0].numel], row
        assert row["metrics"]["peak_rss_bytes"][0] > 2**26 and row["note"].startswith("losses 10.")
    assert record["rows"][1]["metrics"]["host_bytes"][0] >= 8e6 * 12


def test_run_that_does_not_fit(tmp_path, capsys):
    argv = ["--limit", "300MB", "--size", "58e6", "--only", "native-fp32", "--nvme_dir", str(tmp_path)]
    assert capacity.main([*argv, "--json", str(tmp_path / "record.json")]) == 0, capsys.readouterr().out
    row = json.loads((tmp_path / "record.json").read_text())["rows"][0]
    assert row["note"].startswith("nothing fits; 58") and row["metrics"] == {}
