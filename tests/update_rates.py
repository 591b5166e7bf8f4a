"""Rates of a machine with a device beside the host, by the speed of their updates: who does how much of them."""

from dataclasses import replace

from megalith.engine import Rates


def rates(host, device):
    link = {"link_in_bytes": device * 16, "link_out_bytes": device * 16}
    others = {"compute_flops": 1e12, "memory_bytes": 1e12, "call_s": 0.0}
    return Rates(host_adam_numel=host, device_adam_numel=device, **link, **others)


ALL_DEVICE, MIXED = rates(1.0, 1e9), rates(1e9, 1e9)
ALL_HOST = replace(MIXED, device_adam_numel=1.0)  # what it fetches of the device comes fast
