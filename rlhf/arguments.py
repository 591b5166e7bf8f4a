"""Options: frozen dataclasses grouped by decision, filled from a YAML file with command-line flags on top.

A stage names the groups it uses and gets one instance of each. YAML values are turned into flags and put before the
real ones, so both go through one parser, with one set of types, aliases and errors.
"""

import argparse
import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser

from .errors import InputError, nearest
from .errors import require as _require


@dataclass(frozen=True)
class ModelArguments:
    """What is trained."""

    pretrain: str = HfArg(
        help="folder in Hugging Face layout (read offline), of a model or of PEFT's adapters (merged into their base "
        "first), or the name of a preset with random weights"
    )
    model: Literal["auto", "llama", "gpt2", "opt", "bloom"] = HfArg(
        default="auto", help="family that --pretrain has to be of; auto takes any causal language model"
    )
    tokenizer: str | None = HfArg(default=None, help="folder of the tokenizer, if it is not in --pretrain")
    gradient_checkpointing: bool = HfArg(
        default=False, help="recompute activations in backward instead of keeping them"
    )


NAMES_BY_COMMA = ("lora_target_modules",)
"""Options that YAML may give a list for."""


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters (PEFT's LoRA): with a rank, only they are trained, and the score head where there is one."""

    lora_rank: int = HfArg(default=0, aliases=["--lora_r"], help="rank of the adapters; 0: train all weights")
    lora_alpha: float | None = HfArg(default=None, help="scale of the adapters, divided by the rank; default 2 x rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    lora_target_modules: str = HfArg(
        default="all-linear", help="names of the linear layers to adapt, separated by commas; default: all but the head"
    )
    use_rslora: bool = HfArg(default=False, help="divide alpha by the square root of the rank instead")
    lora_merge: bool = HfArg(
        default=False, help="save the merged model in --save_path, and the adapter in its subfolder 'adapter'"
    )

    def __post_init__(self):
        _require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "at least 0")
        _require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "> 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")
        if not self.lora_rank:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                _require(value == field.default, field.name, value, f"{field.default} without --lora_rank")

    @property
    def saves_adapters(self):
        """Whether a run saves adapters in place of a whole model."""
        return bool(self.lora_rank) and not self.lora_merge


@dataclass(frozen=True)
class StrategyArguments:
    """How it is spread over ranks and tiers."""

    strategy: str = HfArg(
        default="zero3", help="naive, ddp, zero1, zero2[_cpu], zero3[_cpu], gemini_{cuda,cpu,auto,nvme}"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(default="auto", help="auto: bf16 on CUDA, fp32 on CPU")
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto: cuda where there is one")
    device_budget: str | None = HfArg(
        default=None, help="bytes or a size such as 24GB that training may take on the device"
    )
    host_budget: str | None = HfArg(default=None, help="the same for host memory")
    nvme_dir: str | None = HfArg(default=None, help="gemini_nvme: a folder on a local drive, emptied in the end")
    state_precision: Literal["exact", "8bit"] = HfArg(
        default="exact", help="8bit: Adam's moments in a byte each, on every tier"
    )
    offload_activations: bool = HfArg(
        default=False, help="keep the blocks' saved inputs on the host; needs --gradient_checkpointing"
    )


@dataclass(frozen=True)
class TextArguments:
    """What it is trained on."""

    dataset: str = HfArg(
        help="jsonl or JSON array, gzipped or not, or a folder of Hugging Face datasets (their train split); the "
        "schema is found by its keys"
    )
    eval_dataset: str | None = HfArg(default=None, help="held-out rows in the same formats")
    eval_fraction: float = HfArg(default=0.0, help="share of --dataset to hold out instead of --eval_dataset")
    max_datasets_size: int | None = HfArg(default=None, help="read no more than this many rows")
    max_len: int = HfArg(default=512, help="tokens a row; what is longer is cut")

    def __post_init__(self):
        _require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "at least 0 and below 1")
        _require(
            not (self.eval_dataset and self.eval_fraction), "eval_fraction", self.eval_fraction, "0 with --eval_dataset"
        )
        _require(
            self.max_datasets_size is None or self.max_datasets_size > 0,
            "max_datasets_size",
            self.max_datasets_size,
            "> 0",
        )
        _require(self.max_len >= 2, "max_len", self.max_len, "at least 2")


@dataclass(frozen=True)
class DataArguments(TextArguments):
    """The same, for rows that have prompts."""

    prompt_format: Literal["auto", "chat", "alpaca", "plain"] = HfArg(
        default="auto", help="auto: the tokenizer's chat template if it has one, else the Alpaca prompt"
    )


@dataclass(frozen=True)
class PackingArguments:
    """Whether rows hold several documents."""

    packing: bool = HfArg(
        default=False, help="fill rows of --max_len tokens with whole documents, each of which sees itself alone"
    )


@dataclass(frozen=True)
class OptimizationArguments:
    """How far and how fast."""

    batch_size: int = HfArg(default=4, help="rows a micro-batch on each rank")
    accumulation_steps: int = HfArg(default=8, aliases=["--accimulation_steps"], help="micro-batches an optimizer step")
    lr: float = HfArg(default=2e-5, help="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = HfArg(default="cosine", help="shape after the warm-up")
    warmup_ratio: float = HfArg(default=0.03, help="share of all steps over which the rate rises from 0")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decay of matrices; biases and norms have none")
    adam_beta1: float = HfArg(default=0.9)
    adam_beta2: float = HfArg(default=0.95)
    max_grad_norm: float = HfArg(default=1.0, help="global gradient norm to clip at")
    max_epochs: int = HfArg(default=1)
    max_steps: int | None = HfArg(default=None, help="optimizer steps, instead of --max_epochs")
    seed: int = HfArg(default=42, help="of the data order, of dropout and of random weights")

    def __post_init__(self):
        for name in ("batch_size", "accumulation_steps", "lr", "max_grad_norm", "max_epochs"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "> 0 and finite")
        _require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "> 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")


@dataclass(frozen=True)
class RunArguments:
    """What is written where, and how often."""

    save_path: str = HfArg(
        default="runs/latest", help="folder for the model, its checkpoints, metrics and resolved config"
    )
    log_interval: int = HfArg(default=10, help="steps between two lines of metrics")
    save_interval: int = HfArg(default=0, help="steps between two checkpoints; 0: none")
    save_total_limit: int = HfArg(default=2, help="checkpoints to keep")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint under --save_path")
    tensorboard: bool = HfArg(default=True, help="write TensorBoard files under --save_path")
    wandb_project: str | None = HfArg(default=None, help="also log to this Weights & Biases project")

    def __post_init__(self):
        for name in ("log_interval", "save_total_limit"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        _require(self.save_interval >= 0, "save_interval", self.save_interval, "at least 0")
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise InputError(f"--wandb_project {self.wandb_project}: wandb is not installed: pip install wandb")


@dataclass(frozen=True)
class OutputArguments(RunArguments):
    """The same of a stage that evaluates on held-out rows."""

    eval_interval: int = HfArg(default=0, help="steps between two evaluations; 0: only at the start and the end")

    def __post_init__(self):
        super().__post_init__()
        _require(self.eval_interval >= 0, "eval_interval", self.eval_interval, "at least 0")


def _flags_of(field):
    return [f"--{field.name}", *field.metadata.get("aliases", [])]


def _yaml_as_flags(path, known):
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: holds {type(values).__name__}, not `option: value` lines")
    flags = []
    for key, value in values.items():
        if f"--{key}" not in known:
            raise InputError(
                f"--config {path}: unknown option '{key}'{nearest(str(key), [k.lstrip('-') for k in known])}"
            )
        if isinstance(value, list) and key in NAMES_BY_COMMA:
            value = ",".join(map(str, value))
        if isinstance(value, dict | list):
            raise InputError(f"--config {path}: '{key}' is a {type(value).__name__}; it takes one value")
        if value is not None:
            flags.append(f"--{key}={value}")
    return flags


class _Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(groups, argv, prog):
    """Fill one instance of each dataclass in `groups` from `argv` (a list of strings).

    `--config FILE` names a YAML file of `option: value` lines; flags win over it. Raises InputError for a value that
    does not parse, and for a flag or key that no group has, naming the nearest.
    """
    parser = _Parser(groups, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of option: value lines; flags win over it")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    config = before.parse_known_args(argv)[0].config
    known = [flag for group in groups for field in dataclasses.fields(group) for flag in _flags_of(field)]
    flags = _yaml_as_flags(config, known) if config else []
    *filled, _, unknown = parser.parse_args_into_dataclasses(
        [*flags, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise InputError(f"unexpected argument '{flag}' (see {prog} --help)")
        raise InputError(f"unknown flag '{flag}'{nearest(flag, known)} (see {prog} --help)")
    for name, value in resolved(filled).items():
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "finite")
    return tuple(filled)


def resolved(groups):
    """The options of all groups as one flat dict, as `--config` would take them."""
    return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}


def write_config(path, groups):
    """Write the resolved options as YAML, so that `--config PATH` repeats the run."""
    Path(path).write_text(yaml.safe_dump(resolved(groups), sort_keys=False, allow_unicode=True), encoding="utf-8")
