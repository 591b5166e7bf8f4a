"""A folder of one process inside a directory that many share, gone with the process.

Each folder holds a lock file that its process keeps locked (flock(2)). The system drops the lock when the process ends,
however it ends: so a folder whose lock is free is left over from a process that was killed, and anybody may remove it.
Every start and every orderly end does.
"""

import fcntl
import os
import shutil
import socket
import uuid
from pathlib import Path

PREFIX = "megalith-nvme-"
LOCK_NAME = "lock"
DATA_SUFFIX = ".data"


class JobFolder:
    def __init__(self, directory: str | os.PathLike, label: str) -> None:
        """Make `directory` if there is none, remove what dead processes left there, and make a folder of our own."""
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        remove_stale(self._directory)
        name = f"{_process_prefix()}{label}-{uuid.uuid4().hex[:8]}"
        # It gets its name once it is locked: a folder that is seen without a lock would be taken for a dead one's.
        unnamed = self._directory / f".{name}"
        unnamed.mkdir(mode=0o700)
        self.path = self._directory / name
        try:
            self._lock_fd = os.open(unnamed / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            unnamed.rename(self.path)
        except BaseException:
            shutil.rmtree(unnamed, ignore_errors=True)
            raise

    def remove(self) -> None:
        """With everything in it, and with the folders of processes that have died meanwhile."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        remove_stale(self._directory)


def remove_stale(directory: Path) -> None:
    """Remove the folders whose process is dead. One with anything in it that no job of ours makes is left alone."""
    for folder in directory.glob(f"{PREFIX}*"):
        # Over NFS a process sees its own locks as free ones.
        if folder.name.startswith(_process_prefix()) or not _is_dead(folder):
            continue
        if all(entry.name == LOCK_NAME or entry.suffix == DATA_SUFFIX for entry in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:  # somebody is removing it, or it is another user's
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _process_prefix() -> str:
    return f"{PREFIX}{socket.gethostname()}-{os.getpid()}-"
