"""Log-probabilities in chunks on ranks that score different numbers of tokens."""

import megalith.engine as engine
import torch
from launch import run_ranks
from megalith.rlhf import logprobs as module
from megalith.rlhf.logprobs import token_logprobs
from tiny import VOCAB, make_model, update_error, weights_of

SCORED = 17


def rows():
    """input_ids [4, 12] and which tokens are scored: most in the first row, none in the last two."""
    ids = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(12) >= torch.tensor([[1], [6], [12], [12]])


def train(model, optimizer, ids, scored, backward, scale):
    for _ in range(2):
        loss = -token_logprobs(model, ids, scored)[0].sum() * scale
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def steps_under_the_engine(rank, world_size):
    """One rank has several chunks of scored tokens, the other has nothing to score."""
    module.CHUNK_NUMEL = 3 * VOCAB
    model = make_model("llama_tied")
    model, optimizer = engine.initialize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), zero_stage=3, device="cpu"
    )
    ids, scored = rows()
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    train(model, optimizer, ids[mine], scored[mine], optimizer.backward, scale=world_size / SCORED)
    with engine.gathered(model):
        return weights_of(model)


def test_ranks_with_unequal_tokens_match_one_process():
    model = make_model("llama_tied")
    initial, optimizer = weights_of(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, *rows(), torch.Tensor.backward, scale=1 / SCORED)
    for weights in run_ranks(2, steps_under_the_engine):
        assert update_error(initial, weights, weights_of(model)) < 1e-5
