"""How fast a machine is, which a plan needs to tell the time of a step: measured here, or given for one elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels import AdamHyper, fused_adam_
from .config import Precision
from .nvme import NvmeStore
from .tiers import Work

_TRIAL_S = 0.15


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Sustained rates of one rank. A rate of None stands for what the machine lacks: a plan that needs it raises."""

    compute_flops: float
    """Multiplications and additions a second in matrix products of the compute dtype."""
    memory_bytes: float
    """A second, read and written by operations that do little else on the device."""
    call_s: float
    """The least time of one operation."""
    host_adam_numel: float
    """Parameters a second."""
    device_adam_numel: float
    link_in_bytes: float | None = None
    """A second, from the host to the device."""
    link_out_bytes: float | None = None
    disk_read_bytes: float | None = None
    disk_write_bytes: float | None = None
    collective_bytes: float | None = None
    """A second, that one rank receives."""
    host_computes: bool = False
    """The device is the CPU: copies, collectives and Adam on the host take their time from the model's computation."""

    def seconds(self, work: Work, amount: int) -> float:
        """Raises ValueError where the machine has no rate for it."""
        field = {
            Work.LINK_IN: "link_in_bytes",
            Work.LINK_OUT: "link_out_bytes",
            Work.DISK_READ: "disk_read_bytes",
            Work.DISK_WRITE: "disk_write_bytes",
            Work.COLLECTIVE: "collective_bytes",
            Work.HOST_ADAM: "host_adam_numel",
            Work.DEVICE_ADAM: "device_adam_numel",
        }[work]
        rate = getattr(self, field)
        if rate is None:
            raise ValueError(f"rates have no {field}, and the plan moves {amount} bytes there: give it")
        return amount / rate


def measure_rates(
    device: torch.device | str | None = None,
    precision: str = "fp32",
    nvme_dir: str | None = None,
    collective_bytes: float | None = None,
) -> Rates:
    """Rates of this machine in 2 to 5 seconds: of one rank that has it to itself. What ranks exchange is not measured:
    give `collective_bytes` where there are several."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    host_adam = _adam_numel(torch.device("cpu"), Precision(precision))
    copies = _copy_bytes(device)
    reads, writes = _disk_bytes(nvme_dir) if nvme_dir is not None else (None, None)
    return Rates(
        compute_flops=_compute_flops(device, Precision(precision).dtype),
        memory_bytes=_memory_bytes(device, Precision(precision).dtype),
        call_s=_call_s(device),
        host_adam_numel=host_adam,
        device_adam_numel=_adam_numel(device, Precision(precision)) if on_gpu else host_adam,
        link_in_bytes=copies[0],
        link_out_bytes=copies[1],
        disk_read_bytes=reads,
        disk_write_bytes=writes,
        collective_bytes=collective_bytes,
        host_computes=not on_gpu,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: the median of as many as fit in the trial's time, at least 3."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once() for _ in range(3)]
    while sum(times) < _TRIAL_S:
        times.append(once())
    return sorted(times)[len(times) // 2]


def _compute_flops(device: torch.device, dtype: torch.dtype) -> float:
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (512, 768, 2048)
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    return 2 * rows * inner * columns / _seconds(lambda: torch.nn.functional.linear(left, right), device)


def _memory_bytes(device: torch.device, dtype: torch.dtype) -> float:
    values = torch.ones(2**28 if device.type == "cuda" else 2**23, device=device, dtype=dtype)
    out = torch.empty_like(values)
    return 2 * values.nbytes / _seconds(lambda: torch.mul(values, 1.5, out=out), device)


def _call_s(device: torch.device) -> float:
    values = torch.ones(16, device=device)

    def hundred() -> None:
        for _ in range(100):
            values.add_(1.0)

    return _seconds(hundred, device) / 100


def _copy_bytes(device: torch.device) -> tuple[float, float]:
    on_host = torch.ones(2**27 if device.type == "cuda" else 2**24, dtype=torch.uint8)
    on_host = on_host.pin_memory() if device.type == "cuda" else on_host
    on_device = torch.empty_like(on_host, device=device)
    inwards = _seconds(lambda: on_device.copy_(on_host), device)
    return on_host.nbytes / inwards, on_host.nbytes / _seconds(lambda: on_host.copy_(on_device), device)


def _adam_numel(device: torch.device, precision: Precision) -> float:
    numel = 2**26 if device.type == "cuda" else 2**22
    dtype = precision.dtype
    weight, grad = (torch.ones(numel, dtype=dtype, device=device) for _ in range(2))
    exp_avg, exp_avg_sq = (torch.ones(numel, device=device) for _ in range(2))
    rest = {}
    if precision is Precision.BF16:
        rest["remainder"] = torch.zeros(numel, dtype=torch.int16, device=device)
    if precision is Precision.FP16:
        rest["master"] = torch.ones(numel, device=device)
    hyper = AdamHyper(lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, step=1)
    factor, found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)

    def update() -> None:
        fused_adam_(weight, grad, exp_avg, exp_avg_sq, hyper, factor=factor, found_inf=found_inf, **rest)

    return numel / _seconds(update, device)


def _disk_bytes(folder: str) -> tuple[float, float]:
    """Of reads and writes of a file past the page cache where the filesystem has that."""
    values = torch.ones(2**26, dtype=torch.uint8)
    store = NvmeStore(folder, 0, {"trial": values.nbytes})
    try:
        writing = _seconds(lambda: store.write("trial", values).wait(), torch.device("cpu"))
        reading = _seconds(lambda: store.read("trial", values).wait(), torch.device("cpu"))
    finally:
        store.close()
    return values.nbytes / reading, values.nbytes / writing
