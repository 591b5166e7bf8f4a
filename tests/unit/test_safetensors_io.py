"""Our safetensors files against the library's, ranges against whole tensors, and what broken files get."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.engine.safetensors_io import (
    DTYPES,
    Entry,
    SafetensorsFile,
    SafetensorsFileError,
    SafetensorsWriter,
)


def write(path, tensors, metadata=None):
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)


def random_bits(dtype, *shape):
    """Every bit pattern, so that a cast on the way would show."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_library_reads_what_is_written_in_every_dtype(tmp_path):
    tensors = {f"a.{name}": random_bits(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 6).T}
    write(tmp_path / "ours", tensors, {"format": "pt"})
    read = safetensors.torch.load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {f"a.{name}": random_bits(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "theirs")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        file.read_into(name, out)
        assert same_bits(out, tensor)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_ranges_written_in_pieces_are_read_in_other_pieces(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ranges") / "file"
    numel = data.draw(st.integers(1, 200))
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=4))})
    values = torch.randn(numel)
    pieces = list(zip(cuts, cuts[1:], strict=False))
    with SafetensorsWriter(path, [Entry("w", torch.float32, (numel,)), Entry("b", torch.bool, (3,))]) as writer:
        writer.write("b", torch.tensor([True, False, True]))
        for start, stop in data.draw(st.permutations(pieces)):
            writer.write("w", values[start:stop], start)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    out = torch.full((stop - start,), torch.nan)
    SafetensorsFile(path).read_into("w", out, start)
    assert torch.equal(out, values[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_reading_casts_to_the_dtype_of_the_target(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("megalith.engine.safetensors_io._READ_BYTES", 64)  # several buffers
    values = torch.randn(13, 17, dtype=torch.bfloat16)
    write(tmp_path / "file", {"w": values})
    out = torch.empty(13, 17, dtype=dtype)
    SafetensorsFile(tmp_path / "file").read_into("w", out)
    assert torch.equal(out, values.to(dtype))


def test_reading_into_a_strided_target(tmp_path):
    values = torch.randn(5, 7)
    write(tmp_path / "file", {"w": values})
    out = torch.empty(7, 5).T
    SafetensorsFile(tmp_path / "file").read_into("w", out)
    assert torch.equal(out, values)


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.randn(100)})
    whole = path.read_bytes()
    for kept in (0, 7, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(SafetensorsFileError, match=str(path)):
            SafetensorsFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(SafetensorsFileError, match="truncated or corrupt"):
        SafetensorsFile(path)


def test_a_corrupt_header_is_an_error_that_names_the_tensor(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.randn(4), "v": torch.randn(4)})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for old, new, message in [
        (b'"F32"', b'"F99"', "corrupt"),
        (b'"shape":[4]', b'"shape":[5]', "w of torch.float32"),
        (b'"data_offsets":[16,32]', b'"data_offsets":[12,32]', "v of torch.float32"),
        (b'"data_offsets":[16,32]', b'"data_offsets":[ 0,16]', "v of torch.float32"),
        (b'{"w"', b'["w"', "corrupt"),
        (b'"dtype"', b'"dtypo"', "corrupt"),
    ]:
        assert old in whole
        broken = whole[8 : 8 + length].replace(old, new, 1)
        path.write_bytes(whole[:8] + broken + whole[8 + length :])
        with pytest.raises(SafetensorsFileError, match=message):
            SafetensorsFile(path)


def test_a_file_cut_after_it_was_opened_is_an_error_that_names_the_tensor(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.randn(100)})
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(SafetensorsFileError, match="w was read"):
        file.read_into("w", torch.empty(100))


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SafetensorsFileError, match="No such file"):
        SafetensorsFile(tmp_path / "absent")
    write(tmp_path / "file", {"w": torch.randn(4)})
    file = SafetensorsFile(tmp_path / "file")
    with pytest.raises(SafetensorsFileError, match="holds no tensor v"):
        file.read_into("v", torch.empty(4))
    with pytest.raises(SafetensorsFileError, match="w has 4 elements"):
        file.read_into("w", torch.empty(4), 1)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.ones(4)})
    old = path.read_bytes()
    entries = [Entry("w", torch.float32, (4,))]
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, entries) as writer:
        writer.write("w", torch.zeros(4))
        raise KeyboardInterrupt
    with (
        pytest.raises(SafetensorsFileError, match="never written: {'w': 1}"),
        SafetensorsWriter(path, entries) as writer,
    ):
        writer.write("w", torch.zeros(3))
    for tensor, offset in [(torch.zeros(4).half(), 0), (torch.zeros(3), 2), (torch.zeros(1), -1)]:
        with pytest.raises(SafetensorsFileError, match="w"), SafetensorsWriter(path, entries) as writer:
            writer.write("w", tensor, offset)
    with pytest.raises(SafetensorsFileError, match="v is not among"), SafetensorsWriter(path, entries) as writer:
        writer.write("v", torch.zeros(4))
    with pytest.raises(SafetensorsFileError, match="written before"), SafetensorsWriter(path, entries) as writer:
        writer.write("w", torch.zeros(4))
        writer.write("w", torch.zeros(1))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SafetensorsFileError, match="its disk has 1000"):
        SafetensorsWriter(tmp_path / "file", [Entry("w", torch.float32, (4000,))])
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_refuses_is_an_error_that_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a disk quota, as the kernel enforces it
        with pytest.raises(SafetensorsFileError, match="file of 16.* bytes: File too large"):
            write(tmp_path / "file", {"w": torch.randn(4000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_tensors_start_aligned_to_their_element_size(tmp_path):
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(2, dtype=torch.float64)}
    write(tmp_path / "file", tensors)
    file = SafetensorsFile(tmp_path / "file")
    assert all(stored.start_bytes % stored.dtype.itemsize == 0 for stored in file.tensors.values())
    header = (tmp_path / "file").read_bytes()[8:]
    assert list(json.JSONDecoder().raw_decode(header.decode("utf-8", "ignore"))[0]) == ["wide", "odd"]
