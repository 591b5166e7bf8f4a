"""How fast a machine is, which a plan needs to tell the time of a step: measured here, or given for one elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from ..kernels import CODE_DTYPES, AdamHyper, fused_adam_, scales_numel
from .collectives import RankGroup, all_gather_, make_rank_group
from .config import EngineConfig, Precision, StatePrecision
from .nvme import NvmeStore
from .tiers import HostSlab, Work, advise_huge_pages


@dataclass(frozen=True, kw_only=True)
class UpdateRates:
    """What decides where Adam runs (updater_choice.py): sustained rates of one rank, None for what the machine
    lacks."""

    host_adam_numel: float
    """Parameters a second."""
    device_adam_numel: float
    link_in_bytes: float | None = None
    """A second, from the host to the device."""
    link_out_bytes: float | None = None
    host_computes: bool = False
    """The device is the CPU: copies, collectives and Adam on the host take their time from the model's computation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_numel", "_bytes", "_flops")) and value is not None and not value > 0:
                raise ValueError(f"{field.name}={value!r}: must be more than 0")

    @property
    def have_device(self) -> bool:
        """There is a device beside the host's processor, and a link to it."""
        return not self.host_computes and self.link_in_bytes is not None and self.link_out_bytes is not None


@dataclass(frozen=True, kw_only=True)
class Rates(UpdateRates):
    """All that a plan needs, of one rank. A rate of None stands for what the machine lacks: a plan that needs it
    raises."""

    compute_flops: float
    """Multiplications and additions a second in matrix products of the compute dtype."""
    memory_bytes: float
    """A second, read and written by operations that do little else on the device."""
    call_s: float
    """The least time of one operation."""
    attention_flops: float | None = None
    """Multiplications and additions a second in fused attention; None: compute_flops."""
    function_bytes: float | None = None
    """As memory_bytes, by operations that evaluate a function (exp, silu, softmax) of every element; None: that."""
    disk_read_bytes: float | None = None
    disk_write_bytes: float | None = None
    collective_bytes: float | None = None
    """A second, that one rank receives."""

    def seconds(self, work: Work, amount: int) -> float:
        """Raises ValueError where the machine has no rate for it."""
        field = {
            Work.LINK_IN: "link_in_bytes",
            Work.LINK_OUT: "link_out_bytes",
            Work.DISK_READ: "disk_read_bytes",
            Work.DISK_WRITE: "disk_write_bytes",
            Work.COLLECTIVE: "collective_bytes",
            Work.NORM: "memory_bytes",
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
    process_group: dist.ProcessGroup | None = None,
    trial_s: float = 0.15,
    state_precision: str = "exact",
) -> Rates:
    """Rates of this machine, each of some trials for `trial_s`, in all 2 to 5 seconds: of one rank that has it to
    itself, or with `process_group` of its ranks, which all call this, while all of them do the same."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    group = RankGroup(0, 1, None, None) if process_group is None else make_rank_group(process_group, device, 60)
    trial, kind = _Trial(device, trial_s, group), Precision(precision)
    of_updates = _update_rates(trial, kind, StatePrecision(state_precision))
    reads, writes = _disk_bytes(trial, nvme_dir) if nvme_dir is not None else (None, None)
    # The group stays: torch gives its name to the next one of the same ranks, which would look for the old addresses.
    return Rates(
        **vars(of_updates),
        compute_flops=_compute_flops(trial, kind.dtype),
        memory_bytes=_memory_bytes(trial, kind.dtype),
        call_s=_call_s(trial),
        attention_flops=_attention_flops(trial, kind.dtype),
        function_bytes=_memory_bytes(trial, kind.dtype, torch.nn.functional.silu),
        disk_read_bytes=reads,
        disk_write_bytes=writes,
        collective_bytes=_collective_bytes(trial) if group.is_distributed else None,
    )


def agreed_update_rates(
    rates: UpdateRates | None, device: torch.device, config: EngineConfig | None, group: RankGroup
) -> UpdateRates | None:
    """What an engine of `config` (None: one that trains nothing, or whose options are wrong) decides by, the same on
    every rank: of each rate that of the slowest one, for which the others would wait. Rates that are not given are
    measured, by all ranks at once, where a GPU is to train what lies on the host. A collective.

    Raises TypeError and ValueError, on every rank.
    """
    missing = rates is None and config is not None and config.keeps_state_on_host and device.type == "cuda"
    given = group.gather_objects((rates, missing))
    if all(missing for _, missing in given):
        trial = _Trial(device, 0.15, group)
        rates = _update_rates(trial, Precision(config.precision), StatePrecision(config.state_precision))
        torch.cuda.empty_cache()  # what was measured with is not needed again
        given = group.gather_objects((rates, True))
    every = [rates for rates, _ in given]
    for each in every:
        if each is not None and not isinstance(each, UpdateRates):
            raise TypeError(f"rates is a {type(each).__name__}: give what measure_rates returns")
    if None in every:
        if any(every):
            raise ValueError("rates are given on some ranks and not on others: give them on all, or on none")
        return None
    return _slowest(every)


def _slowest(rates: list[UpdateRates]) -> UpdateRates:
    def least(name: str) -> float | None:
        values = [getattr(each, name) for each in rates]
        return None if None in values else min(values)

    names = ("host_adam_numel", "device_adam_numel", "link_in_bytes", "link_out_bytes")
    return UpdateRates(**{name: least(name) for name in names}, host_computes=any(each.host_computes for each in rates))


def _update_rates(trial: "_Trial", precision: Precision, state_precision: StatePrecision) -> UpdateRates:
    on_gpu = trial.device.type == "cuda"
    host_adam = _adam_numel(trial, torch.device("cpu"), precision, state_precision)
    link_in, link_out = _copy_bytes(trial)
    return UpdateRates(
        host_adam_numel=host_adam,
        device_adam_numel=_adam_numel(trial, trial.device, precision, state_precision) if on_gpu else host_adam,
        link_in_bytes=link_in,
        link_out_bytes=link_out,
        host_computes=not on_gpu,
    )


@dataclass(frozen=True)
class _Trial:
    device: torch.device
    at_least_s: float
    group: RankGroup

    def seconds_of(self, work: Callable[[], object], times: int | None = None) -> float:
        """Of one call: the mean of `times`, by default of as many as fit. All ranks begin at once. No median: where
        others take turns on the processor, most short calls would not tell of them."""
        self.group.barrier()
        work()
        count, start, elapsed = 0, time.perf_counter(), 0.0
        while count < (times or 1) or (times is None and elapsed < self.at_least_s):
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            count, elapsed = count + 1, time.perf_counter() - start
        return elapsed / count


def _compute_flops(trial: _Trial, dtype: torch.dtype) -> float:
    """Of layer after layer, as a model has them: on a CPU their weights come from memory, and their gradients go to
    memory that is not in a cache."""
    on_gpu = trial.device.type == "cuda"
    rows, inner, columns, layers = (8192, 8192, 8192, 1) if on_gpu else (256, 512, 1408, 24)
    values = torch.randn(rows, inner, device=trial.device).to(dtype).requires_grad_()
    weights = [torch.randn(columns, inner, device=trial.device).to(dtype).requires_grad_() for _ in range(layers)]
    gradient = torch.randn(rows, columns, device=trial.device).to(dtype)

    def forward_and_backward() -> None:  # whose products are of transposed matrices, which may be slower
        outputs = [torch.nn.functional.linear(values, weight) for weight in weights]
        torch.autograd.grad(outputs, (values, *weights), [gradient] * layers)

    return 6 * rows * inner * columns * layers / trial.seconds_of(forward_and_backward)


def _attention_flops(trial: _Trial, dtype: torch.dtype) -> float:
    """Causal, forward and backward: 2 and 5 products of [tokens, tokens, dim], half of which are masked."""
    rows, heads, tokens, dim = (8, 32, 2048, 128) if trial.device.type == "cuda" else (2, 8, 128, 64)
    query, key, value = (
        torch.randn(rows, heads, tokens, dim, device=trial.device).to(dtype).requires_grad_() for _ in range(3)
    )
    gradient = torch.randn_like(query)

    def forward_and_backward() -> None:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(output, (query, key, value), gradient)

    return 7 * rows * heads * tokens * tokens * dim / trial.seconds_of(forward_and_backward)


def _memory_bytes(trial: _Trial, dtype: torch.dtype, operation: Callable = lambda values: values * 1.5) -> float:
    """Of `operation`, with an allocation each, as a model's operations have: those of the forward pass keep what they
    made, in memory that a CPU has to be given page by page, those of the backward pass use it once."""
    numel, count = (2**28, 1) if trial.device.type == "cuda" else (2**19, 32)
    values = torch.ones(numel, device=trial.device, dtype=dtype)

    def forward_and_backward() -> None:
        for kept in [operation(values) for _ in range(count)]:
            operation(kept)

    return 4 * count * values.nbytes / trial.seconds_of(forward_and_backward)


def _call_s(trial: _Trial) -> float:
    values = torch.ones(2**16, device=trial.device)  # on a CPU, enough for all threads, which take time to begin

    def hundred() -> None:
        for _ in range(100):
            values.add_(1.0)

    return trial.seconds_of(hundred) / 100


def _copy_bytes(trial: _Trial) -> tuple[float, float]:
    on_gpu = trial.device.type == "cuda"
    nbytes = 2**27 if on_gpu else 2**24
    on_host = HostSlab(nbytes, trial.device).take(nbytes, torch.uint8)  # page-locked, but not for good
    on_host.fill_(1)
    on_device = torch.empty_like(on_host, device=trial.device)
    inwards = trial.seconds_of(lambda: on_device.copy_(on_host))
    return on_host.nbytes / inwards, on_host.nbytes / trial.seconds_of(lambda: on_host.copy_(on_device))


def _adam_numel(trial: _Trial, device: torch.device, precision: Precision, state_precision: StatePrecision) -> float:
    numel = 2**24 if trial.device.type == "cpu" else 2**25  # more than caches hold: those of a GPU's host are large
    weight, grad = (torch.ones(numel, dtype=precision.dtype, device=device) for _ in range(2))
    dtypes = dict.fromkeys(CODE_DTYPES, torch.float32)
    rest = {}
    if state_precision is StatePrecision.EIGHT_BIT:
        dtypes = CODE_DTYPES
        rest["scales"] = torch.ones(scales_numel(numel), device=device)
    exp_avg, exp_avg_sq = (torch.ones(numel, dtype=dtype, device=device) for dtype in dtypes.values())
    if precision is Precision.BF16:
        rest["remainder"] = torch.zeros(numel, dtype=torch.int16, device=device)
    if precision is Precision.FP16:
        rest["master"] = torch.ones(numel, device=device)
    hyper = AdamHyper(lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, step=1)
    factor, found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)

    def update() -> None:
        fused_adam_(weight, grad, exp_avg, exp_avg_sq, hyper, factor=factor, found_inf=found_inf, **rest)

    return numel / trial.seconds_of(update)


def _collective_bytes(trial: _Trial) -> float:
    """Of weights that are gathered: the same number of times on all ranks, which wait for each other."""
    group = trial.group
    full = torch.ones((2**26 if trial.device.type == "cuda" else 2**22) * group.world_size, device=trial.device)
    storage, nbytes = full.untyped_storage(), full.nbytes
    own = full.view(group.world_size, -1)[group.rank].clone()

    def gather() -> None:  # as a chunk's weights are: into memory that is taken for it, to which its own part is copied
        storage.resize_(0)
        storage.resize_(nbytes)
        advise_huge_pages(full)
        full.view(group.world_size, -1)[group.rank].copy_(own)
        all_gather_(full, group, 0)

    return group.received_bytes(full) / trial.seconds_of(gather, times=5)


def _disk_bytes(trial: _Trial, folder: str) -> tuple[float, float]:
    """Of reads and writes of a file past the page cache where the filesystem has that."""
    values = torch.ones(2**26, dtype=torch.uint8)
    store, error = None, None
    try:
        store = NvmeStore(folder, trial.group.rank, {"trial": values.nbytes})
    except Exception as caught:
        error = caught
    trial.group.barrier(error)
    try:
        writing = trial.seconds_of(lambda: store.write("trial", values).wait())
        reading = trial.seconds_of(lambda: store.read("trial", values).wait())
    finally:
        store.close()
    return values.nbytes / reading, values.nbytes / writing
