"""What this machine has, for budgets that the user did not give."""

import os
from pathlib import Path

import torch

from .cgroups import available_bytes
from .collectives import RankGroup


def host_available_bytes() -> int:
    """Memory that this process could still take: of the machine, and of its control groups where those have a limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    in_groups = available_bytes()
    return max(1, available if in_groups is None else min(available, in_groups))


def host_room_of(device: torch.device, group: RankGroup) -> int:
    """A rank's share of the host's memory, the same on every rank. On a GPU nine tenths of what is free; on a CPU half
    of it, since activations and gathered weights live there too."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", group.world_size))
    share = 0.9 if device.type == "cuda" else 0.5
    return min(group.gather_objects(int(host_available_bytes() * share / max(ranks_here, 1))))
