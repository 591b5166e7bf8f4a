"""The names of a model's parameters, tied ones included, and how an error lists them."""

from collections.abc import Mapping

from torch import nn

_LISTED = 8


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter of `model` once: its canonical name to all its names, more than one where it is tied.

    The canonical name is the one whose initialisation and checkpoint entry count: the first that a transformers model
    does not declare as tied to another (`all_tied_weights_keys`), else the first.
    """
    declared = declared_ties(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {next((n for n in group if n not in declared), group[0]): tuple(group) for group in names.values()}


def declared_ties(model: nn.Module) -> dict[str, str]:
    """Names that the model class itself ties when it is built, to the names they are tied to."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def listed(entries: Mapping[str, object]) -> str:
    """The first few names with their values, and how many more there are."""
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(f"{name} {value}" for name, value in list(entries.items())[:_LISTED]) + more


def persistent_buffer_names(model: nn.Module) -> set[str]:
    """The names of the buffers that `state_dict` would hold, without asking for the weights."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
