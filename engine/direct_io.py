"""A preallocated file that is read and written past the page cache, and memory that such transfers need.

Direct I/O (`O_DIRECT`, open(2)) moves bytes between the drive and the caller's memory: a second copy in the page cache
would take the very memory that offloading is to save. It asks that memory, file offset and length all be multiples of
the drive's block.
"""

import errno
import mmap
import os
import warnings
from pathlib import Path

import torch

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Bytes. No drive has larger blocks than a page."""

RAM_FILESYSTEMS = ("tmpfs", "ramfs")


def aligned_empty(nbytes: int) -> torch.Tensor:
    """Zeroed memory on pages of its own, uint8 [nbytes]: transfers into it need no copy."""
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]


def round_down(nbytes: int, multiple: int) -> int:
    return nbytes // multiple * multiple


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def free_bytes(folder: str | os.PathLike) -> int:
    """What an ordinary user may still take on the file system of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def filesystem_type(folder: str | os.PathLike) -> str:
    """ "ext4", "tmpfs", "nfs4"…; "unknown" where the system does not tell."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    # proc(5): the third field is the device, the first one after the separator is the type.
    return next((line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == wanted), "unknown")


class DirectFile:
    """A new file of `nbytes`, all of whose space is taken at once; what was never written reads as zeros.

    Where the file system has no direct I/O, transfers go through the page cache, and a warning says so. `open_direct`,
    `pread` and `pwrite` are single system calls, which a test replaces to inject faults.
    """

    def __init__(self, path: str | os.PathLike, nbytes: int) -> None:
        self.path = os.fspath(path)
        self.nbytes = nbytes
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._take_space()
            self.direct = self._turn_direct()
        except BaseException:
            self.close()
            os.unlink(self.path)
            raise

    def _take_space(self) -> None:
        """Raises OSError (ENOSPC) with both byte counts."""
        folder = os.path.dirname(self.path)
        free = free_bytes(folder)
        try:
            if self.nbytes > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.nbytes:
                os.posix_fallocate(self._fd, 0, self.nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {self.nbytes} bytes and {folder} has {free} free ({os.strerror(error.errno)}): "
                f"free some, or choose another nvme_dir",
            ) from error

    def _turn_direct(self) -> bool:
        """Whether transfers pass the page cache by: a file system may refuse at the opening or at the first read."""
        kind = filesystem_type(os.path.dirname(self.path))
        if kind in RAM_FILESYSTEMS:
            warnings.warn(f"{self.path} is on {kind}, which is memory and no disk: nothing is saved", stacklevel=4)
            return False
        buffered_fd = self._fd
        try:
            self._fd = self.open_direct()
            self.pread(aligned_empty(ALIGNMENT).numpy(), 0)
        except OSError as refusal:
            if self._fd != buffered_fd:
                os.close(self._fd)
                self._fd = buffered_fd
            if refusal.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            warnings.warn(
                f"{self.path} is on {kind}, which has no direct I/O ({refusal.strerror}): transfers go through the "
                f"page cache, which is slower and takes memory",
                stacklevel=4,
            )
            return False
        os.close(buffered_fd)
        return True

    def open_direct(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_DIRECT)

    def read(self, buffer, offset: int) -> None:
        """Fill `buffer` (bytes-like, one dimension) from `offset` on. Raises OSError."""
        self._transfer(self.pread, buffer, offset, "read")

    def write(self, buffer, offset: int) -> None:
        self._transfer(self.pwrite, buffer, offset, "write")

    def pread(self, buffer, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def pwrite(self, buffer, offset: int) -> int:
        return os.pwritev(self._fd, [buffer], offset)

    def _transfer(self, call, buffer, offset: int, verb: str) -> None:
        self._check_file()
        done, wanted = 0, len(buffer)
        while done < wanted:
            count = call(buffer[done:], offset + done)
            done += count
            # A call may move less than it was asked for; what direct I/O cannot do is to go on within a block.
            if count == 0 or (self.direct and done < wanted and done % ALIGNMENT):
                raise OSError(errno.EIO, f"short {verb}: {done} of {wanted} bytes at offset {offset}")

    def _check_file(self) -> None:
        """A deleted or truncated file would still serve this process for a while: better told before than after."""
        status = os.fstat(self._fd)
        if status.st_nlink == 0:
            raise OSError(errno.ENOENT, "the file was deleted while it was in use")
        if status.st_size < self.nbytes:
            raise OSError(errno.EIO, f"the file was truncated from {self.nbytes} to {status.st_size} bytes")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
