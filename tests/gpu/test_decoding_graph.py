"""Decoding on CUDA: steps replayed from graphs, and offloaded weights that are copied while the GPU computes."""

import pytest
import torch
from decoding_cases import lively_model, make_prompts
from megalith import engine
from megalith.rlhf import decoding
from megalith.rlhf.batching import Batcher, BatchingOptions
from megalith.rlhf.decoding import generate
from megalith.rlhf.sampling import SamplingOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROMPTS = (3, 9, 1, 14, 7, 14, 2)


def greedy_options():
    return [SamplingOptions(max_new_tokens=count, temperature=0) for count in (4, 20, 9, 3, 12, 6, 11)]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_replayed_steps_give_the_same_answers(family, monkeypatch):
    model = lively_model(family).cuda()
    prompts = make_prompts(*PROMPTS)
    assert decoding.can_record(model, torch.device("cuda"))
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    recorded = generate(model, prompts, greedy_options(), batch_size=4)
    assert len(replays) > 15
    monkeypatch.setattr(decoding, "can_record", lambda model, device: False)
    plain = generate(model, prompts, greedy_options(), batch_size=4)
    assert [answer.tokens for answer in recorded] == [answer.tokens for answer in plain]


def test_attention_that_no_graph_can_capture_is_not_recorded():
    model = lively_model("bloom").cuda()
    assert not decoding.can_record(model, torch.device("cuda"))
    on_cpu = generate(lively_model("bloom"), make_prompts(*PROMPTS), greedy_options(), batch_size=4)
    on_gpu = generate(model, make_prompts(*PROMPTS), greedy_options(), batch_size=4)
    assert [answer.tokens for answer in on_gpu] == [answer.tokens for answer in on_cpu]


def test_the_batcher_replays_while_requests_come_and_go():
    model = lively_model("llama", max_position_embeddings=512).cuda()
    prompts = make_prompts(*PROMPTS)
    expected = [answer.tokens for answer in generate(model, prompts, greedy_options())]
    batcher = Batcher(model, BatchingOptions(max_batch=4, kv_budget_bytes=2**24))
    streams = [batcher.submit(*request) for request in zip(prompts, greedy_options(), strict=True)]
    assert [list(stream) for stream in streams] == expected
    batcher.close()


def test_offloaded_weights_are_streamed_within_their_budget():
    plain = lively_model("llama", hidden_size=256, num_hidden_layers=8).cuda()
    prompts = make_prompts(*PROMPTS)
    expected = [answer.tokens for answer in generate(plain, prompts, greedy_options())]
    weight_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    model = lively_model("llama", hidden_size=256, num_hidden_layers=8).requires_grad_(False)
    model, _ = engine.initialize(model, None, placement="host", device_budget=weight_bytes // 2)
    assert not decoding.can_record(model, torch.device("cuda"))
    assert [answer.tokens for answer in generate(model, prompts, greedy_options())] == expected
    assert engine.memory_report(model)["device"]["total"]["peak_bytes"] <= weight_bytes // 2


def test_steps_are_replayed_while_weights_are_gathered(monkeypatch):
    """Their addresses are others in the next context."""
    plain = lively_model("llama", hidden_size=256, num_hidden_layers=4).cuda()
    prompts = make_prompts(*PROMPTS)
    expected = [answer.tokens for answer in generate(plain, prompts, greedy_options(), batch_size=4)]
    model = lively_model("llama", hidden_size=256, num_hidden_layers=4).requires_grad_(False)
    model, _ = engine.initialize(model, None, placement="host")
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    for _ in range(2):
        blocker = torch.empty(2**20, device="cuda")
        with engine.gathered(model):
            answers = generate(model, prompts, greedy_options(), batch_size=4)
        assert [answer.tokens for answer in answers] == expected and replays
        replays.clear()
        del blocker
    assert [answer.tokens for answer in generate(model, prompts, greedy_options(), batch_size=4)] == expected
    assert not replays


def test_later_graphs_take_no_memory_of_their_own():
    """cuBLAS keeps memory for every stream that it has seen: 32 MiB on an H100."""
    model, prompts = lively_model("llama").cuda(), make_prompts(*PROMPTS)
    generate(model, prompts, greedy_options(), batch_size=4)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generate(model, prompts, greedy_options(), batch_size=4)
    assert torch.cuda.memory_allocated() <= before + 2**20
