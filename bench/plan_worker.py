"""One configuration of the plan benchmark on one rank: measure the machine, take some steps, predict one.

python -m megalith.bench.plan_worker OPTIONS_JSON RESULT_FILE
"""

import dataclasses
import json
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from .. import engine
from ..engine.shard import engine_of


def main() -> None:
    options = types.SimpleNamespace(**json.loads(sys.argv[1]))
    if options.ranks > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    group = dist.group.WORLD if options.ranks > 1 else None
    drive = options.engine.get("nvme_dir")
    precision = options.engine["precision"]
    config = LlamaConfig(**options.model, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).train()
    rows = torch.empty(options.batch_size, options.seq_len, dtype=torch.long, device="meta")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = engine.initialize(model, optimizer, **options.engine)
    tokens = torch.randint(config.vocab_size, rows.shape, device=options.device)
    rates, times = [], []
    timed_steps(model, optimizer, tokens, options.warmup)
    for _ in range(options.turns):  # by turns, so that a machine that grows slower does so for both
        rates.append(engine.measure_rates(options.device, precision, drive, group, trial_s=0.1))
        times.append(timed_steps(model, optimizer, tokens, options.steps) / options.steps)
    if group is None or dist.get_rank() == 0:
        with torch.device("meta"):
            again = LlamaForCausalLM(config).train()
        step_s, predicted = statistics.mean(times), predicted_s(again, rows, options, mean_rates(rates))
        result = {"step_s": step_s, "predicted_s": predicted, "predicted_to_run": predicted / step_s}
        Path(sys.argv[2]).write_text(json.dumps({"metrics": result}))
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


def predicted_s(model: torch.nn.Module, rows: torch.Tensor, options: types.SimpleNamespace, rates) -> float:
    plan = engine.plan(
        model,
        step=lambda on_meta: on_meta(input_ids=rows, labels=rows).loss,
        world_size=options.ranks,
        rates=rates,
        **options.engine,
    )
    return plan.forecast.step_s


def mean_rates(rates: list[engine.Rates]) -> engine.Rates:
    """Those by which what was timed for each would take as long in all: harmonic means."""
    fields = {name: [vars(each)[name] for each in rates] for name in vars(rates[0])}
    means = {
        name: statistics.harmonic_mean(values)
        for name, values in fields.items()
        if name not in ("call_s", "host_computes") and values[0] is not None
    }
    return dataclasses.replace(rates[0], call_s=statistics.mean(fields["call_s"]), **means)


def timed_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, count: int) -> float:
    """Seconds of some steps, the updates that the last one leaves to the next included."""
    start = time.perf_counter()
    for _ in range(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for chunk in engine_of(model).chunks:
        chunk.settle()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
