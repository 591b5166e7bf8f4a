"""The packing of parameters: what has to hold for any model, and the waste on models of real sizes."""

import functools
from itertools import pairwise

import megalith.engine as engine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.engine.layout import ALIGNMENT_NUMEL, ParamSpec, pack, split_by_size
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, OPTConfig

SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def model_blocks(draw):
    blocks, count = [], 0
    for block in range(draw(st.integers(0, 4))):
        specs = []
        for _ in range(draw(st.integers(0, 6))):
            trainable = draw(st.booleans())
            group = draw(st.integers(0, 2)) if trainable else -1
            specs.append(ParamSpec(f"p{count}", draw(SHAPES), draw(DTYPES), trainable, group))
            count += 1
        blocks.append((f"block{block}", specs))
    return blocks


@settings(max_examples=150, deadline=None)
@given(model_blocks(), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 100, 10**9]))
def test_any_packing(blocks, world_size, max_chunk_numel):
    layout = pack(blocks, world_size, max_chunk_numel)
    specs = {spec.fqn: spec for _, block in blocks for spec in block}

    slots = [slot for chunk in layout.chunks for slot in chunk.slots]
    assert sorted(slot.fqn for slot in slots) == sorted(specs), "every parameter exactly once"
    assert [group.name for group in layout.groups] == [name for name, block in blocks if block]
    for group, (_, block) in zip(layout.groups, [b for b in blocks if b[1]], strict=True):
        held = {slot.fqn for chunk in group.chunks for slot in chunk.slots}
        assert held == {spec.fqn for spec in block}, "a chunk never crosses its block"

    for chunk in layout.chunks:
        assert chunk.slots[0].offset_numel == 0
        for one, following in pairwise(chunk.slots):
            assert one.stop_numel == following.offset_numel, "no gap and no overlap"
        for slot in chunk.slots:
            spec = specs[slot.fqn]
            assert (slot.shape, slot.numel) == (spec.shape, torch.Size(spec.shape).numel())
            assert (spec.dtype, spec.trainable) == (chunk.dtype, chunk.trainable)
        groups = [slot.optimizer_group for slot in chunk.slots]
        assert groups == sorted(groups), "one optimizer group's slots are neighbours"
        assert len(chunk.slots) == 1 or chunk.used_numel <= max_chunk_numel
        assert 0 <= chunk.numel - max(chunk.used_numel, 1) < world_size * ALIGNMENT_NUMEL
        ranges = [chunk.shard_range(rank, world_size) for rank in range(world_size)]
        assert (ranges[0][0], ranges[-1][1]) == (0, chunk.numel)
        assert all(one[1] == following[0] for one, following in pairwise(ranges))
        assert all(start % ALIGNMENT_NUMEL == 0 for start, _ in ranges)
    assert layout.param_numel == sum(spec.numel for spec in specs.values())


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_runs_keep_the_order_and_the_limit(numels, limit):
    specs = [ParamSpec(f"p{i}", (numel,), torch.float32, True, 0) for i, numel in enumerate(numels)]
    runs = split_by_size(specs, limit)
    assert [spec for run in runs for spec in run] == specs
    assert all(run and (len(run) == 1 or sum(spec.numel for spec in run) <= limit) for run in runs)


def test_a_parameter_given_twice_is_an_error_that_names_it():
    spec = ParamSpec("tied.weight", (2,), torch.float32, True, 0)
    with pytest.raises(ValueError, match="tied.weight"):
        pack([("a", [spec]), ("b", [spec])], 1, 100)


CONFIGS = {
    "LLaMA-7B": LlamaConfig(),
    "LLaMA-13B": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192
    ),
    "GPT2-XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "OPT-6.7B": OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    ),
    "BLOOM-7B": BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
}


@functools.cache
def on_meta(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name])


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_at_most_one_percent_is_padding(name, world_size):
    model = on_meta(name)
    plan = engine.plan(model, world_size=world_size, precision="bf16")
    assert plan.param_numel == sum(parameter.numel() for parameter in model.parameters())
    assert 0 <= plan.padding_fraction <= 0.01
    blocks = [group for group in plan.layout.groups if group.name.rpartition(".")[2].isdigit()]
    assert len(blocks) == CONFIGS[name].num_hidden_layers
    assert len({tuple(chunk.numel for chunk in group.chunks) for group in blocks}) == 1, "repeated blocks are equal"


@pytest.mark.parametrize("world_size", [0, -1, 1.5, "2", True, None])
def test_a_wrong_world_size_is_named(world_size):
    with pytest.raises(ValueError, match="world_size"):
        engine.plan(torch.nn.Linear(2, 2), world_size=world_size)


@pytest.mark.parametrize("accumulation_steps", [0, -1, 1.5])
def test_a_wrong_number_of_accumulation_steps_is_named(accumulation_steps):
    with pytest.raises(ValueError, match="accumulation_steps"):
        engine.plan(torch.nn.Linear(2, 2), accumulation_steps=accumulation_steps)


def test_plan_rejects_what_initialize_rejects():
    with pytest.raises(TypeError, match="zero_stages"):
        engine.plan(torch.nn.Linear(2, 2), zero_stages=3)
    with pytest.raises(ValueError, match="precision"):
        engine.plan(torch.nn.Linear(2, 2), precision="fp8")
    with pytest.raises(TypeError, match="SGD"):
        model = torch.nn.Linear(2, 2)
        engine.plan(model, torch.optim.SGD(model.parameters(), lr=1))
