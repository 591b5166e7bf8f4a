"""What this machine has, for budgets that the user did not give."""

import os
from pathlib import Path

import torch

from .budgets import Machine
from .cgroups import available_bytes
from .collectives import RankGroup
from .manager import Meter


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
    device_bytes = host_bytes
    if on_gpu:
        device_bytes = max(GpuMeter(device).room_bytes() - torch.cuda.memory_allocated(device), 2)
    rooms = group.gather_objects((int(device_bytes), int(host_bytes * (0.9 if on_gpu else 0.5))))
    device_bytes, host_bytes = min(device for device, _ in rooms), min(host for _, host in rooms)
    return Machine(on_gpu, int(device_bytes * (0.6 if on_gpu else 0.3)), host_bytes, device_bytes if on_gpu else None)


class GpuMeter:
    """A `Meter` of torch's caching allocator. It resets no statistic, which are the user's: a peak is of this moment
    where it is above all that there were before, or where somebody has reset it; else it is below the earlier ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stored_bytes = 0
        self._peak_bytes = self._peak()

    def take_other_bytes(self, stored_bytes: int) -> int:
        """The engines' part of a peak is not known, but what they had before or have now: the less counts."""
        peak, least = self._peak(), min(self._stored_bytes, stored_bytes)
        other = torch.cuda.memory_allocated(self._device) - stored_bytes
        if peak != self._peak_bytes:
            other = max(other, peak - least)
        self._stored_bytes, self._peak_bytes = stored_bytes, peak
        return max(other, 0)

    def room_bytes(self) -> int:
        """Free is what no process has, and what this one's allocator has reserved. Kept back are as much as the
        allocator had reserved beyond what was in use when both were highest, which is what fragmentation took so far,
        and at least a twentieth of the memory, for batches whose shapes it has not seen."""
        free, total = torch.cuda.mem_get_info(self._device)
        fragmented = torch.cuda.max_memory_reserved(self._device) - self._peak()
        return free + torch.cuda.memory_reserved(self._device) - max(fragmented, total // 20)

    def take_overshoot(self) -> int:
        peak = self._peak()
        is_new, self._peak_bytes = peak != self._peak_bytes, peak
        return max(peak - self.room_bytes(), 0) if is_new else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


def make_meter(device: torch.device) -> Meter | None:
    """None on a CPU, where what is not the engine's cannot be told apart."""
    return GpuMeter(device) if device.type == "cuda" else None
