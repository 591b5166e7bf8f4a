"""Small models, batches and the measure of parity that the engine's tests share."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

VOCAB = 97


def config_of(family: str, **changes):
    """The configuration of a two-block model of `family`, with no dropout."""
    llama = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    if family == "llama":
        return LlamaConfig(**{**llama, "tie_word_embeddings": False, **changes})
    if family == "llama_tied":
        return LlamaConfig(**{**llama, "tie_word_embeddings": True, **changes})
    if family == "qwen2":
        return Qwen2Config(**{**llama, "tie_word_embeddings": True, **changes})
    if family == "mixtral":
        return MixtralConfig(**{**llama, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    if family == "gpt2":
        return GPT2Config(
            **{
                **dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
                **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
                **changes,
            }
        )
    if family == "opt":
        return OPTConfig(
            **{
                **dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4),
                **dict(max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0),
                **changes,
            }
        )
    if family == "bloom":
        return BloomConfig(
            **{
                **dict(
                    vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
                ),
                **changes,
            }
        )
    raise ValueError(family)


FAMILIES = ["gpt2", "opt", "bloom", "llama", "llama_tied", "qwen2", "mixtral"]


def make_model(family: str = "llama", seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(family, **changes))


def batches(count: int, rows: int = 4, length: int = 12, seed: int = 1) -> list[torch.Tensor]:
    """`count` batches of token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for _ in range(count)]


def rank_rows(batch: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    return batch.chunk(world_size)[rank]


def update_error(initial: dict, ours: dict, reference: dict) -> float:
    """Relative error of the update itself, ‖ΔW − ΔW_ref‖ / ‖ΔW_ref‖ over all parameters: a step that does nothing gives
    1."""
    difference = sum(((ours[name] - reference[name]).double() ** 2).sum() for name in reference)
    moved = sum(((reference[name] - initial[name]).double() ** 2).sum() for name in reference)
    return float((difference / moved).sqrt())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
