"""`state_precision="8bit"` in the engine: the bits of the kernel's oracle on every tier; memory and checkpoints."""

import megalith.engine as engine
import pytest
import torch
from against_torch import differing, fit, gathered_weights, initialized, state_of
from megalith.engine.lanes import random_delay
from megalith.engine.layout import ParamSpec, pack
from megalith.engine.shard import engine_of
from megalith.engine.streaming_sizes import PIECE_MULTIPLE, SLOTS, slot_itemsizes
from megalith.kernels import CODE_BLOCK_NUMEL, CODE_DTYPES, AdamHyper, scales_numel
from megalith.kernels.adam_step import AdamTensors
from megalith.kernels.reference import adam_reference_
from tiny import batches, make_model, weights_of


def language_loss(model, step):
    rows = batches(60)[step]
    return model(input_ids=rows, labels=rows).loss


def llama():
    """Widths that are no multiples of a block, so that there is padding between slots."""
    return make_model("llama", num_hidden_layers=2, intermediate_size=72, hidden_size=40, num_key_value_heads=4)


def smallest_ring(precision):
    sizes = slot_itemsizes(engine.Precision(precision), engine.StatePrecision.EIGHT_BIT)
    return SLOTS * PIECE_MULTIPLE * sum(sizes.values())


def trained(precision="fp32", **options):
    model, optimizer = initialized(llama, precision=precision, **{"state_precision": "8bit", **options})
    for micro_steps in (1, 3, 2, 1):
        for step in range(micro_steps):
            optimizer.backward(language_loss(model, step) / micro_steps)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_plain_loop_with_the_oracle_has_the_same_bits():
    plain = llama()
    states = {}
    for name, parameter in plain.named_parameters():
        numel = parameter.numel()
        codes = [torch.zeros(numel, dtype=dtype) for dtype in CODE_DTYPES.values()]
        states[name] = (*codes, torch.zeros(scales_numel(numel)))
    for step in range(5):
        language_loss(plain, step).backward()
        hyper = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.1, decoupled=True, step=step + 1)
        for name, parameter in plain.named_parameters():
            exp_avg, exp_avg_sq, scales = states[name]
            weight, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)
            tensors = AdamTensors(weight, gradient, exp_avg, exp_avg_sq, scales=scales)
            adam_reference_(tensors, hyper, torch.ones(1), torch.zeros(1))
            parameter.grad = None
    model, optimizer = initialized(llama, state_precision="8bit", max_grad_norm=None)
    fit(model, optimizer, language_loss, 5)
    assert differing(gathered_weights(model), weights_of(plain)) == []
    for chunk in engine_of(model).chunks:
        for owned in chunk.owned_slots:
            exp_avg, exp_avg_sq, scales = states[owned.slot.fqn]
            first = owned.shard_start // CODE_BLOCK_NUMEL * 2
            assert torch.equal(chunk.exp_avg[owned.shard_slice], exp_avg)
            assert torch.equal(chunk.exp_avg_sq[owned.shard_slice], exp_avg_sq)
            assert torch.equal(chunk.scales[first : first + len(scales)], scales)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tier_stage_and_chunk_size_change_no_bit(precision, tmp_path):
    expected, reference = trained(precision)
    drive = {"nvme_dir": tmp_path, "nvme_ring": smallest_ring(precision), "nvme_checksums": True}
    no_gradients_on_host = {"host_budget": 2**25 + smallest_ring(precision) + 10**4}
    variants = [
        {"zero_stage": 0},
        {"placement": "host"},
        {"placement": "host", "optimizer_offload": 0.5, "param_offload": 0.3, "max_chunk_numel": 10**6},
        {"placement": "nvme", "max_chunk_numel": 10**6, **drive},
        {"placement": "nvme", "max_chunk_numel": 10**6, **no_gradients_on_host, **drive},
        {"placement": "nvme", "optimizer_offload": 0.5, "zero_stage": 2, **drive},
        {"placement": "auto", "device_budget": "400KB", "host_budget": "40MB", **drive},
    ]
    for variant in variants:
        model, optimizer = trained(precision, **variant)
        assert differing(state_of(model), state_of(expected)) == [], variant
        assert optimizer.grad_norm == pytest.approx(reference.grad_norm, rel=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_in_the_backward_pass_and_delays_on_every_lane_change_no_bit(precision, tmp_path):
    def trained_without_clipping(**options):
        model, optimizer = initialized(
            llama, precision=precision, state_precision="8bit", max_grad_norm=None, max_chunk_numel=10**4, **options
        )
        fit(model, optimizer, language_loss, 4)
        return state_of(model)

    expected = trained_without_clipping()
    drive = {"placement": "nvme", "nvme_dir": tmp_path, "nvme_ring": smallest_ring(precision)}
    for place in ({}, {"placement": "host"}, {"placement": "host", "optimizer_offload": 0.5}, drive):
        in_backward = place | {"update_in_backward": True}
        for options in (in_backward, place | {"lane_delay": random_delay(1, 0.002)}):
            assert differing(trained_without_clipping(**options), expected) == [], options
        delayed = in_backward | {"lane_delay": random_delay(2, 0.002), "prefetch": 2}
        assert differing(trained_without_clipping(**delayed), expected) == [], delayed


@pytest.mark.parametrize(("precision", "exact"), [("fp32", 4 + 2), ("bf16", 2 + 2 + 2), ("fp16", 2 + 4 + 2)])
def test_bytes_at_rest_are_those_of_the_plan(precision, exact, tmp_path):
    for options in ({}, {"placement": "host"}, {"placement": "nvme", "nvme_dir": tmp_path}):
        options |= {"precision": precision, "max_chunk_numel": 10**6, "state_precision": "8bit"}
        plan = engine.plan(llama(), **options)
        report = engine.memory_report(initialized(llama, **options)[0])
        for tier, payloads in plan.bytes_at_rest.items():
            for payload, nbytes in payloads.items():
                assert report[tier.value][payload.value]["bytes"] == nbytes, (tier, payload)
        kept = ("weight", "master", "exp_avg", "exp_avg_sq", "scales")
        at_rest = sum(rows[name]["bytes"] for rows in report.values() for name in kept if name in rows)
        assert at_rest == plan.layout.stored_numel * (exact + 8 / 256)


def test_a_checkpoint_goes_on_to_the_bit_and_between_8_bits_and_exact(tmp_path):
    expected, optimizer = trained("bf16")
    engine.save_checkpoint(tmp_path / "eight", expected, optimizer)
    fit(expected, optimizer, language_loss, 2)
    for options in ({}, {"placement": "host", "max_chunk_numel": 10**6}, {"zero_stage": 1}):
        model, ours = initialized(llama, precision="bf16", state_precision="8bit", **options)
        engine.load_checkpoint(tmp_path / "eight", model, ours)
        fit(model, ours, language_loss, 2)
        assert differing(state_of(model), state_of(expected)) == [], options

    exact, ours = initialized(llama, precision="bf16")
    engine.load_checkpoint(tmp_path / "eight", exact, ours)
    engine.save_checkpoint(tmp_path / "exact", exact, ours)
    back, ours = initialized(llama, precision="bf16", state_precision="8bit", placement="nvme", nvme_dir=tmp_path)
    engine.load_checkpoint(tmp_path / "exact", back, ours)
    assert differing(state_of(back), state_of(exact)) == []  # what was decoded is encoded to itself


def test_training_comes_close_to_exact_moments():
    """To within a twentieth of what training lowered the loss by."""
    losses = {}
    for state_precision in ("exact", "8bit"):
        model, optimizer = initialized(llama, state_precision=state_precision)
        first = float(language_loss(model, 0))
        fit(model, optimizer, lambda model, step: language_loss(model, step % 2), 40)
        losses[state_precision] = float(language_loss(model, 0))
    lowered = first - losses["exact"]
    assert lowered > 0.3 and abs(losses["8bit"] - losses["exact"]) < 0.05 * lowered, (first, losses)


def test_padding_is_under_one_percent_and_starts_are_blocks():
    """A LLaMA of 7B and GPT-2 XL by their blocks."""
    llama_block = [(4096, 4096)] * 4 + [(11008, 4096)] * 3 + [(4096,)] * 2
    gpt2_block = [(1600, 4800), (4800,), (1600, 1600), (1600,), (1600, 6400), (6400,), (6400, 1600)] + [(1600,)] * 5
    for block in (llama_block, gpt2_block):
        specs = [ParamSpec(f"p{i}", shape, torch.bfloat16, True, 0) for i, shape in enumerate(block)]
        for world_size in (1, 3, 8):
            layout = pack([("block", specs)], world_size, 2**26, slot_multiple=CODE_BLOCK_NUMEL)
            assert layout.param_numel == sum(spec.numel for spec in specs)
            assert layout.padding_fraction < 0.01
            for chunk in layout.chunks:
                assert all(slot.offset_numel % CODE_BLOCK_NUMEL == 0 for slot in chunk.slots)
                assert all(chunk.shard_range(rank, world_size)[0] % CODE_BLOCK_NUMEL == 0 for rank in range(world_size))


def test_a_wrong_value_is_an_error_that_names_the_known_ones():
    for value in ("4bit", None, 8):
        with pytest.raises(ValueError, match="state_precision=.*must be 'exact' or '8bit'"):
            initialized(llama, state_precision=value)
