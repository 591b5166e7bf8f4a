"""Log-probabilities of given tokens, without logits of a whole batch.

The model is run to its last hidden states, and its head is applied to the tokens that are asked for, a chunk of them at
a time: logits of [B, T, V] never exist. Where there are several, a chunk's are computed again in the backward pass.
PPO, GRPO, DPO and evaluation all read log-probabilities here, so that what is compared was computed by the same
operations.

B: batch, T: tokens, H: hidden size, V: vocabulary, N: scored tokens.
"""

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

CHUNK_NUMEL = 2**24
"""Logits that are alive at once, in elements: 64 MiB in float32."""

# Some families change the head's output in their own forward. Left out silently, that would be another distribution.
_LOGIT_RULES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def decoder_and_head(model):
    """The parts of a causal language model of transformers: (what gives hidden states, the head that gives logits).

    `model` may be wrapped by PEFT. Raises ValueError for a model that has no such parts, or whose forward does more to
    the logits than its head.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = causal.base_model, causal.get_output_embeddings()
    if head is None or decoder is causal:
        raise ValueError(f"{type(causal).__name__} has no language-model head on a base model")
    for name, neutral in _LOGIT_RULES.items():
        value = getattr(causal.config, name, neutral)
        if value not in (None, neutral):
            raise ValueError(f"{type(causal).__name__} has {name}={value}, which its head alone does not apply")
    return decoder, head


def hidden_states(decoder, input_ids, attention_mask=None, position_ids=None):
    """Last hidden states [B, T, H] of a base model; input_ids int64 [B, T].

    Rows that are padded on the right need no mask: attention is causal, so no token sees what follows it.
    """
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in given.items() if value is not None}
    return decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state


def token_logprobs(
    model,
    input_ids,
    scored,
    *,
    temperature=1.0,
    attention_mask=None,
    position_ids=None,
    most_scored=None,
    with_entropy=False,
):
    """Return (logprobs, entropy), both float32 [B, T]: at [b, t], log p(input_ids[b, t] | input_ids[b, :t]) and the
    entropy of that distribution, in nats, where `scored[b, t]`; 0 elsewhere. The entropy is None unless asked for: it
    costs two more passes over the vocabulary.

    p = softmax(logits / temperature), in float32 whatever the model computes in. Gradients flow through the
    log-probabilities; the entropy is for logs and has none.

    Args:
        input_ids: int64 [B, T], padded on the right (or on the left, with attention_mask and position_ids).
        scored: bool [B, T], the tokens to score. The first of a row has nothing before it and cannot be one.
        most_scored: the number of scored tokens on the rank that has most. Ranks that share weights have to apply the
            head equally often; without it, the ranks are asked.
    """
    decoder, head = decoder_and_head(model)
    if scored[:, 0].any():
        raise ValueError("the first token of a row cannot be scored: nothing comes before it")
    hidden = hidden_states(decoder, input_ids, attention_mask, position_ids)
    chosen = hidden[:, :-1][scored[:, 1:]]  # [N, H]; position t of the logits predicts token t + 1
    targets = input_ids[scored]  # [N]
    tokens_a_chunk = _tokens_a_chunk(head)
    chunk_count = max(1, -(-_most(len(targets), most_scored, hidden.device) // tokens_a_chunk))
    logprobs, entropy = _in_chunks(head, chosen, targets, temperature, with_entropy, chunk_count)

    def in_place(values):
        return None if values is None else values.new_zeros(scored.shape).masked_scatter(scored, values)

    return in_place(logprobs), in_place(entropy)


def last_logprobs(model, input_ids, count):
    """Log-probabilities float32 [B * count] of the last `count` tokens of each row of input_ids [B, T], as
    `token_logprobs` computes them; also on meta."""
    decoder, head = decoder_and_head(model)
    chosen = hidden_states(decoder, input_ids)[:, -count - 1 : -1].flatten(0, 1)
    targets = input_ids[:, -count:].flatten()
    return _in_chunks(head, chosen, targets, 1.0, False, -(-len(targets) // _tokens_a_chunk(head)))[0]


def _tokens_a_chunk(head):
    return max(1, CHUNK_NUMEL // head.weight.shape[0])


def _in_chunks(head, hidden, targets, temperature, with_entropy, chunk_count):
    """hidden [N, H], targets [N] -> log-probabilities and entropies (or None), float32 [N]."""
    again = torch.is_grad_enabled() and chunk_count > 1  # a single chunk is alive in the backward pass anyway
    pieces = [
        checkpoint(_chunk_logprobs, head, h, ids, temperature, with_entropy, use_reentrant=False)
        if again
        else _chunk_logprobs(head, h, ids, temperature, with_entropy)
        for h, ids in zip(hidden.tensor_split(chunk_count), targets.tensor_split(chunk_count), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _chunk_logprobs(head, hidden, targets, temperature, with_entropy):
    """hidden [n, H], targets [n] -> log-probabilities and entropies (or None), float32 [n]."""
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    if not with_entropy:
        return logprobs, None
    with torch.no_grad():  # last, so that the recomputation ends before it
        entropy = normaliser - (logits * (logits - normaliser[:, None]).exp()).sum(-1)
    return logprobs, entropy


def _most(count, most_scored, device):
    """The largest `count` of all ranks."""
    if most_scored is not None:
        if count > most_scored:
            raise ValueError(f"most_scored={most_scored}, but this rank has {count} scored tokens")
        return most_scored
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
