"""One try of the capacity benchmark: build a model of the size asked for, train two steps, tell what it took.

    python -m megalith.bench.capacity_worker OPTIONS_JSON RESULT_FILE

Exits with OUT_OF_MEMORY where memory or the drive did not suffice, and with another status for any other error. Three
losses are taken on the same tokens, the last one in a forward pass alone: so both updates have been made and can be
seen.
"""

import contextlib
import json
import re
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

OUT_OF_MEMORY = 3
"""Exit status."""

ALLOCATION_FAILED = re.compile("can't allocate memory|out of memory|Cannot allocate memory|bad_alloc|No space left")


@dataclass
class Trainee:
    """A model under one of the systems that are compared."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    forward_context: Callable = contextlib.nullcontext
    tiers: Callable[[], dict[str, int]] = field(default=dict)
    """Peak bytes by tier, of a system that has tiers."""


def main() -> None:
    options = types.SimpleNamespace(**json.loads(sys.argv[1]))
    try:
        result = train(options)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not ALLOCATION_FAILED.search(str(error)):
            raise
        print(f"{type(error).__name__}: {error}")
        sys.exit(OUT_OF_MEMORY)
    Path(sys.argv[2]).write_text(json.dumps(result))


def train(options: types.SimpleNamespace) -> dict:
    device = torch.device(options.device)
    if device.type == "cuda" and options.device_budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.device_budget / total)
    torch.manual_seed(0)
    tell(options, "building the model")
    trainee = BUILDERS[options.peer](LlamaConfig(**options.model, use_cache=False), options, device)
    model = trainee.model.train()
    tokens = torch.randint(options.model["vocab_size"], (options.batch_size, options.seq_len)).to(device)

    losses: list[float] = []
    step_s = step_io = None
    for number in (1, 2):
        tell(options, f"step {number} of 2")
        start_s, start_io = time.perf_counter(), io_bytes()
        with trainee.forward_context():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        # The first step records traces and touches memory for the first time: the second one counts.
        step_s, step_io = time.perf_counter() - start_s, [b - a for a, b in zip(start_io, io_bytes(), strict=True)]
    tell(options, "a last forward pass")
    with torch.no_grad(), trainee.forward_context():
        losses.append(model(input_ids=tokens, labels=tokens).loss.item())
    metrics = {
        "tokens_per_s": tokens.numel() / step_s,
        "peak_rss_bytes": peak_rss_bytes(),
        **{f"{tier}_bytes": nbytes for tier, nbytes in trainee.tiers().items()},
        "read_a_step_bytes": step_io[0],
        "written_a_step_bytes": step_io[1],
    }
    if device.type == "cuda":
        metrics["peak_cuda_bytes"] = torch.cuda.max_memory_reserved()
    return {"metrics": metrics, "losses": losses}


def tell(options: types.SimpleNamespace, phase: str) -> None:
    Path(options.progress).write_text(phase)


# Systems: each makes a trainable model on `device`, as its own documents say.


def build_native(config, options, device):
    """Plain PyTorch with fused AdamW; weights in float32, in bf16 the operations are autocast."""
    with device:
        model = LlamaForCausalLM(config)
    checkpoint_activations(model, options)
    context = contextlib.nullcontext
    if options.precision == "bf16":
        context = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    return Trainee(model, torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True), context)


def build_fsdp2(config, options, device):
    """FSDP2 with everything offloaded to the host: made on meta, materialised there, initialised a module at a time."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    checkpoint_activations(model, options)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if options.precision == "bf16" else MixedPrecisionPolicy()
    keywords = {
        "mesh": dist.init_device_mesh(device.type, (1,)),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    }
    for module in [*model.model.layers, model.model.embed_tokens, model.lm_head, model]:
        fully_shard(module, **keywords)
    model.to_empty(device="cpu")
    # Buffers (of the rotary embedding) are computed, not loaded, and live where the computation is.
    rotary = type(model.model.rotary_emb)(config=config).to(device)
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        local = parameter.to_local().data
        local.fill_(1.0) if parameter.dim() == 1 else local.normal_(std=config.initializer_range)
    return Trainee(model, torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True))


def build_megalith(config, options, device):
    """On meta, initialised by the engine."""
    import megalith.engine

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    checkpoint_activations(model, options)
    keywords = dict(options.engine)
    if device.type == "cuda" and options.device_budget is not None:
        keywords["device_budget"] = options.device_budget
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    model, optimizer = megalith.engine.initialize(model, optimizer, precision=options.precision, **keywords)

    def tiers():
        return {tier: rows["total"]["peak_bytes"] for tier, rows in megalith.engine.memory_report(model).items()}

    return Trainee(model, optimizer, tiers=tiers)


BUILDERS = {"native": build_native, "fsdp2": build_fsdp2, "megalith": build_megalith}


def checkpoint_activations(model, options):
    if options.checkpoint_activations:
        # transformers 5.24 has renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


# Measuring.


def peak_rss_bytes() -> int:
    """High-water mark of this process; `ru_maxrss` would begin at that of the parent, since exec carries it over."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def io_bytes() -> list[int]:
    """Bytes that this process has read from drives and sent to them; zeros where the system does not tell."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return [0, 0]
    return [int(fields["read_bytes"]), int(fields["write_bytes"])]


if __name__ == "__main__":
    main()
