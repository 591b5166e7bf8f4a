"""One rank of one entry of the step benchmark: wrap the model as the peer would, train it, write down what was seen.

Run by its path, `python step_worker.py OPTIONS_JSON RESULT_FILE`, once a rank, with the variables that torchrun sets.
DeepSpeed lives in an environment of its own, where megalith is not installed: so this file imports the package only in
`build_megalith`, and each peer only where that peer is built. The training loop is the same for all of them.
"""

import contextlib
import copy
import importlib.metadata
import json
import os
import re
import statistics
import sys
import time
import types
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import transformers

PACKAGES = ("torch", "transformers", "triton", "deepspeed")


def main():
    options = types.SimpleNamespace(**json.loads(sys.argv[1]))
    rank = int(os.environ["RANK"])
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"]) if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.process_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    start_rss_bytes = psutil.Process().memory_info().rss  # of the interpreter and what is imported above
    torch.manual_seed(0)  # the same weights on every rank and for every peer
    config = transformers.LlamaConfig(**options.model, use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(device).train()
    model_numel = sum(p.numel() for p in model.parameters())
    # One batch a rank, seen again at every step: its loss falls fast, and a wrong update shows in it.
    generator = torch.Generator().manual_seed(1 + rank)
    size = (options.batch_size, options.seq_len)
    tokens = torch.randint(options.model["vocab_size"], size, generator=generator).to(device)

    step = BUILDERS[options.peer](model, options, device)
    losses = [step(tokens).detach() for _ in range(options.warmup)]
    barrier(device)
    moved_before = moved_bytes(model, options)
    busy_s, cpu_s, start_s = machine_busy_s(), time.process_time(), time.perf_counter()
    losses += [step(tokens).detach() for _ in range(options.steps)]
    barrier(device)
    wall_s = time.perf_counter() - start_s
    busy_s, cpu_s = machine_busy_s() - busy_s, time.process_time() - cpu_s
    moved = {way: (nbytes - moved_before[way]) / options.steps for way, nbytes in moved_bytes(model, options).items()}

    mine = {
        "losses": [float(loss) for loss in losses],
        "cpu_s": cpu_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "start_rss_bytes": start_rss_bytes,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }
    if options.trace:
        export_trace(step, tokens, Path(options.trace) / f"{options.entry}-rank{rank}.json")
    ranks = all_gather(mine)
    if rank == 0:
        cpu_s = sum(r["cpu_s"] for r in ranks)
        metrics = {
            "tokens_per_s": tokens.numel() * len(ranks) * options.steps / wall_s,
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in ranks),
            "own_rss_bytes": max(r["peak_rss_bytes"] - r["start_rss_bytes"] for r in ranks),
            "peak_rss_sum_bytes": sum(r["peak_rss_bytes"] for r in ranks),
            "step_s": wall_s / options.steps,
            "cpu_s_per_step": cpu_s / options.steps,
            # What the rest of the machine did meanwhile, of all its cores: it tells a reading taken in noise.
            "other_load_share": max(0.0, busy_s - cpu_s) / (wall_s * psutil.cpu_count()),
        }
        if options.peer == "beside_plain":
            metrics |= step.metrics(options.steps, tokens.numel())
        if "drive" in moved:
            metrics["drive_bytes"] = moved["drive"]
            metrics["drive_floor_s"] = moved["drive"] / drive_bytes_per_s(options.nvme_dir)
            metrics["drive_use_share"] = metrics["drive_floor_s"] / metrics["step_s"]
        elif moved:
            metrics["link_bytes"] = sum(moved.values())
            metrics["link_floor_s"] = link_floor_s(moved, options)
        if device.type == "cuda":
            metrics["peak_cuda_bytes"] = max(r["peak_cuda_bytes"] for r in ranks)
            if options.peer == "megalith" and options.placement == "host":
                metrics["updated_by_device_share"] = updated_by_device(model)
        result = {
            "metrics": metrics,
            "losses": [sum(each) / len(ranks) for each in zip(*(r["losses"] for r in ranks), strict=True)],
            "model_numel": model_numel,
            "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        }
        Path(sys.argv[2]).write_text(json.dumps(result))
    if dist.is_initialized():
        barrier(device)
        dist.destroy_process_group()


# Peers: each returns step(tokens) -> loss, which does forward, backward and update.


def build_plain(model, options, device):
    return torch_step(model, fused_adamw(model, options), autocast(options, device))


def build_ddp(model, options, device):
    # Views into the buckets save a copy and a second set of gradients.
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return torch_step(wrapped, fused_adamw(wrapped, options), autocast(options, device))


def build_fsdp2(model, options, device):
    """`reshard_after_forward` True is ZeRO-3, False is ZeRO-2. The untied embedding and head are groups of their own:
    over gloo that is 15 % faster than to leave them to the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if options.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*model.model.layers, model.model.embed_tokens, model.lm_head, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=options.reshard_after_forward)
    return torch_step(model, fused_adamw(model, options))


def build_deepspeed(model, options, device):
    import deepspeed

    zero = {"stage": options.zero_stage}
    if device.type == "cpu":
        # The fastest, and the smallest in memory, of those tried over gloo: nothing overlaps there, and the default
        # buckets (in elements) are sized for GPUs.
        bucket = 10_000_000
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": 0}
    optimizer = fused_adamw(model, options)  # as for everybody
    if options.placement != "device":
        zero |= deepspeed_offload(options)
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=options.lr, weight_decay=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # 1.0 by default, which nobody else is asked for
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(tokens):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


def deepspeed_offload(options):
    """ZeRO-Offload, or ZeRO-Infinity with everything on a drive and its overlap, off by default, turned on."""
    if options.placement == "host":
        return {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    drive = {"device": "nvme", "nvme_path": options.nvme_dir}
    largest = options.model["vocab_size"] * options.model["hidden_size"]
    # Four tensors of each of three sub-groups: one that is read, one that is updated, one that is written.
    return {
        "offload_param": drive | {"buffer_count": 6, "buffer_size": largest},
        "offload_optimizer": drive | {"buffer_count": 12, "pipeline_read": True, "pipeline_write": True},
        "sub_group_size": largest,
    }


def build_megalith(model, options, device):
    import megalith.engine

    # Updates that wait for the next forward pass: those of the last warm-up step are timed, those of the last are not.
    model, optimizer = megalith.engine.initialize(
        model,
        torch.optim.AdamW(model.parameters(), lr=options.lr),
        zero_stage=options.zero_stage,
        placement=options.placement,
        precision=options.precision,
        nvme_dir=options.nvme_dir if options.placement == "nvme" else None,
        update_in_backward=options.update_in_backward,
    )
    return torch_step(model, optimizer)


def build_beside_plain(model, options, device):
    plain = copy.deepcopy(model)
    return BesidePlain(build_plain(plain, options, device), build_megalith(model, options, device))


class BesidePlain:
    """megalith's step and plain PyTorch's in turns in one process. Processes of one program differ by a tenth here, in
    where their pages lie and what their cores do, and two that take turns have this in common."""

    def __init__(self, plain, own):
        self._steps = {"plain": plain, "own": own}
        self._seconds = {"plain": [], "own": []}

    def __call__(self, tokens):
        losses = {}
        order = list(self._steps) if len(self._seconds["own"]) % 2 else list(reversed(self._steps))
        for name in order:
            start_s = time.perf_counter()
            losses[name] = self._steps[name](tokens)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            self._seconds[name].append(time.perf_counter() - start_s)
        return losses["own"]

    def metrics(self, steps, numel):
        """Of the last `steps` steps of each, of `numel` tokens."""
        own_s, plain_s = (statistics.median(self._seconds[name][-steps:]) for name in ("own", "plain"))
        return {"tokens_per_s": numel / own_s, "step_s": own_s, "speed_beside_plain": plain_s / own_s}


def moved_bytes(model, options):
    """What the engine has moved so far between device and host, or to and from the drive; {} where it moves nothing."""
    if options.peer != "megalith" or options.placement == "device":
        return {}
    from megalith.engine import Work
    from megalith.engine.shard import engine_of

    engine = engine_of(model)
    if options.placement == "host":
        return {"in": engine.ledger.work[Work.LINK_IN], "out": engine.ledger.work[Work.LINK_OUT]}
    store = engine.chunks[0].weight.store
    return {"drive": store.bytes_read + store.bytes_written}


def link_floor_s(moved, options):
    """At the rates of large copies: a link goes both ways at once, a CPU's memory does not."""
    from megalith.engine import measure_rates

    rates = measure_rates(options.device, options.precision)
    seconds = moved["in"] / rates.link_in_bytes, moved["out"] / rates.link_out_bytes
    return sum(seconds) if rates.host_computes else max(seconds)


def updated_by_device(model):
    """The share of all updates so far that the GPU did, of parameters whose optimizer state is on the host."""
    from megalith.engine import Work
    from megalith.engine.shard import engine_of

    work = engine_of(model).ledger.work
    return work[Work.DEVICE_ADAM] / (work[Work.DEVICE_ADAM] + work[Work.HOST_ADAM])


def drive_bytes_per_s(folder):
    """What plain large direct reads and writes reach side by side: the median of three readings."""
    from megalith.bench.nvme import plain_mixed_bytes_per_s

    return plain_mixed_bytes_per_s(folder, 2**29, rounds=3)


BUILDERS = {
    "plain": build_plain,
    "ddp": build_ddp,
    "fsdp2": build_fsdp2,
    "deepspeed": build_deepspeed,
    "megalith": build_megalith,
    "beside_plain": build_beside_plain,
}


def torch_step(model, optimizer, forward_context=contextlib.nullcontext):
    def step(tokens):
        with forward_context():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def fused_adamw(model, options):
    return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


def autocast(options, device):
    if options.precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


# Measuring.


def barrier(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def all_gather(value):
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def peak_rss_bytes():
    """High-water mark of this process; `ru_maxrss` would begin at that of the parent, since exec carries it over."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def machine_busy_s():
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


def installed_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def export_trace(step, tokens, path):
    # Lanes are threads that began before the profiler, which looks at its own thread alone unless it is told otherwise.
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=all_threads) as profile:
        for _ in range(2):
            step(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


if __name__ == "__main__":
    main()
