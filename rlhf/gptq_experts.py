"""The experts of a mixture-of-experts block, linear by linear.

transformers holds a block's experts as two 3-D parameters; GPTQ, and checkpoints, have three linears for each expert.
Those get names here, under the module that holds them: `mlp.experts.3.gate_proj`, as GPTQModel calls them too.
"""

import contextlib

import torch
from torch import Tensor, nn

from ..engine.parameter_names import parameter_aliases
from ..engine.weight_conversion import saving_conversions
from .errors import InputError

_FUSED = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj


class LinearExperts(nn.Module):
    """In the place of fused experts: children "0", "1", ... of three modules each.

    With `call_all`, experts that no token goes to are called too, with no rows: whoever watches sees every linear.
    """

    def __init__(self, experts: list[Expert], act_fn: nn.Module, call_all: bool):
        super().__init__()
        self.num_experts, self.call_all = len(experts), call_all
        self.act_fn = act_fn
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Of tokens [T, D], the experts [T, k] each goes to and their weights [T, k]: their weighted sum [T, D].

        All experts' first linears come before any's second, so that those alike are calibrated in one pass.
        """
        inner = {}
        for index in range(self.num_experts):
            tokens, places = torch.where(top_k_index == index)
            if len(tokens) or self.call_all:
                expert, x = self.get_submodule(str(index)), hidden_states[tokens]
                inner[index] = tokens, places, self.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
        total = torch.zeros_like(hidden_states)
        for index, (tokens, places, x) in inner.items():
            y = self.get_submodule(str(index)).down_proj(x) * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, y.to(total.dtype))
        return total


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts as 3-D parameters, by name. Raises InputError for a kind that is not known."""
    found = {}
    for name, module in model.named_modules():
        many = [key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() > 2]
        if not many:
            continue
        gate = type(module).__dict__.get("_apply_gate")
        usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
        unusual = [key for key, value in usual.items() if getattr(module, key, value) != value]
        if sorted(many) != sorted(_FUSED) or unusual or getattr(gate, "__name__", "") != "_default_apply_gate":
            raise InputError(f"{name}: {type(module).__name__} holds its experts in a way that is not quantised")
        found[name] = module
    return found


def fused_parameters(model: nn.Module) -> set[str]:
    """The names of those parameters."""
    return {f"{name}.{key}" for name in fused_experts(model) for key in _FUSED}


def linear_experts(fused: nn.Module, call_all: bool) -> LinearExperts:
    """The same experts as linears whose weights are views of the fused ones."""

    def linear(weight):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    experts = []
    for gate_up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True):
        experts.append(Expert(*(linear(weight) for weight in (*gate_up.chunk(2), down))))
    return LinearExperts(experts, fused.act_fn, call_all)


@contextlib.contextmanager
def as_linears(block: nn.Module):
    """Meanwhile, the fused experts of `block` are linears that share their weights."""
    fused = fused_experts(block)
    try:
        for name, module in fused.items():
            block.set_submodule(name, linear_experts(module, call_all=True))
        yield
    finally:
        for name, module in fused.items():
            block.set_submodule(name, module)


def stored_linears(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{name of an expert's linear: its names in a checkpoint}: as `save_pretrained` has it, and as it is called here.

    Which of the names is which is found out by having small numbered experts converted for saving.
    """
    experts = fused_experts(model)
    if not experts:
        return {}
    linears: dict[str, list[str]] = {}  # fused parameter to its linears, in the order of the numbers
    tensors = {name: model.get_parameter(name) for name in parameter_aliases(model)}
    for name, module in experts.items():
        count = len(module.down_proj)
        for key, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            linears[f"{name}.{key}"] = [f"{name}.{index}.{leaf}" for index in range(count) for leaf in leaves]
            numbers = torch.arange(count * len(leaves), dtype=torch.float32)
            tensors[f"{name}.{key}"] = numbers.view(count, len(leaves), 1)
    names = {}
    for conversion in saving_conversions(model, tensors):
        for source in linears.keys() & set(conversion.sources):
            for target, value in conversion.targets.items():
                if value.numel() != 1:
                    raise InputError(f"{source}: its experts are stored together, and not linear by linear")
                linear = linears[source][int(value)]
                names[linear] = tuple(dict.fromkeys([target.removesuffix(".weight"), linear]))
    return names
