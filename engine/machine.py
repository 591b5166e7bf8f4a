"""What this machine has, for budgets that the user did not give."""

import os
from pathlib import Path

import torch

from .budgets import Machine
from .cgroups import available_bytes
from .collectives import RankGroup


def host_available_bytes() -> int:
    """Memory that this process could still take: of the machine, and of its control groups where those have a limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    in_groups = available_bytes()
    return max(1, available if in_groups is None else min(available, in_groups))


def read_machine(device: torch.device, group: RankGroup) -> Machine:
    """A rank's share of what is free, the same on every rank. On a GPU, six tenths of its memory, since activations
    need theirs, and nine tenths of the host's. On a CPU, where both are one memory and activations live there too,
    three tenths for the device and five for the host."""
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", group.world_size)), 1)
    on_gpu = device.type == "cuda"
    host_bytes = host_available_bytes() / ranks_here
    device_bytes = torch.cuda.mem_get_info(device)[0] * 0.6 if on_gpu else host_bytes * 0.3
    rooms = group.gather_objects((int(device_bytes), int(host_bytes * (0.9 if on_gpu else 0.5))))
    return Machine(on_gpu, min(device for device, _ in rooms), min(host for _, host in rooms))
