"""Ranks that gather weights together, block by block, while their answers differ in number and length."""

import megalith.engine as engine
import torch
import torch.distributed as dist
from decoding_cases import lively_model, make_prompts
from launch import run_ranks
from megalith.rlhf.decoding import generate
from megalith.rlhf.sampling import SamplingOptions

OPTIONS = [SamplingOptions(max_new_tokens=count, temperature=0) for count in (3, 11, 6, 2, 9)]


def _everybody(is_done):
    flag = torch.tensor(int(is_done))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _answer(rank, world_size):
    prompts = make_prompts(3, 9, 5, 12, 4)
    mine = slice(0, 4) if rank == 0 else slice(4, 5)  # four prompts in two batches, and one
    model = lively_model("gpt2", n_layer=3).requires_grad_(False)
    expected = [answer.tokens for answer in generate(model, prompts, OPTIONS)]
    model, _ = engine.initialize(model, None, zero_stage=3, timeout_s=20)
    steps = []
    answers = generate(
        model, prompts[mine], OPTIONS[mine], batch_size=2, all_done=_everybody, progress=lambda new: steps.append(new)
    )
    assert [answer.tokens for answer in answers] == expected[mine]
    with engine.gathered(model):  # each for itself
        assert [answer.tokens for answer in generate(model, prompts[mine], OPTIONS[mine])] == expected[mine]
    assert [answer.tokens for answer in generate(model, [], OPTIONS[:0], all_done=_everybody)] == []
    return steps


def test_ranks_end_together_whatever_they_have_to_answer():
    first, second = run_ranks(2, _answer, timeout_s=60)
    assert len(first) == len(second)  # as many forward passes
    assert sum(first) == 3 + 11 + 6 + 2 and sum(second) == 9
    assert second[9:] == [0] * len(second[9:]) and len(second) > 9
