"""Tensors in what modules are called with and return."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def tensors_in(value: Any, in_objects: bool = True, depth: int = 0) -> Iterable[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings, and if `in_objects` in the attributes of other objects
    (dataclasses).

    A block's inputs are looked for without objects: a cache of keys and values holds those of other blocks, whose
    gradients are complete much later than the block's own.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, in_objects, depth)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, in_objects, depth)
    elif in_objects and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), in_objects, depth)
    elif in_objects and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and depth < 2:
        yield from tensors_in(list(vars(value).values()), in_objects, depth + 1)
