"""What is chatted with, for `megalith serve` and `megalith chat`: a folder, a preset, or a quantised checkpoint."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.hf_argparser import HfArg

from .batching import Batcher, BatchingOptions
from .decoding import max_positions
from .errors import InputError
from .gptq_model import load_quantized
from .models import build_on_meta, load_source
from .offload import offload
from .strategy import choose_device
from .templates import prompt_renderer
from .tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ChatModelArguments:
    """What answers."""

    pretrain: str = HfArg(
        help="MODEL: folder in Hugging Face layout (read offline), or the name of a preset with random weights"
    )
    model: Literal["auto", "llama", "gpt2", "opt", "bloom"] = HfArg(
        default="auto", help="family that MODEL has to be of; auto takes any causal language model"
    )
    tokenizer: str | None = HfArg(
        default=None, aliases=["--tokenizer_path"], help="folder of the tokenizer, if it is not in MODEL"
    )
    prompt_format: Literal["auto", "chat", "alpaca", "plain"] = HfArg(
        default="auto", help="auto: the tokenizer's chat template if it has one, else the Alpaca prompt"
    )
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(default="auto", help="auto: bf16 on CUDA, fp32 on CPU")
    device_budget: str | None = HfArg(
        default=None,
        help="bytes or a size such as 6GB that weights may take on the device; the others are fetched from the host, "
        "block by block, while the block before computes",
    )
    nvme_dir: str | None = HfArg(
        default=None, help="folder on a drive that holds the other weights instead of the host; needs --device_budget"
    )
    quant: Literal["2bit", "3bit", "4bit", "8bit"] | None = HfArg(
        default=None, help="bits of a GPTQ checkpoint; needed where the checkpoint does not declare them"
    )
    gptq_checkpoint: str | None = HfArg(
        default=None, help="GPTQ file (.pt or .safetensors) or folder; default: the one in MODEL"
    )
    gptq_group_size: int | None = HfArg(default=None, help="weights a scale, -1: a column; default: as the file says")

    def __post_init__(self):
        if self.gptq_checkpoint is not None and self.quant is None:
            raise InputError("--gptq_checkpoint needs --quant: --quant 4bit")
        if self.nvme_dir is not None and self.device_budget is None:
            raise InputError("--nvme_dir needs --device_budget: what weights may take on the device")


@dataclass(frozen=True)
class ChatModel:
    """A tokenizer, a prompt format and the facts of a model.

    `stop_ids` are the tokens that end an answer. `weight_bytes` is what parameters and buffers take.
    """

    name: str
    tokenizer: Any
    render: Callable
    """render(messages, add_generation_prompt, tools) -> str"""
    stop_ids: tuple[int, ...]
    context_length: int
    vocab_size: int
    device: torch.device
    precision: str
    weight_bytes: int


def positional_model(argv):
    """`MODEL …` as `--pretrain MODEL …`."""
    return ["--pretrain", *argv] if argv and not argv[0].startswith("-") else argv


def load_chat_model(args, name=None):
    """The ChatModel and the transformers model, in evaluation mode on its device, of ChatModelArguments.

    Raises InputError for whatever is missing or does not fit together.
    """
    device = choose_device(args.device)
    is_quantised = args.quant is not None or _is_quantised(args.pretrain)
    model, tokenizer = (_load_quantised if is_quantised else _load_plain)(args, device)
    model.requires_grad_(False).eval()
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {model.config.vocab_size}: "
            "they do not belong together; name the right folder with --tokenizer"
        )
    precision = {dtype: name for name, dtype in DTYPES.items()}[model.get_input_embeddings().weight.dtype]
    facts = ChatModel(
        name=name or Path(args.pretrain).resolve().name,
        tokenizer=tokenizer,
        render=prompt_renderer(tokenizer, args.prompt_format),
        stop_ids=stop_ids_of(model.generation_config, tokenizer),
        context_length=context_length_of(model, tokenizer),
        vocab_size=model.config.vocab_size,
        device=device,
        precision=f"{args.quant or 'GPTQ'}, {precision}" if is_quantised else precision,
        weight_bytes=_weight_bytes(model),
    )
    return facts, model


def _is_quantised(folder):
    declarations = ("quantize_config.json", "quant_config.json")
    config = Path(folder) / "config.json"
    declared = config.is_file() and '"quantization_config"' in config.read_text(encoding="utf-8", errors="replace")
    return declared or any((Path(folder) / name).is_file() for name in declarations)


def _load_quantised(args, device):
    model = load_quantized(
        args.gptq_checkpoint or args.pretrain,
        pretrained=args.pretrain if args.gptq_checkpoint else None,
        bits=int(args.quant.removesuffix("bit")) if args.quant else None,
        group_size=args.gptq_group_size,
        device=device,
        dtype=DTYPES.get(args.precision),
        device_budget=args.device_budget,
        nvme_dir=args.nvme_dir,
    )
    return model, load_tokenizer(args.tokenizer or args.pretrain)


def _load_plain(args, device):
    source = load_source(args)
    dtype = DTYPES.get(args.precision, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if args.device_budget is not None:
        budget, nvme_dir = args.device_budget, args.nvme_dir
        return offload(build_on_meta(source), device, dtype, budget, nvme_dir, source.folder), source.tokenizer
    if source.folder is None:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(source.config, dtype=dtype).to(device), source.tokenizer
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{source.folder}: cannot be loaded: {error}") from None
    return model.to(device), source.tokenizer


def stop_ids_of(generation_config, tokenizer):
    """Tokens that end an answer: the tokenizer's end of sequence, and those of the model's generation config."""
    declared = generation_config.eos_token_id if isinstance(generation_config, GenerationConfig) else None
    several = declared if isinstance(declared, list) else [declared]
    return tuple(sorted({token for token in (tokenizer.eos_token_id, *several) if token is not None}))


def context_length_of(model, tokenizer):
    """Tokens that prompt and answer may have together: the positions that the model has, else (ALiBi has no limit)
    what its tokenizer was made for, else 4096.
    """
    return max_positions(model) or (tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else 4096)


def _weight_bytes(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class BatchingArguments:
    """How many are answered at a time, and with how much memory."""

    max_batch: int = HfArg(default=32, help="answers that grow at a time")
    max_queue: int = HfArg(default=256, help="requests that may wait for their turn; more are refused")
    kv_budget_gb: float | None = HfArg(
        default=None, help="memory for keys and values; default: half of what is free when the model is loaded"
    )
    prefix_share: float = HfArg(default=0.25, help="part of it that keeps those of conversations that may go on")


def start(model_args, batching_args, name=None):
    """Load a model and start its Batcher, which whoever calls closes; returns (ChatModel, Batcher)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("a model is served by one process: start it without torchrun and --nproc_per_node")
    budget = batching_args.kv_budget_gb
    try:
        options = BatchingOptions(
            max_batch=batching_args.max_batch,
            max_queue=batching_args.max_queue,
            kv_budget_bytes=None if budget is None else int(budget * 1e9),
            prefix_share=batching_args.prefix_share,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from None
    chat_model, model = load_chat_model(model_args, name)
    return chat_model, Batcher(model, options)
