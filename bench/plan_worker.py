"""One configuration of the plan benchmark on one rank: measure the machine, predict a step, take some.

python -m megalith.bench.plan_worker OPTIONS_JSON RESULT_FILE
"""

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

    rates = [engine.measure_rates(options.device, precision, drive, group)]
    predictions = [predicted_s(model, rows, options, rates[0])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = engine.initialize(model, optimizer, **options.engine)
    tokens = torch.randint(config.vocab_size, rows.shape, device=options.device)
    times = [timed_step(model, optimizer, tokens) for _ in range(options.warmup + options.steps)][options.warmup :]
    rates.append(engine.measure_rates(options.device, precision, drive, group))
    with torch.device("meta"):
        again = LlamaForCausalLM(config).train()
    predictions.append(predicted_s(again, rows, options, rates[1]))  # with the speed that the machine has by now
    if group is None or dist.get_rank() == 0:
        step_s, predicted = statistics.median(times), statistics.mean(predictions)
        result = {"step_s": step_s, "predicted_s": predicted, "predicted_to_run": predicted / step_s}
        Path(sys.argv[2]).write_text(json.dumps({"metrics": result, "rates": [vars(each) for each in rates]}))
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


def timed_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """Seconds of a step; what it leaves to the next one is counted there."""
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
