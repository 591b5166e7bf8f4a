"""Does RLHF learn on this machine? PPO on tasks whose optimum is known, and controls that must not learn.

    megalith doctor            # every check, seeds 0, 1 and 2: minutes
    megalith doctor --quick    # a short subset, one seed
    megalith doctor --only walks

Prints a table of verdicts: the median over the seeds against the optimum and the pass line. Exit status 1 when any line
is missed. What there is to see beside (the over-optimisation of a reward model) is left in --save_path.
"""

import argparse
import os
import statistics
import sys

import torch
from tqdm import tqdm

from .doctor_checks import checks
from .errors import InputError, exit_on_input_error


def examine(chosen, seeds):
    """([(Check, [value of each seed], whether the median passes)], {trial: [what was measured with each seed]}); a
    trial is run once for all its checks."""
    trials = list(dict.fromkeys(check.trial for check in chosen))
    measured = {}
    total = sum(trial.iterations for trial in trials) * len(seeds)
    with tqdm(total=total, unit="iteration", dynamic_ncols=True) as bar:
        for trial in trials:
            measured[trial] = [trial.perform(seed, bar.update) for seed in seeds]
    results = []
    for check in chosen:
        values = [check.value(of_seed) for of_seed in measured[check.trial]]
        results.append((check, values, bool(check.passes(statistics.median(values)))))
    return results, measured


def table(results):
    lines = [f"{'check':<40}{'median':>10}{'range':>24}{'optimum':>9}{'line':>9}  verdict"]
    for check, values, passed in results:
        spread = f"{min(values):.3g} to {max(values):.3g}"
        optimum = "" if check.optimum is None else f"{check.optimum:.3g}"
        line = f"{'≥' if check.is_floor else '≤'} {check.line:.3g}"
        verdict = "pass" if passed else "FAIL"
        lines.append(f"{check.name:<40}{statistics.median(values):>10.3g}{spread:>24}{optimum:>9}{line:>9}  {verdict}")
    return "\n".join(lines)


def main(argv=None):
    exit_on_input_error(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = argparse.ArgumentParser(prog="megalith doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short subset, with the first seed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", metavar="TEXT", help="the checks whose names contain this")
    parser.add_argument("--save_path", default="doctor_out", help="folder for tables and plots beside the verdicts")
    options = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("doctor is one process, which starts a second rank by itself: leave out --nproc_per_node")
    chosen = [check for check in checks() if check.quick or not options.quick]
    chosen = [check for check in chosen if options.only is None or options.only in check.name]
    if not chosen:
        raise InputError(f"--only {options.only}: no check has this in its name")
    torch.set_num_threads(1)  # the models are tiny
    results, measured = examine(chosen, options.seeds[:1] if options.quick else options.seeds)
    for trial, of_seeds in measured.items():
        if trial.leave is not None:
            print(f"{trial.leave(of_seeds, options.save_path)}\n")
    print(table(results))
    failed = sum(not passed for _, _, passed in results)
    print(f"{len(results) - failed} of {len(results)} checks pass", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
