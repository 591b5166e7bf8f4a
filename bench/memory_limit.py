"""A hard limit on the memory of a benchmark's processes: a control group of their own, or a resource limit without one.

A cgroup counts everything that the system holds for its processes, the page cache of files that they were the first to
read included; swap is off, and past the limit the kernel kills. Version 1 and 2 are supported, below the group that the
benchmark itself runs in, so that every limit from outside still holds. Where no group can be made (cgroup files belong
to root), `RLIMIT_DATA` bounds the private writable memory of each process instead: allocations then fail.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engine.cgroups import V2, CgroupFiles, OwnGroup, own_groups


@dataclass(frozen=True)
class MemoryLimit:
    """What a benchmark's process runs under."""

    kind: str
    """"cgroup v1", "cgroup v2", "RLIMIT_DATA" or "none"."""
    nbytes: int | None = None
    group: Path | None = None
    files: CgroupFiles | None = None

    def command(self, command: list[str]) -> list[str]:
        """`command`, started under the limit: a shell enters it and becomes the command."""
        if self.group is not None:
            enter = 'echo $$ > "$0" && exec "$@"'
            return ["/bin/sh", "-c", enter, str(self.group / "cgroup.procs"), *command]
        if self.nbytes is not None:
            return ["/bin/sh", "-c", 'ulimit -d "$0" && exec "$@"', str(self.nbytes // 1024), *command]
        return command

    def peak_bytes(self) -> int | None:
        """The most that was held at once; None where nobody counts it."""
        try:
            return int((self.group / self.files.peak).read_text()) if self.group else None
        except FileNotFoundError:  # memory.peak is younger than version 2
            return None

    def killed(self) -> bool:
        """Whether the kernel killed a process for its memory."""
        if self.group is None:
            return False
        lines = (self.group / self.files.events).read_text().splitlines()
        return any(line.split()[0] == "oom_kill" and int(line.split()[1]) > 0 for line in lines if line.split())


@contextlib.contextmanager
def memory_limit(nbytes: int | None, or_mapped: bool = True) -> Iterator[MemoryLimit]:
    """A limit for one run, gone afterwards; None limits nothing. `or_mapped`: where no group can be made, limit what a
    process maps; else nothing is limited there."""
    made = None if nbytes is None else make_group(nbytes)
    if made is None:
        yield MemoryLimit("none") if nbytes is None or not or_mapped else MemoryLimit("RLIMIT_DATA", nbytes)
        return
    group, files = made
    try:
        yield MemoryLimit(files.version, nbytes, group, files)
    finally:
        remove_group(group)


def make_group(nbytes: int) -> tuple[Path, CgroupFiles] | None:
    """A new group with the limit set, below the first of `parent_groups` where that can be done; None if nowhere."""
    for parent, files in parent_groups(own_groups()):
        group = parent / f"megalith-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / files.limit).write_text(str(nbytes))
            name, value = files.swap
            if (group / name).exists():  # missing in a kernel without swap accounting
                (group / name).write_text(value.format(limit=nbytes))
            with open(group / "cgroup.procs", "a"):
                return group, files
        except OSError:
            group.rmdir()
    return None


def parent_groups(own: list[OwnGroup]) -> Iterator[tuple[Path, CgroupFiles]]:
    """Where a group may be made. In version 2 a group that holds processes cannot limit groups below it: so its own
    parent comes next."""
    for group in own:
        yield group.path, group.files
        if group.files is V2 and group.path != group.root:
            yield group.path.parent, V2


def remove_group(group: Path) -> None:
    """Its processes have been killed; the system takes a moment until they have left."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{group} still has processes: {(group / 'cgroup.procs').read_text().split()}")
