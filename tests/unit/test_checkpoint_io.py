"""Checkpoints of pieces: any layout to any layout, what a kill leaves, and what a wrong folder gets."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.engine.checkpoint import CheckpointError, Piece, read_checkpoint, write_checkpoint
from megalith.engine.rng_state import capture_rng_state, restore_rng_state
from megalith.engine.safetensors_io import SafetensorsFile

SHAPES = {"layer.weight": (7, 9), "layer.bias": (9,), "scale": ()}
PAYLOADS = ("master", "exp_avg")


def values_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        (payload, fqn): torch.randn(torch.Size(shape).numel(), generator=generator)
        for payload in PAYLOADS
        for fqn, shape in SHAPES.items()
    }


def cut_up(values, world_size, seed=0):
    """Every rank's pieces of `values`: {Piece: producer} a rank, cut at random."""
    cut = random.Random(seed)
    ranks = [{} for _ in range(world_size)]
    for (payload, fqn), flat in values.items():
        cuts = sorted({0, flat.numel(), *(cut.randint(0, flat.numel()) for _ in range(2 * world_size))})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            piece = Piece(payload, fqn, start, stop - start, flat.dtype)
            cut.choice(ranks)[piece] = lambda part=flat[start:stop]: part
    return ranks


class ThreadBarrier:
    """Ranks that are threads: waits for all, raises on each what any brought."""

    def __init__(self, world_size):
        self._barrier = threading.Barrier(world_size)
        self._errors = []

    def __call__(self, error):
        if error is not None:
            self._errors.append(error)
        self._barrier.wait(timeout=30)
        failed = bool(self._errors)
        self._barrier.wait(timeout=30)
        if failed:
            raise RuntimeError(f"a rank failed: {self._errors[0]}")


def save(folder, values, world_size=1, state=None, rank_states=None):
    """Every rank's outcome: None or what it raised."""
    barrier, outcomes = ThreadBarrier(world_size), [None] * world_size
    pieces = cut_up(values, world_size)

    def run(rank):
        try:
            write_checkpoint(
                folder,
                pieces[rank],
                shapes=SHAPES,
                state=state,
                rank_state=(rank_states or [None] * world_size)[rank],
                rank=rank,
                world_size=world_size,
                barrier=barrier,
            )
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def assert_holds(checkpoint, values):
    for (payload, fqn), flat in values.items():
        out = torch.full_like(flat, torch.nan)
        checkpoint.fill(payload, fqn, 0, out)
        assert torch.equal(out, flat), (payload, fqn)


@settings(max_examples=25, deadline=None)
@given(world_size=st.integers(1, 4), reading=st.integers(1, 5), seed=st.integers(0, 1000))
def test_any_layout_loads_into_any_other(tmp_path_factory, world_size, reading, seed):
    folder = tmp_path_factory.mktemp("checkpoint") / "step-1"
    values = values_of(seed)
    assert save(folder, values, world_size) == [None] * world_size
    checkpoint = read_checkpoint(folder)
    assert checkpoint.world_size == world_size and checkpoint.shapes == SHAPES
    for pieces in cut_up(values, reading, seed + 1):
        for piece, produce in pieces.items():
            out = torch.full((piece.numel,), torch.nan)
            checkpoint.fill(piece.payload, piece.fqn, piece.offset_numel, out)
            assert torch.equal(out, produce())


def test_filling_reads_only_the_ranges_that_are_asked_for(tmp_path, monkeypatch):
    values = torch.arange(100.0)
    pieces = {
        Piece("weight", "w", start, 50, torch.float32): lambda start=start: values[start:][:50] for start in (0, 50)
    }
    write_checkpoint(tmp_path / "step", pieces, shapes={"w": (100,)}, state=None, rank_state=None)
    checkpoint = read_checkpoint(tmp_path / "step")
    reads = []
    read_exactly = SafetensorsFile._read_exactly

    def counted(self, file, data, name):
        reads.append((name, len(data)))
        read_exactly(self, file, data, name)

    monkeypatch.setattr(SafetensorsFile, "_read_exactly", counted)
    out = torch.empty(7)
    checkpoint.fill("weight", "w", 45, out)
    assert torch.equal(out, values[45:52])
    assert reads == [("weight/w/0", 5 * 4), ("weight/w/50", 2 * 4)]


def test_filling_casts(tmp_path):
    values = values_of(0)
    save(tmp_path / "step", values, 2)
    for dtype in (torch.bfloat16, torch.float64):
        out = torch.empty(40, dtype=dtype)
        read_checkpoint(tmp_path / "step").fill("master", "layer.weight", 11, out)
        assert torch.equal(out, values["master", "layer.weight"][11:51].to(dtype))


def test_values_are_produced_one_at_a_time(tmp_path):
    held = []

    def produce(piece):
        held.append(piece)
        assert len(held) == 1  # the one before was let go
        array = numpy.zeros(piece.numel, numpy.float32)  # which every tensor of this memory keeps alive
        weakref.finalize(array, held.pop)
        return torch.from_numpy(array)

    pieces = {Piece("master", fqn, 0, torch.Size(s).numel(), torch.float32): None for fqn, s in SHAPES.items()}
    pieces = {piece: lambda piece=piece: produce(piece) for piece in pieces}
    write_checkpoint(tmp_path / "step", pieces, shapes=SHAPES, state=None, rank_state=None)
    assert not held


def test_nested_state_comes_back_as_it_was(tmp_path):
    shared = {
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "fused": None}],
        "step": torch.tensor(7.0),
        "scale": 2.0**16,
        "by_index": {0: "a", (1, "b"): [True, False]},
        "$odd": {"$tensor": "no tensor"},
        "infinite": [float("inf"), 10**30],
        "ordered": OrderedDict(z=1, a=2),
    }
    own = [
        {"half": torch.randn(3, 2).bfloat16().T, "ids": numpy.arange(6).reshape(2, 3), "best": numpy.float32(0.1)},
        {"empty": torch.empty(0), "flag": torch.tensor(True), "bytes": numpy.zeros((), numpy.uint8)},
    ]
    save(tmp_path / "step", values_of(0), 2, shared, own)
    checkpoint = read_checkpoint(tmp_path / "step")
    assert_same(checkpoint.state, {**shared, "ordered": dict(shared["ordered"])})
    for rank in range(2):
        assert_same(checkpoint.rank_state(rank), own[rank])
    with pytest.raises(CheckpointError, match="saved by 2 ranks and has no state of rank 2"):
        checkpoint.rank_state(2)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, numpy.ndarray | numpy.generic):
        assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("value", [object(), {1, 2}, b"raw", lambda: 0, numpy.array(["text"])])
def test_a_value_that_cannot_be_saved_is_named_with_its_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['callbacks'\]\[1\] is an? "):
        write_checkpoint(tmp_path / "step", {}, shapes={}, state=None, rank_state={"callbacks": [1, value]})
    assert os.listdir(tmp_path) == []


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(3).tolist()

    draw()
    write_checkpoint(tmp_path / "step", {}, shapes={}, state=None, rank_state=capture_rng_state())
    expected = draw()
    restore_rng_state(read_checkpoint(tmp_path / "step").rank_state(0))
    assert draw() == expected


def test_a_new_save_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    for seed, world_size in [(0, 3), (1, 1), (2, 2)]:
        save(tmp_path / "last", values_of(seed), world_size, state=seed)
        assert read_checkpoint(tmp_path / "last").state == seed
        assert_holds(read_checkpoint(tmp_path / "last"), values_of(seed))
    assert os.listdir(tmp_path) == ["last"]
    assert sorted(os.listdir(tmp_path / "last")) == [
        "index.json",
        *(f"rank-0000{r}-of-00002.safetensors" for r in (0, 1)),
    ]


def test_a_rank_that_fails_is_an_error_on_every_rank_and_keeps_the_old_checkpoint(tmp_path):
    values = values_of(0)
    save(tmp_path / "last", values, 2)
    outcomes = save(tmp_path / "last", values_of(1), 2, rank_states=[None, object()])
    assert all("a rank failed: state is a builtins.object" in str(outcome) for outcome in outcomes)
    assert_holds(read_checkpoint(tmp_path / "last"), values)
    assert os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("change", ["gap", "overlap", "short", "dtype"])
def test_pieces_that_do_not_cover_a_parameter_are_an_error_at_the_save(tmp_path, change):
    pieces = {"gap": [(0, 3), (4, 5)], "overlap": [(0, 5), (4, 4)], "short": [(0, 8)], "dtype": [(0, 4), (4, 5)]}[
        change
    ]
    dtypes = [torch.float32, torch.float64 if change == "dtype" else torch.float32]
    producers = {
        Piece("weight", "w", start, numel, dtype): lambda numel=numel, dtype=dtype: torch.zeros(numel, dtype=dtype)
        for (start, numel), dtype in zip(pieces, dtypes, strict=False)
    }
    with pytest.raises(CheckpointError, match="weight of w"):
        write_checkpoint(tmp_path / "step", producers, shapes={"w": (3, 3)}, state=None, rank_state=None)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_another_model_is_one_error_with_all_differences(tmp_path):
    save(tmp_path / "step", values_of(0))
    checkpoint = read_checkpoint(tmp_path / "step")
    checkpoint.check(SHAPES)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.check({"layer.weight": (9, 7), "layer.bias": (9,), "head": (2,)})
    for part in [
        "not in the checkpoint: head [2]",
        "not in the model: scale []",
        "layer.weight [7, 9], the model has [9, 7]",
    ]:
        assert part in str(raised.value)
    for payload, fqn, offset, out in [
        ("exp_avg_sq", "scale", 0, torch.empty(1)),
        ("master", "head", 0, torch.empty(1)),
        ("master", "scale", 0, torch.empty(2)),
        ("master", "scale", -1, torch.empty(1)),
        ("master", "layer.bias", 0, torch.empty(3, 3)),
    ]:
        with pytest.raises(CheckpointError, match=f"{payload} of {fqn}"):
            checkpoint.fill(payload, fqn, offset, out)
    assert checkpoint.holds("master", "scale") and not checkpoint.holds("exp_avg_sq", "scale")


def test_a_folder_that_is_no_complete_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint .*step"):
        read_checkpoint(tmp_path / "step")
    save(tmp_path / "step", values_of(0), 2)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "step", whole)
    data = tmp_path / "step" / "rank-00001-of-00002.safetensors"
    index = tmp_path / "step" / "index.json"

    def restore():
        shutil.rmtree(tmp_path / "step")
        shutil.copytree(whole, tmp_path / "step")

    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{data} is missing, truncated or corrupt"):
        read_checkpoint(tmp_path / "step")
    data.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "step")
    restore()
    index.write_text(index.read_text()[:-10])
    with pytest.raises(CheckpointError, match="index.json cannot be used"):
        read_checkpoint(tmp_path / "step")
    index.write_text(json.dumps({"format": "another", "version": 9}))
    with pytest.raises(CheckpointError, match="another 9"):
        read_checkpoint(tmp_path / "step")
    index.unlink()
    with pytest.raises(CheckpointError, match="has no index.json"):
        read_checkpoint(tmp_path / "step")


def test_a_changed_byte_is_found_when_it_is_read(tmp_path):
    save(tmp_path / "step", values_of(0), state={"step": torch.tensor(3)})
    path = tmp_path / "step" / "rank-00000-of-00001.safetensors"
    whole = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for position in range(header_bytes, len(whole), 37):
        broken = whole.copy()
        broken[position] ^= 1
        path.write_bytes(broken)
        checkpoint = read_checkpoint(tmp_path / "step")
        with pytest.raises(CheckpointError, match="does not have the checksum"):
            assert_holds(checkpoint, values_of(0))
            assert checkpoint.state


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("dear diary")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        write_checkpoint(tmp_path / "notes", {}, shapes={}, state=None, rank_state=None)
    assert (tmp_path / "notes" / "diary").read_text() == "dear diary"
    assert os.listdir(tmp_path) == ["notes"]


@pytest.mark.parametrize("moves_done", [0, 1])
def test_a_save_killed_between_its_two_moves_is_found_and_finished(tmp_path, monkeypatch, moves_done):
    save(tmp_path / "last", values_of(0), state=0)
    left = [moves_done]
    replace = os.replace

    def replace_until_killed(source, destination):
        if os.path.isdir(source):
            if not left[0]:
                raise SystemExit  # no Exception: nothing is cleaned up, as after a kill
            left[0] -= 1
        replace(source, destination)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", replace_until_killed)
        write_checkpoint(tmp_path / "last", cut_up(values_of(1), 1)[0], shapes=SHAPES, state=1, rank_state=None)
    assert (tmp_path / "last").exists() == (moves_done == 0)
    assert_holds(read_checkpoint(tmp_path / "last"), values_of(moves_done))
    assert read_checkpoint(tmp_path / "last").state == moves_done
    with pytest.raises(TypeError):  # the next save fails too
        write_checkpoint(tmp_path / "last", {}, shapes={}, state=object(), rank_state=None)
    assert read_checkpoint(tmp_path / "last").state == moves_done and os.listdir(tmp_path) == ["last"]
    save(tmp_path / "last", values_of(2), state=2)
    assert read_checkpoint(tmp_path / "last").state == 2 and os.listdir(tmp_path) == ["last"]


# Forks savers that are killed, in a process that has no other thread: torch is imported once.
KILLED_SAVES = """
import os, random, signal, sys, time
import torch
from megalith.engine.checkpoint import Piece, read_checkpoint, write_checkpoint

folder, kills = sys.argv[1], int(sys.argv[2])
shapes = {f"layer.{i}": (64,) for i in range(8)}

def save_forever(step, pipe):
    while True:
        step += 1
        pieces = {
            Piece("master", fqn, 0, 64, torch.float32): lambda: torch.full((64,), float(step)) for fqn in shapes
        }
        write_checkpoint(folder, pieces, shapes=shapes, state={"step": step}, rank_state=None)
        os.write(pipe, step.to_bytes(4, "little"))

chance, step, seen = random.Random(0), 0, 0
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(step, writer)
    os.close(writer)
    ended = int.from_bytes(os.read(reader, 4), "little")  # the first save of this child
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(reader, 4):
        ended = int.from_bytes(data, "little")
    os.close(reader)
    checkpoint = read_checkpoint(folder)
    step = checkpoint.state["step"]
    assert ended <= step <= ended + 1, (ended, step)
    for fqn in shapes:
        out = torch.empty(64)
        checkpoint.fill("master", fqn, 0, out)
        assert (out == step).all(), (fqn, step, out)
    left = [name for name in os.listdir(os.path.dirname(folder)) if name != os.path.basename(folder)]
    seen += bool(left)
write_checkpoint(folder, {}, shapes={}, state=None, rank_state=None)
assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
print(f"{kills} kills, {seen} in the middle of a save")
"""


def test_after_kill_minus_nine_the_last_complete_checkpoint_loads(tmp_path):
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path / "last"), "20"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    kills, in_the_middle = (int(word) for word in ended.stdout.split() if word.isdigit())
    assert kills == 20 and in_the_middle > 0
