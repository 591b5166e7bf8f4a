"""Reinforcement learning without a critic: GRPO against a reward model, a Python function or a server.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_grpo prompts.csv --pretrain SFT
    --reward_function judge.py:reward --num_generations 8 --strategy zero3 --save_path OUT

or `megalith grpo …` with the same options. What an iteration computes is in `experience` and `grpo`.
"""

import sys

from .arguments import LoraArguments, ModelArguments, StrategyArguments
from .errors import exit_on_input_error
from .experience import collect
from .grpo import learn
from .learner import GRPOArguments, ScoreArguments
from .ppo_models import RLOptimization
from .rl_run import RLRun
from .rl_setup import JudgeArguments, PromptArguments, RLOptions, RLOutputArguments, parse_after_prompts, prepare
from .rollout import RolloutArguments
from .strategy import process_group

GROUPS = (  # as in RLOptions
    ModelArguments,
    StrategyArguments,
    PromptArguments,
    JudgeArguments,
    RolloutArguments,
    ScoreArguments,
    GRPOArguments,
    RLOptimization,
    LoraArguments,
    RLOutputArguments,
)


def train(*groups):
    options = RLOptions(*groups)
    preparation = prepare(options)
    with process_group(preparation.device) as ranks:
        run = RLRun(options, preparation, ranks, options.update.num_generations)
        while run.learner.iteration < run.iterations:
            experience = collect(run.learner, run.next_prompts())
            metrics = learn(run.learner, experience)
            run.finish_iteration(experience, metrics)
        run.finish()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    exit_on_input_error(lambda: train(*parse_after_prompts(GROUPS, argv, prog="megalith grpo")))


if __name__ == "__main__":
    main()
