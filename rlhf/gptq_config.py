"""What a GPTQ checkpoint declares about itself: quantize_config.json, or quantization_config in config.json.

Files of 2023 declare nothing, others too little or wrongly: what is declared here is only compared with the shapes of
the tensors, which decide (`gptq_tensors.py`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import InputError

CONFIG_NAME = "quantize_config.json"
_CONFIG_NAMES = (CONFIG_NAME, "quant_config.json")
_FORMATS = ("gptq", "gptq_v2")
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size", "method": "quant_method", "format": "checkpoint_format"}


@dataclass(frozen=True)
class GptqConfig:
    """None: not declared."""

    source: str = "the checkpoint"
    """Where it was read, for errors."""
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    checkpoint_format: str | None = None
    """"gptq" (v1: zero-points stored less one) or "gptq_v2"."""
    quantizer: str = ""
    dynamic: Mapping[str, Mapping] = field(default_factory=dict)
    """Regular expression on a module's name to its own options; None instead of options: it is not quantised."""

    def of_module(self, name: str) -> "GptqConfig":
        """With the overrides of the first pattern of `dynamic` that matches the beginning of `name`."""
        for pattern, options in self.dynamic.items():
            if re.match(pattern, name):
                known = {key: value for key, value in options.items() if key in ("bits", "group_size", "sym")}
                return replace(self, source=f"{self.source}, dynamic '{pattern}'", **known)
        return self


def read_config(folders) -> GptqConfig:
    """The first declaration found in these folders, or an empty one.

    Raises InputError for a file that is not JSON, a value of the wrong kind, and a format that is not GPTQ's own.
    """
    for folder in folders:
        for name in (*_CONFIG_NAMES, "config.json"):
            path = Path(folder) / name
            if not path.is_file():
                continue
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                declared = values.get("quantization_config") if name == "config.json" else values
            except (OSError, ValueError, AttributeError) as error:
                raise InputError(f"{path}: is no JSON object that can be read: {error}") from None
            if declared:
                return parse_config(declared, str(path))
    return GptqConfig()


def parse_config(values: Mapping, source: str) -> GptqConfig:
    """A declaration of AutoGPTQ, GPTQModel or transformers. Raises InputError, see `read_config`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: the quantisation config is {type(values).__name__}, not an object")
    values = {_SYNONYMS.get(key, key): value for key, value in values.items()} | {
        key: value for key, value in values.items() if key not in _SYNONYMS
    }
    _refuse_other_formats(values, source)
    bits, group_size = (_whole_number(values, key, source) for key in ("bits", "group_size"))
    sym = values.get("sym")
    if sym is None and isinstance(values.get("zero_point"), bool):
        sym = not values["zero_point"]
    meta = values.get("meta")
    quantizer = meta.get("quantizer", "") if isinstance(meta, Mapping) else ""
    return GptqConfig(
        source,
        bits,
        group_size,
        None if sym is None else bool(sym),
        values.get("checkpoint_format"),
        ", ".join(quantizer) if isinstance(quantizer, list) else str(quantizer),
        _dynamic(values.get("dynamic") or {}, source),
    )


def _refuse_other_formats(values: Mapping, source: str) -> None:
    method = str(values.get("quant_method") or "gptq").lower()
    stored = str(values.get("checkpoint_format") or "gptq").lower()
    if values.get("is_marlin_format"):
        stored = "marlin"
    if method != "gptq" or stored not in _FORMATS:
        given = method if method != "gptq" else stored
        raise InputError(
            f"{source}: the weights are stored as {given}; only GPTQ's own layouts are read ({' and '.join(_FORMATS)})"
        )
    packed_in = values.get("pack_dtype") or "int32"
    if packed_in != "int32":
        raise InputError(f"{source}: pack_dtype is {packed_in}; only codes packed in int32 are read")


def _whole_number(values: Mapping, key: str, source: str) -> int | None:
    value = values.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"{source}: {key} is {value!r}; it has to be a whole number")
    return value


def _dynamic(patterns: Mapping, source: str) -> dict[str, Mapping]:
    """Without the prefix "+:"; patterns with "-:" go, because the file itself says what is not quantised."""
    if not isinstance(patterns, Mapping):
        raise InputError(f"{source}: dynamic is {type(patterns).__name__}, not an object")
    result = {}
    for pattern, options in patterns.items():
        if pattern.startswith("-:"):
            options = {}
        elif not isinstance(options, Mapping):
            raise InputError(f"{source}: dynamic '{pattern}' is {options!r}; it has to be an object of options")
        expression = pattern.removeprefix("-:").removeprefix("+:")
        try:
            re.compile(expression)
        except re.error as error:
            raise InputError(f"{source}: dynamic '{pattern}' is no regular expression: {error}") from None
        result[expression] = options
    return result
