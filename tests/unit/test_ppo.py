"""PPO's iteration on tiny models: against plain PyTorch, against definitions, and the checks that it runs on itself."""

import math

import megalith.engine as engine
import pytest
import torch
from megalith.engine.shard import engine_of
from megalith.rlhf import experience as experience_module
from megalith.rlhf import ppo as ppo_module
from megalith.rlhf import rollout
from megalith.rlhf.batches import epoch_order
from megalith.rlhf.experience import collect
from megalith.rlhf.ppo import learn
from megalith.rlhf.ppo_models import PPOOptimization, place
from megalith.rlhf.ptx import PtxStream
from megalith.rlhf.strategy import process_group
from megalith.rlhf.templates import Sample
from ppo_cases import PAD, PROMPTS, STOP, VOCAB, iterate, make_learner, options_of, source_of, unplaced, whole
from tiny import update_error
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def ranks():
    with process_group(torch.device("cpu")) as ranks:
        yield ranks


def same(rows, others, tolerance=1e-5):
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance / 10, nan_ok=True)


# What a rollout is


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_an_experience_is_what_its_models_say_of_each_row_alone(ranks, family):
    learner = make_learner(ranks, family=family, judge=None, missing_eos_penalty=0.0, temperature=0.8)
    iterate(learner, 1)  # so that actor and reference, and values and 0, differ
    experience = collect(learner, PROMPTS)
    plain = AutoModelForCausalLM.from_config(source_of(family).config).eval()
    for name, model in (("logprobs", learner.actor.model), ("ref_logprobs", learner.reference)):
        plain.load_state_dict(whole(model), strict=False)
        plain.tie_weights()
        for row, (prompt, answer) in enumerate(zip(PROMPTS, experience.rollout.answers, strict=True)):
            ids = torch.tensor([[*prompt.ids, *answer.ids]])
            with torch.no_grad():
                logprobs = (plain(input_ids=ids).logits[0] / 0.8).log_softmax(-1)
            expected = [logprobs[len(prompt.ids) - 1 + t, token].item() for t, token in enumerate(answer.ids)]
            assert getattr(experience, name)[row, : len(answer.ids)].tolist() == pytest.approx(expected, abs=1e-5)
    lengths = experience.rollout.lengths
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(zip(PROMPTS, experience.rollout.answers, strict=True)):
            ids = torch.tensor([[*prompt.ids, *answer.ids]])
            values = learner.critic.model(ids)[0]
            states = values[len(prompt.ids) - 1 : -1]
            torch.testing.assert_close(experience.values[row, : lengths[row]], states, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(experience.scores[row], learner.reward(ids)[0, -1], atol=1e-5, rtol=1e-5)
            assert answer.stopped == (answer.ids[-1] == STOP) and STOP not in answer.ids[:-1]


def test_scores_and_values_are_normalised_as_their_models_were_saved(ranks):
    learner = make_learner(ranks, judge=None, missing_eos_penalty=0.0, kl_coef=0.0)
    iterate(learner, 1)
    plain = collect(learner, PROMPTS)
    learner.score_statistics, learner.value_statistics = (0.5, 2.0), (-0.25, 4.0)
    experience = collect(learner, PROMPTS)
    assert torch.equal(experience.scores, plain.scores)  # raw, as they are logged
    mask = experience.rollout.mask
    torch.testing.assert_close(experience.values[mask], (plain.values[mask] + 0.25) / 4)
    metrics = learn(learner, experience)
    assert metrics["objective/rlhf_reward"] == pytest.approx((plain.scores.mean().item() - 0.5) / 2)


def test_models_share_a_budget_and_frozen_ones_cost_two_bytes_a_parameter(ranks):
    budgets = {"device_budget": "1MB", "host_budget": "2MB"}
    models, optimization = unplaced(), PPOOptimization()
    options = {**options_of("zero3"), "precision": "bf16", **budgets}
    placed = place(models, None, optimization, 1, ranks.device, options)
    engines = [engine_of(model) for model in (placed["actor"].model, placed["critic"].model, placed["reference"])]
    assert len({id(e.schedule._manager) for e in engines}) == 1
    for frozen in (placed["reference"], placed["reward"]):
        numel = sum(parameter.numel() for parameter in frozen.parameters())
        assert 2 * numel <= engine.memory_report(frozen)["device"]["total"]["bytes"] <= 2 * numel * 1.01
    with pytest.raises(engine.OutOfBudgetError):  # each alone would fit
        place(unplaced(), None, optimization, 1, ranks.device, {**options, "device_budget": "0.3MB"})


def test_a_rollout_differs_from_the_next_and_rows_from_each_other(ranks):
    learner = make_learner(ranks, lr=0.0, max_new_tokens=12)
    prompts = [PROMPTS[0]] * 8
    first, again = collect(learner, prompts), collect(learner, prompts)
    learner.iteration += 1
    second = collect(learner, prompts)
    answers = [tuple(answer.ids) for answer in first.rollout.answers]
    assert answers == [tuple(answer.ids) for answer in again.rollout.answers]
    assert len(set(answers)) > 4
    assert answers != [tuple(answer.ids) for answer in second.rollout.answers]


def test_the_first_iteration_starts_at_the_reference_with_values_of_zero(ranks):
    learner = make_learner(ranks)
    experience = collect(learner, PROMPTS)
    assert torch.equal(experience.logprobs, experience.ref_logprobs)
    assert not experience.values.any()
    metrics = learn(learner, experience)
    assert metrics["objective/kl"] == 0
    assert metrics["objective/rlhf_reward"] == pytest.approx(
        metrics["objective/scores"] - 0.25 * metrics["val/truncated"] / 8
    )


def test_weights_are_gathered_for_a_rollout_where_budget_and_memory_allow(ranks, monkeypatch):
    def gathers(budget):
        models = {"actor": unplaced()["actor"]}
        options = {**options_of("zero3_cpu"), "device_budget": budget}
        model = place(models, None, PPOOptimization(), 4, ranks.device, options)["actor"].model
        weights = sum(parameter.numel() * 4 for parameter in model.parameters())
        assert 60_000 < weights < 70_000
        return rollout._gathers("auto", model, ranks)

    assert gathers(None) and gathers("80KB") and not gathers("60KB")
    monkeypatch.setattr(rollout, "host_available_bytes", lambda: 100_000)
    assert not gathers(None)


def test_without_a_price_of_kl_there_is_no_reference(ranks):
    learner = make_learner(ranks, kl_coef=0.0)
    assert learner.reference is None
    assert iterate(learner, 1)[0]["objective/non_score_reward"] == 0


# The update, against plain PyTorch


def naive_update(actor, critic, learner, experience):
    """The same minibatches, a row at a time, with torch's own AdamW: written from the definitions."""
    args, rollout = learner.ppo_args, experience.rollout
    beta, count = learner.kl_coef, len(rollout)
    rows = []
    for row in range(count):
        answer = rollout.answers[row]
        length = len(answer.ids)
        kl = (experience.logprobs - experience.ref_logprobs)[row, :length]
        rewards = -beta * kl
        rewards[-1] += experience.scores[row] - (0.0 if answer.stopped else 0.25)
        values = experience.values[row, :length]
        advantages, running = torch.zeros(length), 0.0
        for t in reversed(range(length)):
            following = values[t + 1] if t + 1 < length else 0.0
            running = rewards[t] + following - values[t] + 0.95 * running
            advantages[t] = running
        rows.append((advantages, advantages + values, values, experience.logprobs[row, :length]))
    everything = torch.cat([row[0] for row in rows])
    mean, std = everything.mean(), everything.std(unbiased=False)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        for model in (actor, critic)
    ]
    for epoch in range(args.ppo_epochs):
        order = epoch_order(count, learner.seed + 1, epoch).tolist()
        for start in range(0, count, args.train_batch_size):
            policy_loss, value_loss, tokens = 0.0, 0.0, 0
            for row in order[start : start + args.train_batch_size]:
                prompt, answer = rollout.prompts[row], rollout.answers[row]
                advantages, returns, old_values, old = rows[row]
                advantages = (advantages - mean) / std
                ids = torch.tensor([[*prompt.ids, *answer.ids]])
                at = slice(len(prompt.ids) - 1, ids.shape[1] - 1)
                logprobs = actor(input_ids=ids).logits[0, at].log_softmax(-1)
                logprobs = logprobs.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
                ratio = (logprobs - old).exp()
                policy_loss -= torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
                values = critic.score(critic.model(input_ids=ids).last_hidden_state)[0, at, 0]
                clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
                value_loss += 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()
                tokens += len(answer.ids)
            for loss, model, optimizer in ((policy_loss, actor, optimizers[0]), (value_loss, critic, optimizers[1])):
                optimizer.zero_grad()
                (loss / tokens).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()


def test_an_iteration_equals_a_naive_one(ranks):
    learner = make_learner(ranks)
    actor = AutoModelForCausalLM.from_config(source_of().config)
    actor.load_state_dict(whole(learner.actor.model))
    critic = plain_critic(learner)
    before = [{n: p.detach().clone() for n, p in model.named_parameters()} for model in (actor, critic)]
    experience = collect(learner, PROMPTS)
    naive_update(actor, critic, learner, experience)
    metrics = learn(learner, experience)
    assert metrics["policy/clipfrac_avg"] > 0 and metrics["val/clipfrac_avg"] > 0
    for plain, ours, initial in ((actor, learner.actor, before[0]), (critic, learner.critic, before[1])):
        reference = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        assert update_error(initial, whole(ours.model), reference) < 1e-5


def plain_critic(learner):
    from transformers import AutoModelForSequenceClassification

    config = source_of().config
    config.num_labels, config.pad_token_id = 1, PAD
    critic = AutoModelForSequenceClassification.from_config(config)
    critic.load_state_dict(whole(learner.critic.model))
    return critic


@pytest.fixture(scope="module")
def expected(ranks):
    learner = make_learner(ranks, "ddp", kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9)
    return iterate(learner, 3), whole(learner.actor.model)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_cpu"])
def test_every_strategy_has_the_same_trajectory(ranks, expected, strategy):
    learner = make_learner(ranks, strategy, kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9)
    same(iterate(learner, 3), expected[0])


def test_the_split_into_micro_batches_changes_nothing(ranks, expected):
    changes = dict(kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9)
    same(iterate(make_learner(ranks, "ddp", micro_batch_size=3, **changes), 3), expected[0])


def test_the_samplers_log_probabilities_save_a_pass_and_change_nothing(ranks, expected, monkeypatch):
    passes = []
    genuine = experience_module.answer_logprobs
    monkeypatch.setattr(
        experience_module, "answer_logprobs", lambda model, *a: passes.append(model) or genuine(model, *a)
    )
    changes = dict(kl_target=1.0, kl_horizon=50.0, normalize_scores=True, average=0.9)
    learner = make_learner(ranks, "zero3", old_logprobs="sampler", **changes)
    same(iterate(learner, 3), expected[0], 1e-4)
    assert passes and learner.actor.model not in passes  # the reference's
    warm = make_learner(ranks, old_logprobs="sampler", critic_warmup=1)
    collect(warm, PROMPTS)
    assert warm.actor.model in passes  # no update of the actor would tell of a wrong sampler


@pytest.mark.parametrize("changes", [{}, {"share_base": True, "judge": None}])
def test_where_one_micro_batch_is_the_rollout_its_values_come_with_the_update(ranks, monkeypatch, changes):
    for split in ({"micro_batch_size": 4}, {"train_batch_size": 4}):
        sizes = {"train_batch_size": 8, "micro_batch_size": 8, **split}
        assert collect(make_learner(ranks, **sizes, **changes), PROMPTS).values is not None
    outcomes, passes = [], []
    genuine = ppo_module.answer_values
    monkeypatch.setattr(experience_module, "answer_values", lambda *given: passes.append("own") or genuine(*given))
    monkeypatch.setattr(ppo_module, "answer_values", lambda *given: passes.append("update") or genuine(*given))
    for comes_with_update in (True, False):
        learner = make_learner(ranks, train_batch_size=8, micro_batch_size=8, **changes)
        if not comes_with_update:
            monkeypatch.setattr(type(learner), "values_come_with_update", lambda *given: False)
        trained = learner.actor if changes else learner.critic
        outcomes.append((iterate(learner, 2), whole(trained.model), passes.copy()))
        passes.clear()
    (rows, weights, once), (expected_rows, expected, twice) = outcomes
    assert once == ["update"] * 4 and twice == ["own", "update", "update"] * 2
    assert rows == expected_rows and all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_what_is_frozen_stays_to_the_bit_and_the_average_is_one(ranks):
    learner = make_learner(ranks, judge=None, average=0.5, ppo_epochs=1, train_batch_size=8)
    before = {part: whole(model) for part, model in (("reference", learner.reference), ("reward", learner.reward))}
    weights = [whole(learner.actor.model)]
    for _ in range(2):  # one update each
        iterate(learner, 1)
        weights.append(whole(learner.actor.model))
    for part, model in (("reference", learner.reference), ("reward", learner.reward)):
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in whole(model).items())
    for name, average in learner.average.whole_weights():
        expected = 0.25 * weights[0][name] + 0.25 * weights[1][name] + 0.5 * weights[2][name]
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-5)


# Options


def test_epochs_end_before_the_update_that_strays(ranks):
    learner = make_learner(ranks, stop_kl=1e-9, lr=1e-2)
    [metrics] = iterate(learner, 1)
    assert metrics["policy/stopped_early"] == 1 and metrics["updates"] == 1


def test_a_warm_up_trains_the_critic_alone(ranks):
    learner = make_learner(ranks, critic_warmup=1)
    actor, critic = whole(learner.actor.model), whole(learner.critic.model)
    iterate(learner, 1)
    assert all(torch.equal(tensor, actor[name]) for name, tensor in whole(learner.actor.model).items())
    assert any(not torch.equal(tensor, critic[name]) for name, tensor in whole(learner.critic.model).items())
    iterate(learner, 1)
    assert any(not torch.equal(tensor, actor[name]) for name, tensor in whole(learner.actor.model).items())


def test_an_overflow_skips_the_step_of_its_own_model_alone(ranks):
    learner = make_learner(ranks, precision="fp16", judge=None, average=0.5, ppo_epochs=1, train_batch_size=8)
    parts, scale = learner.parts, 2.0**100

    def weights():
        return {name: whole(part.model) for name, part in parts.items()}

    def moved(before):
        return {
            name: any(not torch.equal(tensor, before[name][n]) for n, tensor in now.items())
            for name, now in weights().items()
        }

    for overflows in ("critic", "actor"):
        before, average = weights(), dict(learner.average.whole_weights())
        finite, parts[overflows].optimizer.scaler.scale = parts[overflows].optimizer.scaler.scale, scale
        [metrics] = iterate(learner, 1)
        assert moved(before) == {name: name != overflows for name in parts}
        assert [metrics["skipped_steps"], metrics["critic_skipped_steps"]] == [int(overflows == "actor"), 1]
        stayed = all(
            torch.equal(tensor, average[name]) for name, tensor in dict(learner.average.whole_weights()).items()
        )
        assert stayed == (overflows == "actor")  # the average is of updates
        assert parts[overflows].optimizer.scaler.scale == scale / 2
        parts[overflows].optimizer.scaler.scale = finite
    before = weights()
    iterate(learner, 1)
    assert moved(before) == dict.fromkeys(parts, True)


def test_the_adaptive_price_of_kl(ranks):
    learner = make_learner(ranks, kl_target=1.0, kl_horizon=80.0)
    assert iterate(learner, 1)[0]["objective/kl_coef"] == 0.05
    assert learner.kl_coef == pytest.approx(0.05 * (1 - 0.2 * 8 / 80))


def test_a_reward_function_gets_columns_and_tokens(ranks):
    seen = {}

    def judge(prompts, completions, goal, stopped, completion_ids):
        seen.update(prompts=prompts, completions=completions, goal=goal, stopped=stopped, ids=completion_ids)
        return list(range(len(goal)))

    experience = collect(make_learner(ranks, judge=judge), PROMPTS)
    assert experience.scores.tolist() == list(range(8))
    assert seen["goal"] == [len(prompt.ids) for prompt in PROMPTS]
    assert seen["prompts"] == [list(prompt.ids) for prompt in PROMPTS]
    for ids, completion, stopped in zip(seen["ids"], seen["completions"], seen["stopped"], strict=True):
        assert completion == (ids[:-1] if stopped else ids)


# PTX


def ptx(ranks, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (6, 9, 4, 7, 5, 8):
        ids = torch.randint(4, VOCAB, (length,), generator=generator).int().numpy()
        samples.append(Sample(ids, torch.arange(length).ge(2).numpy()))
    return PtxStream(samples, batch_size, PAD, 7, ranks)


def test_ptx_alone_is_fine_tuning(ranks):
    learner = make_learner(ranks, ptx_coef=1.0, ptx_mix="convex", ppo_epochs=1, train_batch_size=8, micro_batch_size=8)
    learner.ptx = ptx(ranks, batch_size=6)
    plain = AutoModelForCausalLM.from_config(source_of().config)
    plain.load_state_dict(whole(learner.actor.model))
    loss, count = 0.0, 0
    for sample in learner.ptx._samples:
        ids = torch.from_numpy(sample.ids).long()[None]
        loss -= plain(input_ids=ids).logits[0, 1:-1].log_softmax(-1).gather(-1, ids[0, 2:, None]).sum()
        count += ids.shape[1] - 2
    (loss / count).backward()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in plain.parameters()))
    [metrics] = iterate(learner, 1)
    assert metrics["loss/ptx"] == pytest.approx(loss.item() / count, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_ptx_moves_on_and_without_weight_is_not_read(ranks):
    learner = make_learner(ranks, ptx_coef=0.5)
    learner.ptx = ptx(ranks)
    iterate(learner, 1)
    assert learner.ptx.cursor == (2, 0)  # four updates of four rows, the last of an epoch of six being two
    untouched = make_learner(ranks, ptx_coef=0.0)
    untouched.ptx = ptx(ranks)
    same(
        [{k: v for k, v in row.items() if k != "loss/ptx"} for row in iterate(untouched, 2)],
        iterate(make_learner(ranks), 2),
        1e-12,
    )
    assert untouched.ptx.cursor == (0, 0)


# What the run checks of itself


@pytest.mark.parametrize("compared_with", ["trainer", "sampler"])
def test_a_sampler_of_another_policy_is_found(ranks, monkeypatch, compared_with):
    learner = make_learner(ranks, old_logprobs=compared_with)
    genuine = experience_module.sample

    def warm(learner, prompts, rows):
        args = learner.rollout_args
        learner.rollout_args = type(args)(**{**vars(args), "temperature": 0.5})
        try:
            return genuine(learner, prompts, rows)
        finally:
            learner.rollout_args = args

    monkeypatch.setattr(experience_module, "sample", warm)
    message = "to the sampler and .* to the trainer.*temperature"
    if compared_with == "sampler":
        message = "ratio should be 1, but .* moved by .* a sampler of another policy"
    with pytest.raises(RuntimeError, match=message):
        learn(learner, collect(learner, PROMPTS))


def test_live_dropout_is_found(ranks):
    learner = make_learner(ranks, family="gpt2")
    experience = collect(learner, PROMPTS)
    for module in learner.actor.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(RuntimeError, match="probability ratio should be 1.*dropout"):
        learn(learner, experience)


def test_a_critic_that_changed_since_the_rollout_is_found(ranks):
    learner = make_learner(ranks)
    iterate(learner, 1)
    experience = collect(learner, PROMPTS)
    experience.values.add_(0.01)
    with pytest.raises(RuntimeError, match="values should be the rollout's, but one moved by 0.0"):
        learn(learner, experience)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("computed", "what"),
    [
        ("last_scores", "the reward model's score"),
        ("answer_values", "the critic's value"),
        ("reference", "the reference's log-probability"),
    ],
)
def test_a_model_whose_numbers_are_not_finite_is_named(ranks, monkeypatch, computed, what, at_once):
    """`at_once`: values come with the update."""
    rows = len(PROMPTS) if at_once else 2
    learner = make_learner(ranks, judge=None, train_batch_size=rows, micro_batch_size=rows)
    if computed == "reference":
        learner.reference.get_output_embeddings().register_forward_hook(lambda *given: given[-1] * math.nan)
    else:
        genuine = getattr(experience_module, computed)
        for module in (experience_module, ppo_module):
            monkeypatch.setattr(module, computed, lambda *given: genuine(*given) / 0, raising=False)
    with pytest.raises(RuntimeError, match=f"episode 0: {what} is (nan|-?inf)"):
        learn(learner, collect(learner, PROMPTS))


@pytest.mark.parametrize("name", ["answer_logprobs", "answer_values"])
def test_what_is_not_finite_in_the_first_minibatch_is_found(ranks, monkeypatch, name):
    learner = make_learner(ranks)
    experience, genuine = collect(learner, PROMPTS), getattr(ppo_module, name)

    def spoilt(*given, **options):
        result = genuine(*given, **options)
        return result * math.nan if name == "answer_values" else (result[0] * math.nan, result[1])

    monkeypatch.setattr(ppo_module, name, spoilt)
    with pytest.raises(RuntimeError, match="on the first minibatch .* moved by nan"):
        learn(learner, experience)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda completions: [1.0] * 7, "returned 7 rewards for 8 answers"),
        (lambda completions: [float("nan")] * 8, "returned nan for answer 0"),
        (lambda completions: None, "did not return a list of numbers"),
        (lambda answer_key: [0.0] * 8, "takes 'answer_key', which the prompts' rows do not have"),
        (lambda completions: 1 / 0, "ZeroDivisionError|division by zero"),
    ],
)
def test_a_reward_function_that_fails_is_named(ranks, judge, message):
    with pytest.raises(RuntimeError, match=message):
        collect(make_learner(ranks, judge=judge), PROMPTS)


def test_a_model_cannot_be_averaged_outside_of_its_bounds(ranks):
    learner = make_learner(ranks)
    with pytest.raises(ValueError, match="decay=1"):
        engine.WeightAverage(learner.actor.model, 1)
