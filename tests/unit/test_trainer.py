"""The announcement's Python: its names, its order of calls, prompts of every kind."""

import copy

import megalith.rlhf
import pytest
import torch
from megalith.rlhf import (
    GPTActor,
    GPTCritic,
    LlamaActor,
    LlamaCritic,
    OPTActor,
    OPTCritic,
    PPOTrainer,
    RewardModel,
    Strategy,
)
from megalith.rlhf.errors import InputError
from megalith.rlhf.tokenizer import byte_tokenizer
from ppo_cases import PROMPTS, VOCAB, reward_of_even_tokens, whole
from tiny import config_of
from transformers import AutoModelForCausalLM

OPTIONS = dict(max_length=12, train_batch_size=2, experience_batch_size=4, lr=1e-3, critic_lr=1e-3)


@pytest.fixture(scope="module")
def strategy():
    strategy = Strategy(stage=3, placement_policy="cpu", device="cpu")
    yield strategy
    strategy.close()


def models(strategy, family="gpt2", actor=GPTActor, critic=GPTCritic, vocab_size=VOCAB, **changes):
    config = config_of(family, vocab_size=vocab_size, **changes)
    with strategy.model_init_context():
        actor, critic = actor(config=config), critic(config=config)
        initial_model = copy.deepcopy(actor)
        reward_model = RewardModel(copy.deepcopy(critic.model))
    return actor, critic, reward_model, initial_model


@pytest.mark.parametrize(
    "classes", [("gpt2", GPTActor, GPTCritic), ("opt", OPTActor, OPTCritic), ("llama", LlamaActor, LlamaCritic)]
)
def test_the_announcements_lines(strategy, classes, tmp_path):
    trainer = PPOTrainer(strategy, *models(strategy, *classes), **OPTIONS)
    before = whole(trainer.learner.actor.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(trainer.learner.reference).items())
    prompts = [torch.tensor(prompt.ids) for prompt in PROMPTS]
    steps = []
    rows = trainer.fit(prompts, num_episodes=2, on_step=steps.append)
    assert len(rows) == 4 and rows == steps
    assert 0 < rows[0]["val/length"] <= max(12 - len(prompt.ids) for prompt in PROMPTS)
    assert rows[0]["objective/kl"] == 0 and rows[0]["objective/scores_std"] > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in whole(trainer.learner.actor.model).items())
    trainer.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", local_files_only=True).state_dict()
    last = whole(trainer.learner.actor.model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in last.items())


def test_an_own_optimizer_and_a_reward_function(strategy):
    actor, critic, _, initial = models(strategy)
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-4, betas=(0.9, 0.9))
    trainer = PPOTrainer(strategy, actor, critic, reward_of_even_tokens, initial, optimizer, **OPTIONS)
    assert trainer.learner.actor.optimizer.param_groups is optimizer.param_groups
    [row] = trainer.fit([[4, 5, 6]] * 4)
    assert row["lr"] == 5e-4 and row["objective/scores"] > 0


def test_prompts_as_strings_and_in_loaders(strategy):
    tokenizer = byte_tokenizer()
    models_of_bytes = models(strategy, vocab_size=len(tokenizer))
    trainer = PPOTrainer(strategy, *models_of_bytes, tokenizer=tokenizer, **OPTIONS)
    batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    loaders = (
        torch.utils.data.DataLoader([torch.tensor([5, 6]), torch.tensor([7, 8])], batch_size=2),
        torch.utils.data.DataLoader([batch], batch_size=None),
        torch.utils.data.DataLoader(["ab", "c", "d"], batch_size=2),
    )
    expected = ([(5, 6), (7, 8)], [(5, 6), (7, 8, 9)], [tuple(tokenizer(text).input_ids) for text in ("ab", "c", "d")])
    for loader, ids in zip(loaders, expected, strict=True):
        assert [prompt.ids for prompt in trainer._prompts(loader)] == ids
    assert len(trainer.fit(loaders[2], num_episodes=1)) == 1


def test_mistakes_are_named(strategy):
    actor, critic, reward_model, initial = models(strategy)
    with pytest.raises(InputError, match="placement_policy='gpu'"):
        Strategy(placement_policy="gpu")
    with pytest.raises(ValueError, match="zero_stage=4"):
        Strategy(stage=4)
    with pytest.raises(TypeError, match="no option 'top_k'"):
        PPOTrainer(strategy, actor, critic, reward_model, initial, top_k=50)
    with pytest.raises(InputError, match="initial_model=None"):
        PPOTrainer(strategy, actor, critic, reward_model, None)
    trainer = PPOTrainer(strategy, actor, critic, reward_model, initial, **OPTIONS)
    for prompts, message in (
        (["text"], "no tokenizer"),
        ([torch.zeros(2, 3, dtype=torch.int64)], "1-D tensor of token ids, not torch.int64 of shape"),
        ([], "no prompts"),
        ([list(range(1, 13))] * 4, "--max_length is 12; it has to be more than a prompt's 12 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            trainer.fit(prompts)
    with pytest.raises(AttributeError, match="no attribute 'T5Actor'"):
        megalith.rlhf.T5Actor  # noqa: B018
