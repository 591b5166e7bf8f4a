"""The console script: `megalith STAGE …` runs one stage in this process, or under torchrun with `--nproc_per_node N`.

The modules of the stages are imported only when asked for: each brings in torch and transformers, which take seconds
to load.
"""

import argparse
import importlib
import sys

from .errors import InputError, exit_on_input_error, nearest

STAGES = {
    "pretrain": ("train_pretrain", "next-token loss on plain text"),
    "cut-text": ("cut_text", "plain text as rows for pretraining, cut at the ends of sentences"),
    "doctor": ("doctor", "does PPO reach known optima on this machine: tasks, controls, verdicts"),
    "dpo": ("train_dpo", "direct preference optimisation on ranked answers"),
    "eval": ("eval", "reward, win rate, KL and length against a baseline, with answers side by side"),
    "rm": ("train_rm", "reward model from ranked answers"),
    "sft": ("train_sft", "supervised fine-tuning on instructions or conversations"),
    "grpo": ("train_grpo", "reinforcement learning without a critic, from several answers to each prompt"),
    "ppo": ("train_ppo", "reinforcement learning from a reward model, a function or a server"),
    "plan": ("plan", "memory by tier, traffic and time of a step, here or on a machine elsewhere, without running it"),
    "serve": ("server", "a model behind OpenAI's API and a chat page"),
    "chat": ("chat", "a conversation in the terminal"),
    "quantize": ("quantize", "4-bit weights by GPTQ"),
}


def _usage():
    lines = [f"  {name:<10}{text}" for name, (_, text) in STAGES.items()]
    return "\n".join(
        [
            "usage: megalith STAGE [--nproc_per_node N] [options]",
            "",
            "stages:",
            *lines,
            "",
            "megalith STAGE --help lists the options.",
        ]
    )


def _launch(module, nproc_per_node, argv):
    """Run `module` under torchrun on this machine, as `torchrun --standalone --nproc_per_node N -m MODULE …` would."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if not (nproc_per_node.isdigit() and int(nproc_per_node)):
        raise InputError(f"--nproc_per_node {nproc_per_node}: has to be a number of processes")
    try:
        torchrun(["--standalone", "--nproc_per_node", nproc_per_node, "-m", module, *argv])
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != 2:
            raise
        sys.exit(2)  # a rank has said what is wrong with the input


def _imported(module):
    """The module of a stage. Raises InputError where packages are missing that only some stages need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise InputError(f"{error.name} is not installed: pip install 'megalith[serve]'") from None


def _dispatch(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    stage, *rest = argv
    if stage not in STAGES:
        raise InputError(f"unknown stage '{stage}'{nearest(stage, STAGES)} (see megalith --help)")
    module = f"{__package__}.{STAGES[stage][0]}"
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--nproc_per_node", "--nproc-per-node")
    launch, rest = launcher.parse_known_args(rest)
    if launch.nproc_per_node:
        _launch(module, launch.nproc_per_node, rest)
    else:
        _imported(module).main(rest)


def main(argv=None):
    exit_on_input_error(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
