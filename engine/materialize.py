"""Values for a model that was built on meta: initial weights and rebuilt buffers, by the model's own rules.

The rules of a parameter are, from the module that owns it up to the root: `reset_parameters()`, and
`_init_weights(module)` of the nearest model above, the convention of transformers (and of nanoGPT). They run with
everything on meta but the tensors that are asked for, so that they cost no memory, touch no other weight, and give each
parameter values that depend on the seed and its name alone: not on the world size, the chunks, or the order in which
parameters are made.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parameter_names import parameter_aliases


def initialize_parameters(model: nn.Module, targets: Mapping[str, Tensor], seed: int) -> None:
    """Write initial values into `targets`: full-size tensors of any device and floating-point dtype, by parameter name.

    The parameters of `model` itself may be on meta, sharded or released; only their shapes are read. Random numbers are
    drawn on the CPU in float32 or wider and then cast, so that device and dtype do not change them either; the
    process's own random state stays as it was. Raises ValueError for a parameter that no rule sets, and for one of
    integer dtype.
    """
    canonical = {alias: name for name, aliases in parameter_aliases(model).items() for alias in aliases}
    with _everything_on_meta(model):
        for given_name, target in targets.items():
            name = canonical[given_name]
            if not target.is_floating_point():
                raise ValueError(f"{name} is {target.dtype} and has no initial value: load it with `pretrained`")
            target.copy_(_initial_value(model, name, target, seed))


def rebuild_buffers(model: nn.Module, device: torch.device | str, seed: int = 0) -> None:
    """Give every buffer of `model` that is on meta its right value, on `device`.

    A rule has set a buffer when what it leaves there does not depend on what was there before; random buffers follow
    `seed`. Raises ValueError for a buffer that no rule sets.
    """
    rebuilt: list[tuple[nn.Module, dict[str, Tensor]]] = []
    on_meta = [
        (path, module, [name for name, b in module._buffers.items() if b is not None and b.is_meta])
        for path, module in model.named_modules()
    ]
    with _everything_on_meta(model):
        for path, module, names in on_meta:
            if names:
                rebuilt.append((module, _rebuilt(model, path, module, names, seed)))
    for module, buffers in rebuilt:
        module._buffers.update({name: buffer.to(device) for name, buffer in buffers.items()})


def _initial_value(model: nn.Module, fqn: str, target: Tensor, seed: int) -> Tensor:
    path, _, leaf = fqn.rpartition(".")
    module = model.get_submodule(path)
    placeholder = module._parameters[leaf]
    value = torch.empty(target.shape, dtype=torch.promote_types(target.dtype, torch.float32), device="cpu")
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    try:
        for rules in _rules(model, path):
            value.fill_(math.nan)  # no rule leaves a NaN, so one that is found afterwards was never overwritten
            _run(rules, fqn, seed)
            if not value.sum().isnan():
                return value
    finally:
        module._parameters[leaf] = placeholder
    raise ValueError(
        f"{fqn}: no rule initialises it. Give {type(module).__name__} a reset_parameters(), or the model an "
        f"_init_weights(module) that sets it, or load it with `pretrained`, or build the model on the CPU"
    )


def _rebuilt(model: nn.Module, path: str, module: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    placeholders = {name: module._buffers[name] for name in names}
    try:
        for rules in _rules(model, path):
            outcomes = []
            for earlier in (0, 1):
                module._buffers.update({n: torch.full_like(b, earlier, device="cpu") for n, b in placeholders.items()})
                _run(rules, f"{path}: the buffers {names}", seed)
                outcomes.append({name: module._buffers[name] for name in names})
            unset = [name for name in names if not _agree(*(outcome[name] for outcome in outcomes))]
            if not unset:
                return outcomes[0]
    finally:
        module._buffers.update(placeholders)
    raise ValueError(
        f"{path or 'the model'}: no rule rebuilds the buffers {unset} of {type(module).__name__}, made on meta. "
        f"Set them in its reset_parameters() or in the model's _init_weights(module), or build the model on the CPU"
    )


def _agree(one: Tensor, other: Tensor) -> bool:
    return not one.is_meta and not other.is_meta and torch.equal(one, other)


def _rules(model: nn.Module, path: str) -> Iterator[list[Callable[[], object]]]:
    """The rules for what the module at `path` owns, in order: first without `reset_parameters`, mostly overwritten."""
    parts = path.split(".") if path else []
    chain = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]  # owner ... root
    resets, initialisers = [], []
    for i, module in enumerate(chain):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            resets.append(reset)
        initialiser = next((m._init_weights for m in chain[i:] if _initialises_modules(m)), None)
        if initialiser is not None:
            initialisers.append(lambda initialiser=initialiser, module=module: initialiser(module))
    yield initialisers
    yield resets + initialisers


def _initialises_modules(module: nn.Module) -> bool:
    initialiser = getattr(module, "_init_weights", None)
    if initialiser is None:
        return False
    try:
        inspect.signature(initialiser).bind(module)
    except TypeError:  # takes no module: a method of that name for the module itself
        return False
    return True


def _run(rules: list[Callable[[], object]], name: str, seed: int) -> None:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        # Not torch.manual_seed, which would reseed the devices' generators too.
        torch.random.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for rule in rules:
            try:
                rule()
            except Exception as error:
                raise ValueError(f"{name}: its initialisation fails on a model made on meta: {error}") from error


@contextmanager
def _everything_on_meta(model: nn.Module) -> Iterator[None]:
    """Replaces every parameter and buffer by a placeholder on meta, ties kept, and puts them back at the end."""
    saved = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    placeholders: dict[int, Tensor] = {}

    def placeholder(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
        return placeholders.setdefault(id(tensor), meta)

    try:
        for module, parameters, buffers in saved:
            module._parameters.update({name: placeholder(tensor) for name, tensor in parameters.items()})
            module._buffers.update({name: placeholder(tensor) for name, tensor in buffers.items()})
        yield
    finally:
        for module, parameters, buffers in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
