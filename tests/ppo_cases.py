"""A PPO of tiny models that the tests share: made in Python, with no files and no tokenizer."""

from types import SimpleNamespace

import megalith.engine as engine
import torch
from megalith.rlhf import ppo_models, shared_base
from megalith.rlhf.arguments import LoraArguments
from megalith.rlhf.experience import collect
from megalith.rlhf.learner import Learner, PPOArguments, RewardArguments
from megalith.rlhf.models import Source
from megalith.rlhf.ppo import learn
from megalith.rlhf.ppo_models import PPOOptimization
from megalith.rlhf.prompts import Prompt, next_prompts
from megalith.rlhf.rollout import RolloutArguments
from megalith.rlhf.strategy import STRATEGIES
from tiny import config_of

VOCAB, STOP, PAD = 17, 3, 0
PROMPTS = [Prompt(tuple(range(4, 4 + length)), None, {"goal": length}) for length in (2, 5, 3, 7, 1, 4, 6, 2)]


def reward_of_even_tokens(completion_ids):
    """The share of even tokens in an answer."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def source_of(family="llama"):
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    return Source(config_of(family, vocab_size=VOCAB, bos_token_id=1, eos_token_id=STOP), tokenizer, None)


def options_of(strategy="zero3", seed=5):
    return {**STRATEGIES[strategy], "precision": "fp32", "max_grad_norm": 1.0, "seed": seed}


def unplaced(family="llama", reward=True, reference=True):
    source = source_of(family)
    models = {"actor": ppo_models.unplaced_actor(source), "critic": ppo_models.unplaced_critic(source)}
    if reference:
        models["reference"] = ppo_models.frozen(ppo_models.unplaced_actor(source))
    if reward:
        models["reward"] = ppo_models.unplaced_reward_model(source)
    return models


def unplaced_on_one_base(judge, seed=5):
    """Policy and critic, and without `judge` a reward model, as adapters of one model."""
    lora = LoraArguments(lora_rank=2)
    actor = ppo_models.unplaced_actor(source_of(), lora_args=lora, seed=seed)
    return {"actor": shared_base.with_scorers(actor, lora, seed, None, judge is None, True)}


def make_learner(ranks, strategy="zero3", family="llama", judge=reward_of_even_tokens, iterations=4, **changes):
    """A Learner with 8 episodes a rollout over all ranks. `judge=None`: a reward model. `changes`: fields of the
    arguments, whichever they belong to, `average` (a decay), `precision`, and `share_base`."""
    rows = len(PROMPTS) // ranks.world_size
    decay = changes.pop("average", None)
    options = {**options_of(strategy), "precision": changes.pop("precision", "fp32")}
    is_shared = changes.pop("share_base", False)
    given = {
        RolloutArguments: {"experience_batch_size": rows, "max_new_tokens": 6},
        RewardArguments: {"missing_eos_penalty": 0.25},
        PPOArguments: {"train_batch_size": rows // 2, "micro_batch_size": 2, "ppo_epochs": 2},
        PPOOptimization: {"lr": 3e-3, "critic_lr": 3e-3, "seed": 5},
    }
    for name, value in changes.items():
        [owner] = [group for group in given if name in group.__dataclass_fields__]
        given[owner][name] = value
    made = {group: group(**values) for group, values in given.items()}
    optimization = made[PPOOptimization]
    has_reference = made[RewardArguments].kl_coef > 0
    models = unplaced_on_one_base(judge) if is_shared else unplaced(family, judge is None, has_reference)
    learner = Learner(
        **ppo_models.place(models, judge, optimization, iterations, ranks.device, options),
        pad_id=PAD,
        stop_ids=frozenset([STOP]),
        decode=None,
        ranks=ranks,
        seed=optimization.seed,
        rollout_args=made[RolloutArguments],
        reward_args=made[RewardArguments],
        ppo_args=made[PPOArguments],
    )
    if decay is not None:
        learner.average = engine.WeightAverage(learner.actor.model, decay)
    return learner


def iterate(learner, iterations):
    """The metrics of some iterations, without the times."""
    rows, cursor = [], (learner.iteration, 0)
    for _ in range(iterations):
        chosen, cursor = next_prompts(len(PROMPTS), len(PROMPTS), learner.seed, cursor)
        metrics = learn(learner, collect(learner, [PROMPTS[index] for index in chosen]))
        rows.append({k: v for k, v in metrics.items() if not k.startswith("timing/") and k not in TIMES})
    return rows


TIMES = ("eps", "tokens_per_s")


def whole(model):
    return dict(engine.whole_weights(model))


def cpu_ranks(rank=0, world_size=1):
    from megalith.rlhf.strategy import Ranks

    return Ranks(rank, world_size, torch.device("cpu"))
