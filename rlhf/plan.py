"""What training a model would store, move and take, before anything is allocated: here or on a machine elsewhere.

    megalith plan llama-7B --strategy gemini_cpu --batch_size 4 --max_length 2048
    megalith plan opt-175b --strategy gemini_cpu --machine a100 --world_size 32 --device_budget 50GB
        --device_memory 80GB --gradient_checkpointing true --batch_size 4 --max_length 2048

The table is of one rank. It comes from the run's own code, executed on tensors without memory (engine/rehearsal.py).
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from .. import engine
from .arguments import ModelArguments, StrategyArguments, parse
from .errors import InputError, exit_on_input_error, nearest, require
from .models import build_on_meta, load_source
from .strategy import STRATEGIES, check_checkpointing, choose_device, engine_options

# Sustained rates of one of the eight GPUs of a node that are assumed, not measured: products in bf16; a link and a
# network of its own; its eighth of the node's memory bandwidth (300 GB/s, 28 bytes a parameter) and of four drives.
_NODE = {"call_s": 5e-6, "host_adam_numel": 1.3e9, "disk_read_bytes": 3e9, "disk_write_bytes": 1.4e9}
MACHINES = {
    "a100": engine.Rates(
        compute_flops=2.0e14,
        memory_bytes=1.5e12,
        device_adam_numel=5e10,
        link_in_bytes=25e9,
        link_out_bytes=25e9,
        collective_bytes=20e9,
        **_NODE,
    ),
    "h100": engine.Rates(
        compute_flops=4.5e14,
        memory_bytes=2.6e12,
        device_adam_numel=8e10,
        link_in_bytes=52e9,
        link_out_bytes=52e9,
        collective_bytes=40e9,
        **_NODE,
    ),
}
MACHINES["h200"] = dataclasses.replace(MACHINES["h100"], compute_flops=5.5e14, memory_bytes=3.8e12)


@dataclass(frozen=True)
class PlanArguments:
    """What is planned."""

    world_size: int = HfArg(default=1, help="ranks")
    batch_size: int = HfArg(default=4, help="rows a micro-batch on each rank")
    max_length: int = HfArg(default=512, aliases=["--max_len"], help="tokens a row")
    accumulation_steps: int = HfArg(default=1, help="micro-batches an optimizer step")
    machine: Literal["here", "a100", "h100", "h200"] = HfArg(
        default="here", help="here: rates are measured in some seconds; else assumed ones of a node of eight"
    )
    rates: str = HfArg(default="", help="rates that replace those, such as link_in_bytes=2e10,compute_flops=1e14")
    device_memory: str | None = HfArg(
        default=None, help="what the device has, for activations too; default: --device_budget"
    )

    def __post_init__(self):
        for name in ("world_size", "batch_size", "accumulation_steps"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.max_length > 1, "max_length", self.max_length, "> 1")


@dataclass(frozen=True)
class Case:
    """One thing to plan; what is changed when it does not fit are copies of it."""

    plan: PlanArguments
    strategy: StrategyArguments
    model: ModelArguments


def chosen_rates(plan_args, options, device):
    """Raises InputError for a rate that is not one."""
    if plan_args.machine == "here":
        states = options["state_precision"]
        rates = engine.measure_rates(device, options["precision"], options["nvme_dir"], state_precision=states)
        rates = dataclasses.replace(rates, collective_bytes=1e9)  # a guess, which --rates replaces
    else:
        rates = MACHINES[plan_args.machine]
    known = [field.name for field in dataclasses.fields(engine.Rates) if field.name != "host_computes"]
    for item in filter(None, plan_args.rates.split(",")):
        name, _, value = item.partition("=")
        if name.strip() not in known:
            raise InputError(f"--rates {item}: unknown{nearest(name, known)} (known: {', '.join(known)})")
        try:
            rates = dataclasses.replace(rates, **{name.strip(): float(value)})
        except ValueError:
            raise InputError(f"--rates {item}: {value!r} is not a number") from None
    return rates


def make_plan(case, source, rates, options, device):
    """Raises InputError where the engine refuses."""
    model = build_on_meta(source, case.model.gradient_checkpointing)
    model.train()
    rows = torch.empty(case.plan.batch_size, case.plan.max_length, dtype=torch.long, device="meta")
    try:
        return engine.plan(
            model,
            world_size=case.plan.world_size,
            accumulation_steps=case.plan.accumulation_steps,
            step=lambda on_meta: on_meta(input_ids=rows, labels=rows, use_cache=False).loss,
            rates=rates,
            on_gpu=device.type == "cuda",
            **options,
        )
    except (engine.OutOfBudgetError, ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None


def room_of(case):
    given = {
        engine.Tier.DEVICE: case.plan.device_memory or case.strategy.device_budget,
        engine.Tier.HOST: case.strategy.host_budget,
    }
    return {tier: engine.parse_bytes(value, tier.value) for tier, value in given.items() if value is not None}


def changes_of(case, plan):
    """(what to say, the changed case), cheapest first."""
    replace = dataclasses.replace
    name = case.strategy.strategy.removeprefix("colossalai_")
    device = room_of(case).get(engine.Tier.DEVICE)
    if plan is not None and device is not None and case.strategy.device_budget is not None:
        left = int(0.95 * (device - plan.forecast.activation_peak_bytes))
        if left > 0:
            strategy = replace(case.strategy, device_budget=str(left))
            text = f"--device_memory {device} --device_budget {left / 1e9:.3f}GB, which leaves room for activations"
            kept = replace(case.plan, device_memory=str(device))
            yield text, replace(case, strategy=strategy, plan=kept)
    if not case.model.gradient_checkpointing:
        changed = replace(case, model=replace(case.model, gradient_checkpointing=True))
        yield "--gradient_checkpointing true", changed
        case = changed
    for strategy in ("zero3", "gemini_cpu", "gemini_auto"):
        if STRATEGIES.get(name) != STRATEGIES[strategy]:
            changed = replace(case, strategy=replace(case.strategy, strategy=strategy))
            yield f"--gradient_checkpointing true --strategy {strategy}", changed
    if case.plan.batch_size > 1:
        text = f"--gradient_checkpointing true --strategy gemini_cpu --batch_size {case.plan.batch_size // 2}"
        strategy = replace(case.strategy, strategy="gemini_cpu")
        yield text, replace(case, strategy=strategy, plan=replace(case.plan, batch_size=case.plan.batch_size // 2))


def report(case):
    check_checkpointing(case.strategy, case.model)
    source = load_source(case.model)
    device = choose_device(case.strategy.device) if case.plan.machine == "here" else torch.device("cuda")

    def planned(case):
        return make_plan(case, source, rates, engine_options(case.strategy, device, 1.0, 42), device)

    options = engine_options(case.strategy, device, 1.0, 42)
    room = room_of(case)
    print("measuring this machine …" if case.plan.machine == "here" else "rates are assumed, not measured", flush=True)
    rates = chosen_rates(case.plan, options, device)
    plan = None
    try:
        plan = planned(case)
        print(plan)
        problems = plan.problems(room)
    except InputError as error:
        problems = [str(error)]
    if plan is not None:
        tokens = case.plan.batch_size * case.plan.max_length * case.plan.accumulation_steps * case.plan.world_size
        print(f"{tokens:,} tokens a step, {tokens / plan.forecast.step_s:,.0f} tokens a second on all ranks")
    if not problems:
        print("it fits" if room else "no budgets were given to fit into")
        return
    print("it does not fit:", *problems, sep="\n  ", flush=True)
    for text, changed in changes_of(case, plan):
        try:
            if not planned(changed).problems(room):
                print(f"it fits with {text}")
                return
        except InputError:
            continue
    print("nothing that was tried fits: take more ranks, larger budgets, gemini_nvme with --nvme_dir, or fewer tokens")


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--pretrain", *argv]

    def run():
        model_args, strategy_args, plan_args = parse(
            (ModelArguments, StrategyArguments, PlanArguments), argv, "megalith plan"
        )
        report(Case(plan_args, strategy_args, model_args))

    exit_on_input_error(run)


if __name__ == "__main__":
    main()
