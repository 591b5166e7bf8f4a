"""One base for several models (--share_base): critic and reward model are adapters and heads on the actor's weights.

The engine holds one model, a causal language model with an adapter for each role and a score head for all but the
actor. Its frozen weights are there once; the reference is the model with no adapter on.
"""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from .errors import InputError
from .logprobs import decoder_and_head, hidden_states
from .lora import (
    ADAPTER,
    CONFIG_NAME,
    STATISTICS_FILE,
    WEIGHTS_NAME,
    adapted_layers,
    adapter_on,
    add_adapters,
    holds_adapters,
)
from .lora import NEW_PARAMETERS as ADAPTER_PARAMETERS
from .reward_model import normalization

CRITIC, REWARD = "critic", "reward"
HEADS = {CRITIC: "critic_score", REWARD: "reward_score"}


class AdapterScores(nn.Module):
    """Scores every token by one adapter and head of a model that has several. Stands where a critic or a reward model
    of its own would, and has no parameters of its own."""

    def __init__(self, model, adapter):
        super().__init__()
        self._shared = (model,)  # in a tuple, so that it is no submodule
        self.adapter = adapter

    @property
    def shared_model(self):
        return self._shared[0]

    def forward(self, input_ids):
        """Float32 scores [B, T]; rows are padded on the right."""
        model = self.shared_model
        with adapter_on(model, self.adapter):
            hidden = hidden_states(decoder_and_head(model)[0], input_ids)
            return getattr(model, HEADS[self.adapter])(hidden).squeeze(-1).float()


def with_scorers(actor, lora_args, seed, reward_folder, is_judge, is_learned):
    """An Unplaced actor with what critic (`is_learned`) and reward model (`is_judge`) need beside it. `reward_folder`:
    of an adapter that `megalith rm` has trained on the actor's base; the critic starts as it too. None: heads begin at
    0 and at random. Raises InputError for a folder that is no adapter, or is of another base."""
    model = actor.model
    config, tensors = None, {}
    if reward_folder is not None:
        config, tensors = _read_adapter(reward_folder, actor.folder)
    width = model.get_input_embeddings().embedding_dim
    for role, wanted in ((CRITIC, is_learned), (REWARD, is_judge)):
        if not wanted:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the purpose
            add_adapters(model, lora_args, seed, role, copy.deepcopy(config or model.peft_config[ADAPTER]))
        head = nn.Linear(width, 1, bias=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head.weight.normal_(std=(width + 1) ** -0.5)
            if role == CRITIC:
                head.weight.zero_()
            _fill(model, role, head, tensors)
        setattr(model, HEADS[role], head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_of(name, ADAPTER) or _is_of(name, CRITIC))
    missing = (*actor.allow_missing, *ADAPTER_PARAMETERS, *(f"{head}.*" for head in HEADS.values()))
    return replace(actor, allow_missing=missing)


def statistics_of(folder):
    """(mean, std) of an adapter's scores. Raises InputError where it was saved without them."""
    path = Path(folder) / STATISTICS_FILE
    return normalization(SimpleNamespace(**json.loads(path.read_text())) if path.is_file() else None)


def of_role(model, role):
    """The parameters of a role: its adapter's, and its head's."""
    return [parameter for name, parameter in model.named_parameters() if _is_of(name, role)]


def _is_of(name, role):
    return (".lora_" in name and f".{role}." in name) or name.startswith(f"{HEADS.get(role)}.")


def _read_adapter(folder, base):
    path = Path(folder)
    if not holds_adapters(folder):
        raise InputError(f"--share_base: {folder} is no adapter: train one with `megalith rm --lora_rank … `")
    stored = json.loads((path / CONFIG_NAME).read_text())["base_model_name_or_path"]
    if base is None or stored is None or Path(stored).resolve() != Path(base).resolve():
        raise InputError(f"--share_base: the adapter {folder} is of the base {stored}, and --pretrain is {base}")
    config = LoraConfig.from_pretrained(folder)
    config.modules_to_save = config.task_type = None
    config.inference_mode = False
    return config, load_file(path / WEIGHTS_NAME)


def _fill(model, role, head, tensors):
    """Copy what a file of adapters holds; nothing may be left over."""
    rest = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if not rest:
        return
    for name, layer in adapted_layers(model).items():
        for part in ("lora_A", "lora_B"):
            if role in getattr(layer, part):
                getattr(layer, part)[role].weight.copy_(rest.pop(f"{name}.{part}.weight"))
    head.weight.copy_(rest.pop("score.weight"))
    if rest:
        raise InputError(f"--share_base: the adapter has {next(iter(rest))}, which has no place in this model")
