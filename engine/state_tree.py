"""Nested values with tensors anywhere in them, as JSON and a flat dictionary of tensors. No pickle.

JSON has no tuples, no keys but strings, no arrays: what it lacks is an object with one tag for key, `{"$tuple":
[...]}`.
"""

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

_TENSOR, _ARRAY, _SCALAR, _TUPLE, _DICT = "$tensor", "$array", "$scalar", "$tuple", "$dict"


def encode_tree(value: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """A JSON value and the tensors that it names, each name beginning with `prefix`.

    `value` is made of None, bool, int, float, str, list, tuple, dict (any keys of these kinds), tensors, numpy arrays
    and numpy scalars. Raises TypeError that names the place of anything else.
    """
    tensors: dict[str, Tensor] = {}

    def store(tensor: Tensor) -> str:
        name = f"{prefix}{len(tensors)}"
        tensors[name] = tensor.detach()
        return name

    def store_array(value: numpy.ndarray | numpy.generic, place: str) -> str:
        try:
            return store(torch.from_numpy(numpy.array(value)))
        except TypeError as error:
            raise TypeError(f"{place} is an array of {value.dtype}, which a checkpoint cannot hold") from error

    def encode(value: Any, place: str) -> Any:
        # Of exactly these types: what inherits from them would come back as something else.
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return {_TENSOR: store(value)}
        if isinstance(value, numpy.generic):
            return {_SCALAR: store_array(value, place)}
        if isinstance(value, numpy.ndarray):
            return {_ARRAY: store_array(value, place)}
        if type(value) in (list, tuple):
            items = [encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
            return items if type(value) is list else {_TUPLE: items}
        if isinstance(value, dict):
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}
            pairs = [[encode(key, f"a key of {place}"), encode(value[key], f"{place}[{key!r}]")] for key in value]
            return {_DICT: pairs}
        raise TypeError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
            f"give numbers, strings, tensors, arrays, and lists, tuples and dicts of these"
        )

    return encode(value, "state"), tensors


def decode_tree(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode_tree` was given. Dicts come back as plain dicts, in their order."""
    if isinstance(value, list):
        return [decode_tree(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag == _TENSOR:
        return tensors[value[tag]]
    if tag in (_ARRAY, _SCALAR):
        array = tensors[value[tag]].numpy()
        return array if tag == _ARRAY else array[()]
    if tag == _TUPLE:
        return tuple(decode_tree(item, tensors) for item in value[tag])
    if tag == _DICT:
        return {decode_tree(key, tensors): decode_tree(item, tensors) for key, item in value[tag]}
    return {key: decode_tree(item, tensors) for key, item in value.items()}


def tensor_names(value: Any) -> list[str]:
    """The names of all tensors in an encoded value."""
    if isinstance(value, list):
        return [name for item in value for name in tensor_names(item)]
    if not isinstance(value, dict):
        return []
    tag = next(iter(value), "")
    if tag in (_TENSOR, _ARRAY, _SCALAR):
        return [value[tag]]
    return [name for item in value.values() for name in tensor_names(item)]
