"""The NVMe store: what is written is read, whatever the sizes, offsets and delays; faults are told; nothing is left."""

import errno
import os
import subprocess
import sys
import threading
import time
import warnings
from functools import partial

import pytest
import torch
from megalith.engine.direct_io import ALIGNMENT, DirectFile, aligned_empty, filesystem_type
from megalith.engine.job_folder import LOCK_NAME, PREFIX
from megalith.engine.lanes import random_delay
from megalith.engine.nvme import CHECKSUM_BYTES, NvmeError, NvmeStore, Piece, cut
from megalith.engine.thread_pool import ThreadPool

SIZES = {"one": 1, "odd": 3 * ALIGNMENT + 17, "even": 8 * ALIGNMENT, "long": 5 * CHECKSUM_BYTES + 4, "none": 0}
RING_BYTES = 2 * CHECKSUM_BYTES  # two threads, one checksummed block each: "long" takes six pieces


@pytest.fixture
def make_store(tmp_path):
    stores = []

    def make(sizes=SIZES, **options):
        stores.append(NvmeStore(tmp_path, 0, sizes, **{"ring_bytes": RING_BYTES, "threads": 2} | options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
    assert os.listdir(tmp_path) == []


def noise(nbytes, seed=0):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(values):
    result = aligned_empty(values.numel())
    result.copy_(values)
    return result


def read(store, name, nbytes, offset_bytes=0):
    out = torch.full((nbytes,), 0xAA, dtype=torch.uint8)
    store.read(name, out, offset_bytes).wait()
    return out


# Pieces


def test_pieces_cover_the_wanted_bytes_and_whole_blocks():
    assert cut(0, 20, 20, 8, 16) == [Piece(0, 16, 0, 16), Piece(16, 20, 16, 24)]
    assert cut(5, 35, 100, 8, 16) == [Piece(5, 16, 0, 16), Piece(16, 32, 16, 32), Piece(32, 35, 32, 40)]
    assert cut(7, 7, 20, 8, 16) == []


def test_the_last_block_of_a_buffer_ends_with_its_region():
    large = 4 * ALIGNMENT  # a checksummed block, of which the buffer's end has a part
    assert cut(large, large + 5, large + 5, large, large) == [Piece(large, large + 5, large, large + ALIGNMENT)]


# Round trips


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("place", [torch.clone, aligned], ids=["anywhere", "aligned"])
def test_whole_buffers_come_back(make_store, checksums, place):
    store = make_store(checksums=checksums)
    values = {name: place(noise(nbytes, seed)) for seed, (name, nbytes) in enumerate(SIZES.items())}
    for handle in [store.write(name, value) for name, value in values.items()]:
        handle.wait()
    outs = {name: aligned_empty(value.numel()) if place is aligned else value * 0 for name, value in values.items()}
    for handle in [store.read(name, out) for name, out in outs.items()]:
        handle.wait()
    for name, value in values.items():
        assert torch.equal(outs[name], value), name


@pytest.mark.parametrize("checksums", [False, True])
def test_random_ranges_agree_with_a_copy_in_memory_under_random_delays(make_store, checksums):
    """Nobody waits for a write before the next one or a read of the same bytes: the store keeps their order."""
    store = make_store(checksums=checksums, lane_delay=random_delay(3, 0.002), threads=2)
    mirror = {name: torch.zeros(nbytes, dtype=torch.uint8) for name, nbytes in SIZES.items()}
    generator = torch.Generator().manual_seed(0)
    reads, handles = [], []
    for number in range(60):
        name = list(SIZES)[int(torch.randint(4, (1,), generator=generator))]
        start, stop = sorted(torch.randint(SIZES[name] + 1, (2,), generator=generator).tolist())
        if number % 3:
            values = noise(stop - start, number)
            mirror[name][start:stop] = values
            handles.append(store.write(name, values, start))
        else:
            out = torch.empty(stop - start, dtype=torch.uint8)
            reads.append((out, mirror[name][start:stop].clone(), store.read(name, out, start)))
    for handle in handles:
        handle.wait()
    for out, expected, handle in reads:
        handle.wait()
        assert torch.equal(out, expected)
    for name, expected in mirror.items():
        assert torch.equal(read(store, name, SIZES[name]), expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int16, torch.bool])
def test_tensors_of_any_dtype_and_shape(make_store, dtype):
    store = make_store()
    values = torch.randn(7, 11).to(dtype)
    store.write("even", values, 6).wait()
    out = torch.empty_like(values)
    store.read("even", out, 6).wait()
    assert torch.equal(out, values)


def test_what_was_never_written_reads_as_zeros(make_store):
    store = make_store(checksums=True)
    store.write("long", noise(10), CHECKSUM_BYTES + 5).wait()
    out = read(store, "long", SIZES["long"])
    assert torch.equal(out[CHECKSUM_BYTES + 5 :][:10], noise(10))
    out[CHECKSUM_BYTES + 5 :][:10] = 0
    assert not out.any() and not read(store, "even", SIZES["even"]).any()


def test_aligned_memory_is_not_copied(make_store):
    store = make_store()
    parts = [store._ring.get() for _ in range(2)]
    for part in parts:
        part[:] = 7
        store._ring.put(part)
    store.write("even", aligned(noise(SIZES["even"]))).wait()
    store.read("even", aligned_empty(SIZES["even"])).wait()
    assert all((part == 7).all() for part in parts)
    store.read("even", torch.empty(SIZES["even"], dtype=torch.uint8)[1:]).wait()
    assert any((part != 7).any() for part in parts)


def test_bytes_are_counted_in_whole_blocks(make_store):
    store = make_store()
    store.write("odd", noise(SIZES["odd"])).wait()
    assert (store.bytes_read, store.bytes_written) == (0, 4 * ALIGNMENT)
    store.write("odd", noise(2), ALIGNMENT - 1).wait()  # parts of two blocks, whose rest is read first
    assert (store.bytes_read, store.bytes_written) == (2 * ALIGNMENT, 6 * ALIGNMENT)


def test_buffers_are_in_flight_together(make_store):
    """Four delays of 0.3 s on two threads, with reads among the writes."""
    store = make_store(lane_delay=lambda: 0.3)
    start_s = time.monotonic()
    handles = [store.write("one", noise(1)), store.read("odd", torch.empty(5)), store.write("even", noise(9))]
    handles.append(store.read("long", torch.empty(5)))
    assert time.monotonic() - start_s < 0.2 and not handles[0].done()
    for handle in handles:
        handle.wait()
    assert time.monotonic() - start_s < 1.1


# Misuse


@pytest.mark.parametrize(
    ("name", "tensor", "offset_bytes", "error", "told"),
    [
        ("two", torch.empty(1), 0, KeyError, "no buffer 'two'"),
        ("odd", torch.empty(5), SIZES["odd"] - 19, ValueError, "20 at offset 12286 are out of it"),
        ("odd", torch.empty(5), -1, ValueError, "out of it"),
        ("even", torch.empty(4, 4).T, 0, ValueError, "contiguous"),
        ("even", torch.empty(4, device="meta"), 0, ValueError, "on meta"),
    ],
)
def test_misuse_is_told(make_store, name, tensor, offset_bytes, error, told):
    with pytest.raises(error, match=told):
        make_store().read(name, tensor, offset_bytes)


def test_a_closed_store_says_so(make_store):
    store = make_store()
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed.*'one'"):
        store.write("one", noise(1))


def test_a_ring_too_small_for_its_threads(tmp_path):
    with pytest.raises(ValueError, match="need at least 32768"):
        NvmeStore(tmp_path, 0, SIZES, ring_bytes=4096)


# Faults


class FaultyFile(DirectFile):
    """`fault` is what the next calls do in place of the transfer: an errno, or a count of bytes to move at most."""

    fault = None

    def pread(self, buffer, offset):
        return self._limited(super().pread, buffer, offset)

    def pwrite(self, buffer, offset):
        return self._limited(super().pwrite, buffer, offset)

    def _limited(self, call, buffer, offset):
        if isinstance(self.fault, int) and self.fault >= 0:
            return call(buffer[: self.fault], offset) if self.fault else 0
        if self.fault is not None:
            raise OSError(-self.fault, os.strerror(-self.fault))
        return call(buffer, offset)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (-errno.EIO, "Input/output error"),
        (-errno.ENOSPC, "No space left"),
        (0, "short (read|write): 0 of 32768 bytes"),
    ],
)
@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_fault_names_buffer_bytes_and_file_and_the_store_goes_on(make_store, verb, fault, told):
    store = make_store(open_file=FaultyFile)
    store.write("even", noise(SIZES["even"])).wait()
    store._file.fault = fault
    handle = getattr(store, verb)("even", aligned_empty(SIZES["even"]))
    with pytest.raises(
        NvmeError, match=rf"{verb} of 'even', bytes 0 to 32768, in .*rank0.*: .*{told}".format(verb=verb)
    ):
        handle.wait()
    store._file.fault = None
    store.write("even", noise(SIZES["even"], 1)).wait()
    assert torch.equal(read(store, "even", SIZES["even"]), noise(SIZES["even"], 1))


def test_a_call_that_moves_less_is_gone_on_with(make_store):
    store = make_store(open_file=FaultyFile)
    store._file.fault = ALIGNMENT
    store.write("even", noise(SIZES["even"])).wait()
    assert torch.equal(read(store, "even", SIZES["even"]), noise(SIZES["even"]))


def test_direct_io_cannot_go_on_within_a_block(make_store):
    store = make_store(open_file=FaultyFile)
    if not store.direct:
        pytest.skip("this file system has no direct I/O")
    blocks = aligned_empty(2 * ALIGNMENT).numpy()
    with pytest.raises(OSError, match="short read: 100 of 8192 bytes at offset 0"):
        store._file._transfer(lambda buffer, offset: 100, blocks, 0, "read")


def test_a_failed_transfer_does_not_hold_up_the_next_one_on_its_bytes(make_store):
    store = make_store(open_file=FaultyFile, lane_delay=lambda: 0.05)
    store._file.fault = -errno.EIO
    failing = store.write("even", noise(SIZES["even"]))
    time.sleep(0.2)
    store._file.fault = None
    store.write("even", noise(SIZES["even"], 1)).wait()
    with pytest.raises(NvmeError, match="Input/output"):
        failing.wait()


def test_truncated_file(make_store):
    store = make_store()
    os.truncate(store.path, ALIGNMENT)
    with pytest.raises(NvmeError, match=r"'long'.*truncated from \d+ to 4096 bytes"):
        read(store, "long", 10)


def test_deleted_file(make_store):
    store = make_store()
    os.unlink(store.path)
    with pytest.raises(NvmeError, match="'one'.*deleted while it was in use"):
        store.write("one", noise(1)).wait()


def test_corruption_is_found_with_checksums(make_store):
    store = make_store(checksums=True)
    store.write("long", noise(SIZES["long"])).wait()
    with open(store.path, "r+b", buffering=0) as file:
        at = store._offsets["long"] + 2 * CHECKSUM_BYTES + 77
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))
        os.fsync(file.fileno())
    read(store, "long", CHECKSUM_BYTES)  # another block
    with pytest.raises(
        NvmeError, match=rf"'long' in .* corrupt in the {CHECKSUM_BYTES} bytes from {2 * CHECKSUM_BYTES} "
    ):
        read(store, "long", 1, 2 * CHECKSUM_BYTES)
    with pytest.raises(NvmeError, match="corrupt"):
        store.write("long", noise(1), 2 * CHECKSUM_BYTES).wait()  # the rest of its block would be kept


def test_a_drive_that_does_not_answer(make_store):
    store = make_store(lane_delay=lambda: 0.5, timeout_s=0.05)
    handle = store.write("one", noise(1))
    with pytest.raises(NvmeError, match=r"write of 'one' in .*has not answered in 0.05 s"):
        handle.wait()
    handle._timeout_s = 10
    handle.wait()


def test_too_little_space_is_told_with_both_counts_and_leaves_nothing(tmp_path):
    needed = 2**60
    with pytest.raises(NvmeError, match=rf"rank 3: .*needs {needed} bytes and .* has \d+ free") as caught:
        NvmeStore(tmp_path, 3, {"huge": needed})
    assert caught.value.__cause__.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_space_is_taken_at_the_start(make_store):
    store = make_store({"large": 2**22})
    assert os.stat(store.path).st_blocks * 512 >= 2**22 == store.nbytes


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NvmeError, match="rank 0: .*file"):
        NvmeStore(tmp_path / "file" / "nvme", 0, {"one": 1})


# Direct I/O


class RefusesToOpen(DirectFile):
    def open_direct(self):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class RefusesTheFirstRead(DirectFile):
    refused = False

    def pread(self, buffer, offset):
        if not self.refused:
            self.refused = True
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().pread(buffer, offset)


def test_memory_file_systems_are_buffered_with_a_warning():
    if not os.path.isdir("/dev/shm") or filesystem_type("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with pytest.warns(UserWarning, match="tmpfs, which is memory and no disk"):
        store = NvmeStore("/dev/shm", 0, SIZES)
    assert not store.direct
    store.write("odd", noise(SIZES["odd"])).wait()
    assert torch.equal(read(store, "odd", SIZES["odd"]), noise(SIZES["odd"]))
    store.close()
    assert not any(name.startswith(PREFIX) for name in os.listdir("/dev/shm"))


@pytest.mark.parametrize("file", [RefusesToOpen, RefusesTheFirstRead])
def test_a_file_system_without_direct_io_is_buffered_with_a_warning(make_store, tmp_path, file):
    if filesystem_type(tmp_path) == "tmpfs":
        pytest.skip("a tmpfs is never asked")
    with pytest.warns(UserWarning, match="no direct I/O .*page cache"):
        store = make_store(open_file=file)
    assert not store.direct
    store.write("odd", noise(9), 3).wait()
    assert torch.equal(read(store, "odd", 9, 3), noise(9))


def test_a_drive_is_used_directly(make_store):
    store = make_store()
    if filesystem_type(os.path.dirname(store.path)) not in ("ext4", "xfs", "btrfs"):
        pytest.skip("only some file systems are known to have direct I/O")
    assert store.direct


# Folders

CHILD = """
import sys, time, torch
from megalith.engine.nvme import NvmeStore
from megalith.engine.thread_pool import ThreadPool
store = NvmeStore(sys.argv[1], 1, {"values": 10**6})
store.write("values", torch.ones(10**6, dtype=torch.uint8)).wait()
print(store.path, flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("out of luck")
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def start_child(folder, then):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), then], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    path = child.stdout.readline().strip()
    assert os.path.exists(path) or then != "wait"
    return child, path


def test_killed_and_raising_processes_leave_nothing_that_stays(tmp_path):
    """A live job's folder survives the starts and ends of others; that of a killed one goes with the next of those."""
    notes = tmp_path / f"{PREFIX}notes"
    notes.mkdir()
    for name in (LOCK_NAME, "mine.txt"):
        (notes / name).write_text("not of this program")
    own = NvmeStore(tmp_path, 0, SIZES)
    (first, first_path), (second, second_path) = start_child(tmp_path, "wait"), start_child(tmp_path, "wait")
    raising, _ = start_child(tmp_path, "raise")
    try:
        assert raising.wait(60) == 1
        NvmeStore(tmp_path, 2, SIZES).close()
        assert all(os.path.exists(path) for path in (first_path, second_path, own.path))
        assert len(os.listdir(tmp_path)) == 4
        first.kill()
        first.wait()
        assert os.path.exists(first_path)
        other = NvmeStore(tmp_path, 2, SIZES)
        assert os.path.exists(second_path) and not os.path.exists(first_path)
        second.kill()
        second.wait()
        other.close()
        assert os.path.exists(own.path) and not os.path.exists(second_path)
    finally:
        for child in (first, second):
            child.kill()
            child.wait()
        own.close()
    assert os.listdir(tmp_path) == [notes.name] and len(os.listdir(notes)) == 2


def test_a_store_that_is_forgotten_is_removed(tmp_path):
    store = NvmeStore(tmp_path, 0, SIZES)
    folder = os.path.dirname(store.path)
    assert sorted(os.listdir(folder)) == [LOCK_NAME, "rank0.data"]
    del store
    assert os.listdir(tmp_path) == []


def test_file_handles_do_not_grow(tmp_path):
    NvmeStore(tmp_path, 0, SIZES).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = NvmeStore(tmp_path, 0, SIZES)
        read(store, "odd", 5)
        store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_urgent_overtakes_what_has_not_begun():
    pool, opened, order = ThreadPool(1, "test"), threading.Event(), []
    pool.submit(opened.wait, urgent=False)
    futures = [pool.submit(partial(order.append, name), name.isupper()) for name in "abAcB"]
    failed = pool.submit(lambda: 1 / 0, urgent=True)
    opened.set()
    pool.shutdown()
    assert all(future.done() for future in futures) and order == list("ABabc")
    with pytest.raises(ZeroDivisionError):
        failed.result()


def test_reads_that_are_urgent_come_first(tmp_path):
    """With one thread, and each transfer held up, so that the order is that of the ends."""
    store = NvmeStore(tmp_path, 0, {"a": 2**20, "b": 2**20}, threads=1, lane_delay=lambda: 0.02)
    out = [torch.empty(2**20, dtype=torch.uint8) for _ in range(5)]
    reads = [store.read("a", values) for values in out[:4]]
    store.read("b", out[4], urgent=True).wait()
    assert not reads[-1].done()
    reads[-1].wait()
    store.close()
