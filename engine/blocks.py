"""Which modules are blocks, and which modules need which parameters. Reads a model, changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """A module around whose forward and backward pass its parameters must be whole."""

    name: str
    module: nn.Module
    fqns: frozenset[str]
    block: str | None
    """The block it lies in. While that block itself runs, its parameters are whole already."""


@dataclass(frozen=True)
class ModelParts:
    blocks: tuple[tuple[str, tuple[str, ...]], ...]
    """(name, its parameters' names) in execution order. Every parameter is in one block: a tied one in the first."""
    units: tuple[Unit, ...]
    block_modules: tuple[str, ...]
    """The names of the modules that are blocks."""


def find_parts(model: nn.Module, max_numel: int) -> ModelParts:
    """Blocks are what transformers says must not be split (`_no_split_modules`), else the entries of the outermost
    `nn.ModuleList`s. What lies outside them (embeddings, final norm, head; all of a model that has no blocks) is
    grouped in order of registration, a group being closed when it has `max_numel` parameters or a block follows."""
    # A parameter's name is the first of its tied names, as in named_parameters().
    names = {parameter: name for name, parameter in model.named_parameters()}
    block_names = _block_names(model)
    blocks: list[tuple[str, list[str]]] = []
    units: list[Unit] = []
    placed: set[str] = set()
    open_numel = None  # parameters in the group that is still open, None when a new one must be begun

    for name, module in model.named_modules():
        enclosing = next((block for block in block_names if name == block or name.startswith(f"{block}.")), None)
        owns_directly = bool(own_parameters(module))
        if enclosing is not None and name == enclosing:
            fqns = [names[parameter] for parameter in module.parameters()]
            new = [fqn for fqn in fqns if fqn not in placed]
            if new:
                blocks.append((name, new))
                placed.update(new)
            open_numel = None
            units.append(Unit(name, module, frozenset(fqns), None))
        elif owns_directly:
            holds_blocks = any(block.startswith(f"{name}.") or name == "" for block in block_names)
            parameters = own_parameters(module) if holds_blocks else module.parameters()
            fqns = [names[parameter] for parameter in parameters]
            units.append(Unit(name or "model", module, frozenset(fqns), enclosing))
            direct = [names[parameter] for parameter in own_parameters(module)]
            new = [fqn for fqn in direct if fqn not in placed]
            if enclosing is None and new:
                if open_numel is None or open_numel >= max_numel:
                    blocks.append((name or "model", []))
                    open_numel = 0
                blocks[-1][1].extend(new)
                placed.update(new)
                open_numel += sum(parameter.numel() for parameter in own_parameters(module))
    return ModelParts(tuple((name, tuple(fqns)) for name, fqns in blocks), tuple(units), tuple(block_names))


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that `module` reads itself: its own, and those in an nn.ParameterList or ParameterDict of its own, which is
    never called."""
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return []
    lists = [child for child in module.children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]
    return [parameter for owner in (module, *lists) for parameter in owner.parameters(recurse=owner is not module)]


def _block_names(model: nn.Module) -> list[str]:
    declared: set[str] = set()
    for module in model.modules():
        declared.update(getattr(module, "_no_split_modules", None) or ())
    candidates = [name for name, module in model.named_modules() if name and type(module).__name__ in declared]
    return _outermost(candidates or list(_module_list_entries(model)))


def _module_list_entries(model: nn.Module) -> Iterator[str]:
    containers = (nn.ModuleList, nn.ModuleDict)  # have no forward of their own, so they cannot be a block
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for key, child in module.named_children():
                if not isinstance(child, containers):
                    yield f"{name}.{key}" if name else key


def _outermost(names: list[str]) -> list[str]:
    kept: list[str] = []
    for name in names:  # named_modules() gives a module before what lies in it
        if not any(name.startswith(f"{outer}.") for outer in kept):
            kept.append(name)
    return kept
