"""Models by folder or preset, built on meta: the engine loads or initialises their weights."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from .errors import InputError, nearest
from .lora import holds_adapters, merged_folder
from .tokenizer import byte_tokenizer, load_tokenizer


def _llama(vocab, hidden, layers, heads, feed_forward, kv_heads=None, length=2048, **others):
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=feed_forward,
        max_position_embeddings=length,
        **others,
    )


def _gpt2(hidden, layers, heads, vocab=50257, length=1024, **others):
    return GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length, **others)


def _opt(hidden, layers, heads, vocab=50272, length=2048, **others):
    return OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        max_position_embeddings=length,
        **others,
    )


def _bloom(hidden, layers, heads, vocab=250880):
    return BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=heads)


PRESETS = {
    # For debugging on any machine: they train in seconds. No dropout, so that every number of ranks gives the same
    # losses.
    "llama-tiny": lambda: _llama(320, 64, 2, 4, 160, length=1024),
    "gpt2-tiny": lambda: _gpt2(64, 2, 4, vocab=320, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt-tiny": lambda: _opt(64, 2, 4, vocab=320, length=1024, dropout=0.0),
    "bloom-tiny": lambda: _bloom(64, 2, 4, vocab=320),
    # The shapes of the published models.
    "gpt2": lambda: _gpt2(768, 12, 12),
    "gpt2-medium": lambda: _gpt2(1024, 24, 16),
    "gpt2-large": lambda: _gpt2(1280, 36, 20),
    "gpt2-xl": lambda: _gpt2(1600, 48, 25),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-175b": lambda: _opt(12288, 96, 96),
    "bloom-560m": lambda: _bloom(1024, 24, 16),
    "bloom-1b7": lambda: _bloom(2048, 24, 16),
    "bloom-7b1": lambda: _bloom(4096, 30, 32),
    "llama-7b": lambda: _llama(32000, 4096, 32, 32, 11008),
    "llama-13b": lambda: _llama(32000, 5120, 40, 40, 13824),
    "llama-3-8b": lambda: _llama(
        128256,
        4096,
        32,
        32,
        14336,
        kv_heads=8,
        length=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}


LEARNED_POSITIONS = ("gpt2", "opt", "gpt_neo", "gpt_bigcode", "openai-gpt")


@dataclass(frozen=True)
class Source:
    """What --pretrain stands for: a configuration, its tokenizer, and the folder of its weights (None: random ones)."""

    config: PreTrainedConfig
    tokenizer: object
    folder: str | None


def load_source(model_args, option="--pretrain"):
    """Resolve --pretrain, --model and --tokenizer. Raises InputError for whatever is missing or does not fit
    together. `option`: what the user calls the folder of `model_args.pretrain`.
    """
    if Path(model_args.pretrain).is_dir():
        source = _from_folder(model_args.pretrain, model_args.tokenizer, option)
    elif model_args.pretrain in PRESETS:
        source = _from_preset(model_args.pretrain, model_args.tokenizer)
    else:
        raise InputError(
            f"{option} {model_args.pretrain}: no such folder, and no preset of that name"
            f"{nearest(model_args.pretrain, PRESETS)} (presets: {', '.join(PRESETS)})"
        )
    family = source.config.model_type
    if model_args.model not in ("auto", family):
        raise InputError(f"--model {model_args.model}, but {model_args.pretrain} is a {family} model; use --model auto")
    if len(source.tokenizer) > source.config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(source.tokenizer)} tokens and the model embeds {source.config.vocab_size}: "
            "they do not belong together; name the right folder with --tokenizer"
        )
    return source


def _from_folder(folder, tokenizer_folder, option):
    if holds_adapters(folder):
        folder = merged_folder(folder)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise InputError(f"{option} {folder}: has no config.json")
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"{option} {folder}: has no *.safetensors file (weights in pickle files are not read: load them with "
            "transformers and call save_pretrained, which writes safetensors)"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{option} {folder}: config.json cannot be used: {error}") from None
    return Source(config, load_tokenizer(tokenizer_folder or folder), folder)


def _from_preset(name, tokenizer_folder):
    config = PRESETS[name]()
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder else byte_tokenizer()
    if tokenizer_folder:
        config.vocab_size = (
            -(-len(tokenizer) // 64) * 64
        )  # random weights fit any vocabulary; multiples of 64 multiply faster
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return Source(config, tokenizer, None)


def build_on_meta(source, gradient_checkpointing=False):
    """The causal language model of a Source with float32 parameters that take no memory yet.

    Raises InputError for a configuration that is not of a causal language model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(
            f"{source.config.model_type} is not a causal language model that transformers knows: {error}"
        ) from None
    if source.folder and os.path.isfile(os.path.join(source.folder, "generation_config.json")):
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return model


def check_positions(config, samples):
    """Raises InputError where one of `samples` is longer than the positions that a model has learned embeddings for;
    rotary positions and ALiBi go on."""
    if config.model_type not in LEARNED_POSITIONS:
        return
    longest, limit = max((sample.positions for sample in samples), default=0), config.max_position_embeddings
    if longest > limit:
        raise InputError(
            f"a row has {longest} tokens, and the {config.model_type} model has {limit} positions: lower --max_len"
        )


def enable_checkpointing(model):
    # transformers renamed it in 5.2x and warns about the old name, which older releases need.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def disable_dropout(model):
    """Set every dropout of `model` to 0: two passes over the same tokens must give the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def decay_groups(parameters, weight_decay):
    """Parameter groups of AdamW for those of `parameters` that are trained: matrices decay, vectors (biases, norms) do
    not."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
