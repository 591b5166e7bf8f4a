"""The control groups that this process's memory counts in, and what they leave of it.

Both versions of the memory controller are read (cgroups(7)): containers, batch systems and `systemd-run` limit memory
this way, and past the limit the kernel kills, whatever the machine still has.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CgroupFiles:
    """How one version of the memory controller calls its files."""

    version: str
    limit: str
    usage: str
    peak: str
    events: str
    """Has a line `oom_kill COUNT`."""
    swap: tuple[str, str]
    """File and value that keep the group's pages out of swap; the limit itself in version 1, where it counts both."""
    file_pages: tuple[str, ...]
    """Lines of memory.stat: pages of files, which the kernel drops when memory is needed."""


V1 = CgroupFiles(
    "cgroup v1",
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    swap=("memory.memsw.limit_in_bytes", "{limit}"),
    file_pages=("total_inactive_file", "total_active_file"),
)
V2 = CgroupFiles(
    "cgroup v2",
    limit="memory.max",
    usage="memory.current",
    peak="memory.peak",
    events="memory.events",
    swap=("memory.swap.max", "0"),
    file_pages=("inactive_file", "active_file"),
)


@dataclass(frozen=True)
class OwnGroup:
    """The group of this process in one hierarchy. `root` is the folder of the mount: groups above it are not seen."""

    path: Path
    root: Path
    files: CgroupFiles


def own_groups() -> list[OwnGroup]:
    try:
        own, mounts = Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()
    except OSError:
        return []
    return list(parse_groups(own, mounts))


def parse_groups(own: str, mounts: str) -> Iterator[OwnGroup]:
    """From the text of /proc/self/cgroup and /proc/self/mountinfo (cgroups(7), proc(5))."""
    mounted = {}
    for line in mounts.splitlines():
        left, right = line.split(" - ")
        kind, options = right.split()[0], right.split()[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            root, folder = left.split()[3:5]
            mounted[V2 if kind == "cgroup2" else V1] = root, Path(folder)
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        files = V1 if "memory" in controllers.split(",") else V2 if controllers == "" else None
        if files in mounted:
            root, folder = mounted[files]
            below = os.path.relpath(path, root) if path.startswith(root) else "."
            yield OwnGroup(folder / below, folder, files)


def available_bytes() -> int | None:
    """What the tightest limit on this process's groups leaves; None without one."""
    left = [
        nbytes
        for group in own_groups()
        for folder in (group.path, *group.path.parents)
        if folder.is_relative_to(group.root) and (nbytes := left_in(folder, group.files)) is not None
    ]
    return min(left, default=None)


def left_in(folder: Path, files: CgroupFiles) -> int | None:
    """Bytes that one group leaves, pages of files counted as free; None where it has no limit."""
    try:
        limit = (folder / files.limit).read_text().strip()
        usage = int((folder / files.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root of version 2 has no such files
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - usage + sum(int(stat.get(name, 0)) for name in files.file_pages))
