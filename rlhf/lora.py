"""LoRA: PEFT's adapters inside a model that is on meta, trained by the engine over frozen, sharded base weights.

PEFT wraps the adapted layers and leaves the model's class as it is: `q_proj.weight` becomes
`q_proj.base_layer.weight`, with `q_proj.lora_A.default.weight` and `lora_B` beside it. The engine reads the base
weights from their folder under the old names (`stored_name`); the adapters have their initial values before that.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from .. import engine
from .errors import InputError

ADAPTER = "default"  # PEFT's name of a model's first adapter
NEW_PARAMETERS = ("*.lora_A.*", "*.lora_B.*")  # what a folder of base weights lacks
HEAD = "score"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
STATISTICS_FILE = "score_statistics.json"
RANDOM_BASE_WARNING = (
    "warning: the adapters' base is a preset's random weights, which are not saved: use the adapters with --lora_merge"
)


def add_adapters(model, lora_args, seed, adapter=ADAPTER, config=None):
    """Put adapters into `model` (on meta) and freeze everything else but the score head. Returns `model`, changed only
    where `lora_args.lora_rank` is not 0.

    Initial values are LoRA's own, the same on every rank: lora_A uniform as in nn.Linear, lora_B zero, so that the
    adapted model computes what its base does. `adapter`: PEFT's name of these, where a model has several; `config`:
    instead of one of `lora_args`. Raises InputError when no layer has a name that was asked for, and for
    layers other than linear ones.
    """
    if not lora_args.lora_rank:
        return model
    wanted = lora_args.lora_target_modules
    targets = [name.strip() for name in wanted.split(",")]
    config = config or LoraConfig(
        r=lora_args.lora_rank,
        lora_alpha=lora_args.lora_alpha or 2 * lora_args.lora_rank,
        lora_dropout=lora_args.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        use_rslora=lora_args.use_rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores W transposed
        task_type="SEQ_CLS" if hasattr(model, HEAD) else "CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model, adapter)
    except ValueError as error:
        raise InputError(f"--lora_target_modules {wanted}: {error}") from None
    for target in targets if targets != ["all-linear"] else ():
        if not any(f".{name}".endswith(f".{target}") for name in adapted_layers(model)):
            raise InputError(f"--lora_target_modules {wanted}: the model has no layer called {target}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in adapted_layers(model).items():
            if not isinstance(layer, LoraLinear):
                raise InputError(f"--lora_target_modules {wanted}: {name} is no linear layer; only those are adapted")
            if adapter in layer.lora_A:
                layer.lora_A[adapter].to_empty(device="cpu")
                layer.lora_B[adapter].to_empty(device="cpu")
                layer.reset_lora_parameters(adapter, init_lora_weights=True)
                layer.set_adapter(ADAPTER)
    if hasattr(model, HEAD):
        getattr(model, HEAD).requires_grad_(True)
        config.modules_to_save = [HEAD]  # only noted, for the adapter's file: PEFT would wrap the head and rename it
    return model


def adapted_layers(model):
    """{name: layer} of the layers that have adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def stored_name(name):
    """What a parameter is called in the folder of the base weights."""
    return name.replace(".base_layer.", ".")


def adapters_off(model):
    """The base model, for as long as the context lasts: the reference policy of a policy with adapters."""
    return adapter_on(model, None)


@contextlib.contextmanager
def adapter_on(model, adapter):
    """The model with the adapter of that name and no other, or with none, for as long as the context lasts. What is
    trained stays so, whichever is on."""
    layers = list(adapted_layers(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def switch(name):
        for layer in layers:
            if name is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(name)
        for layer in layers if name is not None else ():
            layer.enable_adapters(True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    switch(adapter)
    try:
        yield model
    finally:
        switch(ADAPTER)


def save_adapter(folder, model, base_folder, is_first, adapter=ADAPTER, head=HEAD):
    """Write the adapters, and the head where there is one, as PEFT does: adapter_config.json and
    adapter_model.safetensors, for `PeftModel.from_pretrained`. A collective."""

    def is_saved(name):
        return (".lora_" in name and f".{adapter}." in name) or name.startswith(f"{head}.")

    names = {name for name, _ in model.named_parameters() if is_saved(name)}
    tensors = {
        f"base_model.model.{name.replace(f'.{adapter}.', '.').replace(f'{head}.', f'{HEAD}.')}": tensor
        for name, tensor in engine.whole_weights(model, names)
    }
    if is_first:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = model.peft_config[adapter]
        config.base_model_name_or_path = base_folder
        if head != HEAD:  # the model is a language model, and what is saved of it scores
            config.task_type, config.modules_to_save = "SEQ_CLS", [HEAD]
        config.save_pretrained(folder)
        statistics = {
            name: value for name in ("mean", "std") if (value := getattr(model.config, name, None)) is not None
        }
        if statistics and head == HEAD:  # of a reward model's scores; a folder of adapters has no config.json
            (Path(folder) / STATISTICS_FILE).write_text(json.dumps(statistics))
        save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})


def merged_weights(model):
    """Yield (stored name, base weight + scale · B A) of every parameter, block by block, for `engine.save_pretrained`.
    The weights at rest stay as they are."""
    layers = adapted_layers(model)
    names = {name for name, _ in model.named_parameters() if ".lora_" in name}
    adapters = {name: tensor.float() for name, tensor in engine.whole_weights(model, names)}
    for name, weight in engine.whole_weights(model):
        if name in adapters:
            continue
        path, _, leaf = name.rpartition(".base_layer.")
        if leaf == "weight":
            layer = layers[path]
            delta = adapters[f"{path}.lora_B.{ADAPTER}.weight"] @ adapters[f"{path}.lora_A.{ADAPTER}.weight"]
            delta *= layer.scaling[ADAPTER]
            weight = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
        yield stored_name(name), weight


# A folder of adapters as a model


def holds_adapters(folder):
    """Whether `folder` is an adapter's, as PEFT writes it, and no model's."""
    return (Path(folder) / CONFIG_NAME).is_file() and not (Path(folder) / "config.json").is_file()


def merged_folder(folder):
    """The subfolder `merged` of an adapter's folder: the base model with the adapters in its weights, and a tokenizer.

    It is written once, by the first process on the machine that asks (the others wait for it), and again after the
    adapters changed. PEFT reads the base model, which is in memory as a whole meanwhile. Raises InputError for whatever
    is missing, or does not fit together.
    """
    folder = Path(folder)
    weights, merged = folder / WEIGHTS_NAME, folder / "merged"
    if not weights.is_file():
        raise InputError(f"{folder}: holds {CONFIG_NAME} and no {WEIGHTS_NAME} (pickled adapters are not read)")
    try:
        lock = os.open(folder / ".merging", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise InputError(f"{folder}: the merged model cannot be written into the adapter's folder: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (merged / "config.json").is_file() or merged.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            partial = folder / "merging"
            shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run
            _merge(folder, partial)
            shutil.rmtree(merged, ignore_errors=True)
            os.replace(partial, merged)
    finally:
        os.close(lock)
    return str(merged)


def _merge(folder, target):
    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base or not Path(base).is_dir():
        raise InputError(
            f"{folder}: holds adapters of the model {base!r}, and there is no such folder: put the base model there, "
            f"or correct base_model_name_or_path in {CONFIG_NAME}"
        )
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    try:
        if config.task_type == "SEQ_CLS":
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, **options)
        model = PeftModel.from_pretrained(model, str(folder))
        unused = load_file(folder / WEIGHTS_NAME).keys() ^ get_peft_model_state_dict(model).keys()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{folder}: its adapters cannot be put into {base}: {error}") from None
    if unused:
        raise InputError(
            f"{folder}: {sorted(unused)[0]} and {len(unused) - 1} others are not in both, adapters and {base}"
        )
    model = model.merge_and_unload()
    if (folder / STATISTICS_FILE).is_file():
        for name, value in json.loads((folder / STATISTICS_FILE).read_text()).items():
            setattr(model.config, name, value)
    model.save_pretrained(target)
    named = folder if (folder / "tokenizer_config.json").is_file() else base
    AutoTokenizer.from_pretrained(named, local_files_only=True).save_pretrained(target)
