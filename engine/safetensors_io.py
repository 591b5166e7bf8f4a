"""Safetensors files a piece at a time: written in any order into their place, read by ranges of the flattened tensor.

The library's own `save_file` needs every tensor in memory at once, and its reader maps the whole file, whose pages then
count as memory of the process. Here one piece is in memory, read straight into the tensor that wants it.

Format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length; a JSON header of names to
dtype, shape and [start, stop) bytes, counted from the header's end; then the bytes of the tensors without gaps.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy
import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit; a longer one is not a safetensors file
_READ_BYTES = 16 * 2**20  # a cast reads through a buffer of this size at most


class SafetensorsFileError(RuntimeError):
    """A file that is missing, truncated or corrupt, or a tensor in it that is not what was asked for."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start_bytes: int
    """From the beginning of the file."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy."""
    # Not tensor.numpy(), after which a storage can never be resized again: chunks are released by that.
    return memoryview(numpy.from_dlpack(tensor.detach().reshape(-1).view(torch.uint8)))


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is lost by a power cut until its folder is synced."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `path` so that it holds either its old or its new text, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)


def require_disk_space(folder: Path, nbytes: int) -> None:
    """Raise SafetensorsFileError, before anything is written, where `folder`'s disk has less than `nbytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if nbytes > free_bytes:
        raise SafetensorsFileError(
            f"{nbytes} bytes are to be written to {folder} and its disk has {free_bytes}: make room"
        )


class SafetensorsWriter:
    """Writes one file whose names, dtypes and shapes are known beforehand and whose values come later, in any order.

    Use as a context: on leaving, the file is complete, synced and has its name; when the body raises, nothing is left.
    As many elements must have been written as were announced, else SafetensorsFileError.
    """

    def __init__(self, path: str | os.PathLike, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        # Wide dtypes first, so that every tensor starts aligned to its element size, as readers that map the file need.
        ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)
        self._entries = {e.name: e for e in ordered}
        if len(self._entries) != len(ordered):
            raise ValueError(f"{self.path}: two tensors have the same name")
        self._unwritten_numel = {e.name: e.numel for e in self._entries.values()}
        header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
        for e in self._entries.values():
            stop = offset + e.nbytes
            header[e.name] = {"dtype": DTYPE_NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start_bytes = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in self._entries}
        self.nbytes = 8 + len(text) + offset
        require_disk_space(self.path.parent, self.nbytes)
        with self._errors_name_the_file():
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with self._errors_name_the_file():
                os.truncate(self._fd, self.nbytes)
            self._write_at(0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor, offset_numel: int = 0) -> None:
        """Write `tensor`, of any shape and device, as the elements of `name` from `offset_numel` on.

        Raises SafetensorsFileError for another dtype, for more elements than `name` has, and when the disk refuses.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise SafetensorsFileError(f"{self.path}: {name} is not among the {len(self._entries)} names of this file")
        if tensor.dtype != entry.dtype:
            raise SafetensorsFileError(f"{self.path}: {name} is {tensor.dtype}, and was announced as {entry.dtype}")
        self._unwritten_numel[name] -= tensor.numel()
        if offset_numel < 0 or offset_numel + tensor.numel() > entry.numel or self._unwritten_numel[name] < 0:
            raise SafetensorsFileError(
                f"{self.path}: {tensor.numel()} elements at {offset_numel} are too many for {name} of {entry.numel}, "
                f"or were written before"
            )
        if tensor.numel():
            start = self._start_bytes[name] + offset_numel * entry.dtype.itemsize
            self._write_at(start, tensor_bytes(tensor.detach().cpu().contiguous()))

    def _write_at(self, start_bytes: int, data: memoryview) -> None:
        with self._errors_name_the_file():
            while data:
                written = os.pwrite(self._fd, data, start_bytes)
                data, start_bytes = data[written:], start_bytes + written

    @contextmanager
    def _errors_name_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SafetensorsFileError(f"writing {self.path} of {self.nbytes} bytes: {error.strerror}") from error

    def _discard(self) -> None:
        os.close(self._fd)
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        left = {name: numel for name, numel in self._unwritten_numel.items() if numel}
        if kind is not None or left:
            self._discard()
            if kind is None:
                raise SafetensorsFileError(f"{self.path}: elements were never written: {left}")
            return
        try:
            with self._errors_name_the_file():
                os.fsync(self._fd)
        except BaseException:
            self._discard()
            raise
        os.close(self._fd)
        os.replace(self._partial, self.path)
        fsync_folder(self.path.parent)


class SafetensorsFile:
    """The header of one file, and reads of ranges of its tensors. Holds no memory and no open file between reads.

    Raises SafetensorsFileError, at once, for a file that is missing, truncated or corrupt.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                file_bytes = os.fstat(file.fileno()).st_size
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
                    self._reject(f"its {file_bytes} bytes cannot hold a header of {header_bytes}")
                text = file.read(header_bytes)
        except OSError as error:
            raise SafetensorsFileError(f"{self.path}: {error.strerror}") from error
        try:
            header = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            spans = {
                name: (DTYPES[info["dtype"]], tuple(map(int, info["shape"])), *map(int, info["data_offsets"]))
                for name, info in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafetensorsFileError(f"{self.path} is corrupt: its header cannot be read ({error!r})") from error
        self.tensors: dict[str, StoredTensor] = {}
        stop_bytes = 0
        for name, (dtype, shape, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
            tensor = StoredTensor(dtype, shape, 8 + header_bytes + start)
            if start != stop_bytes or min(shape, default=0) < 0 or stop - start != tensor.numel * dtype.itemsize:
                self._reject(f"{name} of {dtype} {shape} lies at bytes {start} to {stop}, after {stop_bytes}")
            self.tensors[name], stop_bytes = tensor, stop
        if 8 + header_bytes + stop_bytes != file_bytes:
            self._reject(f"it has {file_bytes} bytes, and its header describes {8 + header_bytes + stop_bytes}")

    def _reject(self, reason: str) -> None:
        raise SafetensorsFileError(f"{self.path} is truncated or corrupt: {reason}")

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor, offset_numel: int = 0) -> None:
        """Fill `out` with the elements [offset_numel, offset_numel + out.numel()) of the flattened tensor `name`.

        `out` has any shape, device and dtype (values are cast). Same dtype, contiguous and on the CPU: the file is read
        into its memory. Otherwise through a buffer of at most 16 MiB (all of `out`, where it is not contiguous).
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise SafetensorsFileError(f"{self.path} holds no tensor {name}")
        if offset_numel < 0 or offset_numel + out.numel() > stored.numel:
            raise SafetensorsFileError(
                f"{self.path}: {name} has {stored.numel} elements; {out.numel()} were asked for from {offset_numel} on"
            )
        if not out.is_contiguous():
            whole = torch.empty(out.shape, dtype=out.dtype, device="cpu")
            self.read_into(name, whole, offset_numel)
            out.copy_(whole)
            return
        start = stored.start_bytes + offset_numel * stored.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            flat = out.reshape(-1)
            if out.dtype == stored.dtype and out.device.type == "cpu":
                self._read_exactly(file, tensor_bytes(flat), name)
                return
            step_numel = _READ_BYTES // stored.dtype.itemsize
            buffer = torch.empty(min(step_numel, flat.numel()), dtype=stored.dtype, device="cpu")
            for begin in range(0, flat.numel(), step_numel):
                part = flat[begin : begin + step_numel]
                self._read_exactly(file, tensor_bytes(buffer[: part.numel()]), name)
                part.copy_(buffer[: part.numel()])

    def _read_exactly(self, file, data: memoryview, name: str) -> None:
        while data:
            try:
                count = file.readinto(data)
            except OSError as error:
                raise SafetensorsFileError(f"reading {name} from {self.path}: {error.strerror}") from error
            if count == 0:
                self._reject(f"it ended while {name} was read; was it replaced or cut?")
            data = data[count:]
