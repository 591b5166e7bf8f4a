"""Does RLHF learn on this machine? PPO on tasks whose optimum is known, and controls that must not learn.

    megalith doctor            # every task, seeds 0, 1 and 2: minutes
    megalith doctor --quick    # a short subset, one seed

Prints a table of verdicts: the median over the seeds against the exact optimum and the pass line. Exit status 1 when
any line is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from . import doctor_tasks as tasks
from .arguments import LoraArguments
from .doctor_run import Setting, run
from .doctor_tasks import Task
from .errors import exit_on_input_error
from .learner import PPOArguments
from .strategy import process_group


@dataclass(frozen=True)
class Check:
    """A task, how it is run, and what has to hold of the measurement. `value` is what the table shows and the medians
    are of; `passes(value)` is the pass line, in words `line`."""

    name: str
    task: Task
    value: Callable
    passes: Callable
    line: str
    setting: Setting = Setting()
    quick: bool = False


def objective_share(task):
    """J / J*."""
    return lambda measured: measured.objective / task.optimum.objective


def distance_from_curve(task):
    """The larger relative distance of E[r] and KL from those of the optimum."""
    best = task.optimum
    return lambda m: max(abs(m.reward - best.reward) / best.reward, abs(m.kl - best.kl) / best.kl)


def reward(measured):
    return measured.reward


def negated(task):
    return Setting(reward=lambda prompt, completion: -task.reward(prompt, completion))


def checks():
    """All checks. The pass lines were set before anything was run, and are not to be moved to what was measured."""
    counting, trade, stopping = tasks.count(), tasks.count(vocab=8, new_tokens=4), tasks.stop()
    gentle = tasks.count(vocab=8, new_tokens=4, beta=0.1)
    delayed, soft = tasks.delayed(), tasks.delayed(beta=0.2)
    valued = tasks.values()
    critic_alone = PPOArguments(ppo_epochs=4, train_batch_size=128, critic_warmup=valued.iterations, lam=1.0)
    known = 1 - 1 / valued.new_tokens  # share of the returns' variance
    short = replace(trade, iterations=12)
    lora = Setting(lora_args=LoraArguments(lora_rank=4, lora_target_modules="c_attn,c_fc,c_proj,lm_head"), lr=1e-2)
    start = 1 / short.vocab  # E[r] of the uniform policy
    learning = [
        Check("count: J / J*", counting, objective_share(counting), lambda v: v >= 0.85, "≥ 0.85"),
        Check("trade-off β .05: off the curve", trade, distance_from_curve(trade), lambda v: v <= 0.1, "≤ 0.10",
              quick=True),
        Check("trade-off β .1: off the curve", gentle, distance_from_curve(gentle), lambda v: v <= 0.1, "≤ 0.10"),
        Check("stop at token 4: success", stopping, reward, lambda v: v >= 0.9, "≥ 0.90", quick=True),
        Check("stop: truncated", stopping, lambda m: m.truncated, lambda v: v <= 0.01, "≤ 0.01"),
        Check("copy, learned positions: success", tasks.copy("gpt2"), reward, lambda v: v >= 0.95, "≥ 0.95"),
        Check("copy, rotary positions: success", tasks.copy("llama"), reward, lambda v: v >= 0.95, "≥ 0.95"),
        Check("delayed credit β .05: success", delayed, reward, lambda v: v >= 0.95, "≥ 0.95"),
        Check("delayed credit β .2: off P*", soft, lambda m: abs(m.reward - soft.optimum.reward), lambda v: v <= 0.05,
              "≤ 0.05"),
        Check("delayed credit: critic explains", delayed, lambda m: m.explained_variance, lambda v: v > 0.5, "> 0.50"),
        Check("values: off what can be explained", valued, lambda m: abs(m.explained_variance - known),
              lambda v: v <= 0.15, "≤ 0.15", Setting(ppo=critic_alone), quick=True),
        Check("LoRA rank 4: J / J*", trade, objective_share(trade), lambda v: v >= 0.8, "≥ 0.80", lora),
        Check("ZeRO-3 on the host: off the curve", trade, distance_from_curve(trade), lambda v: v <= 0.1, "≤ 0.10",
              Setting(strategy="zero3_cpu")),
    ]  # fmt: skip
    controls = [
        Check("control: rate 0, KL", short, lambda m: abs(m.kl), lambda v: v < 1e-6, "< 1e-6", Setting(lr=0.0),
              quick=True),
        Check("control: constant reward, KL", short, lambda m: m.kl, lambda v: v < 0.05, "< 0.05",
              Setting(reward=lambda prompt, completion: 1.0), quick=True),
        Check("control: negated reward, E[r]", short, reward, lambda v: v < start, f"< {start:.3f}", negated(short),
              quick=True),
        Check("control: β 10, KL", short, lambda m: m.kl, lambda v: v < 0.01, "< 0.01", Setting(beta=10.0),
              quick=True),
    ]  # fmt: skip
    return learning + controls


def examine(chosen, seeds, ranks):
    """[(Check, [value of each seed], whether the median passes)]; a task in one setting is run once for all its
    checks."""
    runs = {}
    wanted = {(id(check.task), id(check.setting)): check for check in chosen}
    total = sum(check.task.iterations for check in wanted.values()) * len(seeds)
    with tqdm(total=total, unit="iteration", disable=not ranks.is_first, dynamic_ncols=True) as bar:
        for key, check in wanted.items():
            runs[key] = [run(check.task, seed, ranks, check.setting, bar.update) for seed in seeds]
    results = []
    for check in chosen:
        values = [check.value(measured) for measured in runs[id(check.task), id(check.setting)]]
        results.append((check, values, bool(check.passes(statistics.median(values)))))
    return results


def table(results):
    lines = [f"{'check':<36}{'median':>10}{'range':>20}{'line':>10}  verdict"]
    for check, values, passed in results:
        spread = f"{min(values):.3f} to {max(values):.3f}"
        verdict = "pass" if passed else "FAIL"
        lines.append(f"{check.name:<36}{statistics.median(values):>10.3f}{spread:>20}{check.line:>10}  {verdict}")
    return "\n".join(lines)


def main(argv=None):
    exit_on_input_error(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = argparse.ArgumentParser(prog="megalith doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short subset, with the first seed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    chosen = [check for check in checks() if check.quick or not options.quick]
    with process_group(torch.device("cpu")) as ranks:
        results = examine(chosen, options.seeds[:1] if options.quick else options.seeds, ranks)
    print(table(results))
    failed = sum(not passed for _, _, passed in results)
    print(f"{len(results) - failed} of {len(results)} checks pass", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
