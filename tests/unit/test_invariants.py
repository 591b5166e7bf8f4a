"""Which test holds which invariant of reinforcement learning from feedback, and the few that no other file holds.

S: data and fine-tuning, R: reward model, G: rollout, P: PPO, D: DPO and GRPO. The letters are those of comments in
other tests.
"""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megalith.rlhf.experience import answer_logprobs, check_drift, collect
from megalith.rlhf.logprobs import token_logprobs
from megalith.rlhf.ppo import learn
from megalith.rlhf.strategy import process_group
from ppo_cases import PAD, PROMPTS, make_learner
from tiny import make_model

HELD = {
    "S1 labels are shifted by one": "unit/test_sft_batches.py test_an_oracle_has_loss_zero_and_any_other_shift_has_not",
    "S2 the completion alone": "unit/test_sft_batches.py test_gradient_is_exactly_zero_on_prompt_and_padding",
    "S3 the end is learned": "unit/test_sft_templates.py test_eos_is_learned_when_pad_is_eos",
    "S4 masks from lengths": "unit/test_sft_templates.py test_special_tokens_inside_a_prompt_change_no_mask",
    "S5 one BOS": "unit/test_sft_templates.py test_exactly_one_bos_whether_the_template_writes_it_or_not",
    "S6 no merge over the border": "unit/test_sft_templates.py "
    "test_no_token_is_merged_across_the_border_of_prompt_and_completion",
    "S7 truncation": "unit/test_sft_templates.py "
    "test_a_cut_sample_has_no_eos_label_and_a_prompt_that_fills_it_is_dropped",
    "S8 packing": "unit/test_packing.py test_a_document_does_not_see_its_neighbour",
    "S9 global token count": "unit/test_sft_batches.py test_how_a_window_is_split_changes_neither_loss_nor_gradient",
    "R1 padding": "unit/test_reward_model.py test_padding_of_either_side_with_any_token_changes_no_score",
    "R2 head": "unit/test_reward_model.py test_the_head_starts_by_its_own_rule",
    "R3 stable": "unit/test_ranking_loss.py test_value_and_gradient_stay_finite_far_out",
    "R4 shift, centre": "unit/test_ranking_loss.py test_a_shift_changes_nothing_and_centering_penalises_it",
    "R5 rankings": "unit/test_ranking_loss.py test_a_prompt_weighs_one_however_many_answers_it_has",
    "R6 swap": "unit/test_ranking_loss.py test_swapping_the_answers_turns_the_accuracy_round",
    "R7 statistics": "unit/test_reward_model.py test_statistics_that_are_missing_are_an_error",
    "R8 head with LoRA": "unit/test_lora.py test_the_score_head_is_trained_and_saved",
    "G1 batched greedy": "unit/test_decoding.py test_greedy_answers_in_batches_are_those_of_the_plain_model",
    "G2 sampler's log-probabilities": "unit/test_decoding.py test_logprobs_are_those_of_the_tempered_distribution",
    "G3 after the stop": "unit/test_decoding.py test_an_answer_ends_with_its_first_stop_token",
    "G4 truncated rows": "unit/test_ppo.py test_an_experience_is_what_its_models_say_of_each_row_alone",
    "G5 random numbers": "unit/test_ppo.py test_a_rollout_differs_from_the_next_and_rows_from_each_other",
    "G6 uneven lengths": "distributed/test_ppo_ranks.py test_empty_answers_beside_answers_that_never_end",
    "G7 every prompt": "unit/test_train_ppo.py test_an_epoch_visits_every_prompt_once",
    "G8 masks of prompts": "unit/test_decoding.py test_greedy_answers_in_batches_are_those_of_the_plain_model",
    "P1 the ratio is 1": "unit/test_ppo.py test_live_dropout_is_found",
    "P1 half precision": "unit/test_invariants.py test_drift_is_an_error_in_fp32_and_a_warning_in_bf16",
    "P2 KL of 0": "unit/test_ppo.py test_the_first_iteration_starts_at_the_reference_with_values_of_zero",
    "P3 places": "unit/test_ppo.py test_an_experience_is_what_its_models_say_of_each_row_alone",
    "P4 rewards": "unit/test_ppo_math.py test_a_row_of_rewards_adds_up_to_score_minus_kl",
    "P5 GAE": "unit/test_ppo_math.py test_gae_by_hand",
    "P6 states": "unit/test_mutants.py test_a_known_bug_is_caught",
    "P7 whitening": "unit/test_ppo_math.py test_whitening_is_over_the_mask_alone",
    "P8 clipping": "unit/test_ppo_math.py test_the_policy_loss_against_a_loop",
    "P9 value loss": "unit/test_ppo_math.py test_the_value_loss_against_a_loop",
    "P10 micro-batches": "unit/test_ppo.py test_the_split_into_micro_batches_changes_nothing",
    "P11 estimators": "unit/test_ppo_math.py test_kl_estimators_have_the_right_expectation",
    "P12 controller": "unit/test_ppo_math.py test_the_adaptive_coefficient",
    "P12 without a price": "unit/test_ppo.py test_without_a_price_of_kl_there_is_no_reference",
    "P13 order": "unit/test_ppo_math.py test_scores_are_normalised_then_clipped_then_punished",
    "P13 raw scores": "unit/test_invariants.py test_raw_scores_are_logged_and_shaped_ones_paid",
    "P14 configured stops": "unit/test_invariants.py test_the_penalty_goes_by_the_configured_stop_tokens",
    "P15 dropout": "unit/test_reward_model.py test_dropout_is_off_even_in_training",
    "P16 Adam": "unit/test_ppo.py test_an_iteration_equals_a_naive_one",
    "P17 critic": "unit/test_ppo.py test_a_warm_up_trains_the_critic_alone",
    "P18 PTX": "unit/test_ppo.py test_ptx_alone_is_fine_tuning",
    "P19 frozen": "unit/test_ppo.py test_what_is_frozen_stays_to_the_bit_and_the_average_is_one",
    "P20 moving average": "unit/test_ppo.py test_what_is_frozen_stays_to_the_bit_and_the_average_is_one",
    "P21 LoRA": "unit/test_train_ppo.py test_adapters_are_merged_into_what_is_saved",
    "P22 float32": "unit/test_invariants.py test_log_probabilities_are_float32_whatever_the_model_computes_in",
    "P23 strategies": "distributed/test_ppo_ranks.py test_two_ranks_have_the_trajectory_of_one",
    "P24 nothing to learn": "unit/test_ppo_math.py test_a_perfect_critic_of_a_constant_reward_leaves_no_advantage",
    "P25 resuming": "unit/test_train_ppo.py test_going_on_in_the_middle_gives_the_same_bits",
    "P26 masked metrics": "unit/test_invariants.py test_metrics_are_of_answer_tokens_alone",
    "D1 sums and gradient": "unit/test_dpo.py test_the_gradient_is_that_of_the_paper",
    "D1 DPO": "distributed/test_stages.py test_dpo_starts_at_ln_2_and_the_reference_without_adapters_is_a_copy",
    "D2 GRPO": "unit/test_grpo.py test_groups_of_equal_scores_teach_nothing",
}


@pytest.mark.parametrize("invariant", HELD)
def test_the_test_that_holds_it_is_there(invariant):
    path, name = HELD[invariant].split()
    tree = ast.parse((Path(__file__).parents[1] / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def ranks():
    with process_group(torch.device("cpu")) as ranks:
        yield ranks


def test_drift_is_an_error_in_fp32_and_a_warning_in_bf16(capsys):
    def learner(dtype):
        return SimpleNamespace(
            actor=SimpleNamespace(model=torch.nn.Linear(1, 1, dtype=dtype)), ranks=SimpleNamespace(is_first=True)
        )

    check_drift(learner(torch.float32), 1e-5, "moved")
    check_drift(learner(torch.bfloat16), 0.04, "moved")
    assert not capsys.readouterr().out
    with pytest.raises(RuntimeError, match="moved"):
        check_drift(learner(torch.float32), 1e-3, "moved")
    check_drift(learner(torch.bfloat16), 0.06, "moved")
    assert capsys.readouterr().out == "warning: moved\n"
    with pytest.raises(RuntimeError, match="moved"):
        check_drift(learner(torch.bfloat16), float("nan"), "moved")


def test_raw_scores_are_logged_and_shaped_ones_paid(ranks):
    learner = make_learner(
        ranks, judge=lambda completions: [100.0] * 8, score_clip=2.0, missing_eos_penalty=0.0, normalize_scores=False
    )
    metrics = learn(learner, collect(learner, PROMPTS))
    assert metrics["objective/scores"] == 100.0
    assert metrics["objective/rlhf_reward"] == 2.0  # at the reference nothing is paid for KL


def test_the_penalty_goes_by_the_configured_stop_tokens(ranks):
    learner = make_learner(ranks, judge=lambda completions: [0.0] * 8, missing_eos_penalty=1.0)
    learner.stop_ids = frozenset(range(5, 17))  # not the configuration's own end
    experience = collect(learner, PROMPTS)
    ends = [answer.ids[-1] in learner.stop_ids for answer in experience.rollout.answers]
    assert experience.rollout.stopped.tolist() == ends
    metrics = learn(learner, experience)
    assert metrics["val/num_eos_tokens"] == sum(ends) > 0
    assert metrics["objective/rlhf_reward"] == pytest.approx(-(1 - sum(ends) / 8))


def test_log_probabilities_are_float32_whatever_the_model_computes_in(ranks):
    model = make_model("llama").bfloat16().eval()
    ids = torch.randint(4, 17, (2, 6), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    with torch.no_grad():
        logprobs, _ = token_logprobs(model, ids, scored)
        logits = model(input_ids=ids).logits
    expected = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[:, 1:], expected, atol=1e-6, rtol=1e-6)


def test_metrics_are_of_answer_tokens_alone(ranks):
    learner = make_learner(ranks, ppo_epochs=1, train_batch_size=8)
    learn(learner, collect(learner, PROMPTS))
    experience = collect(learner, PROMPTS)
    lengths = experience.rollout.lengths.tolist()
    assert min(lengths) < max(lengths)

    def of_tokens(values):
        return [values[row, t].item() for row, length in enumerate(lengths) for t in range(length)]

    garbage = {
        name: torch.where(experience.rollout.mask, getattr(experience, name), 7.0)
        for name in ("values", "ref_logprobs")
    }
    [entropy] = experience.rollout.map(
        lambda micro: answer_logprobs(learner.actor.model, micro, learner, with_entropy=True)[1:], 8, PAD, ranks
    )
    clean = of_tokens(experience.logprobs), of_tokens(experience.ref_logprobs), of_tokens(entropy)
    metrics = learn(learner, replace(experience, **garbage))
    assert metrics["objective/kl"] == pytest.approx((sum(clean[0]) - sum(clean[1])) / 8, rel=1e-4, abs=1e-6)
    assert metrics["objective/entropy"] == pytest.approx(-sum(clean[0]) / 8, rel=1e-5)
    assert metrics["policy/entropy_avg"] == pytest.approx(sum(clean[2]) / len(clean[2]), rel=1e-5)
    assert metrics["val/explained_variance"] < 1
