"""How the tensors of a checkpoint and those of a model correspond, in both directions.

Mostly one to one, under the same name. A transformers model may also rename them, and merge or split them: Mixtral's
weights w1, w2 and w3 of every expert are stored one by one and are two 3-D parameters in the model. Transformers
describes this in `core_model_loading` and `conversion_mapping`, applied there to a whole state dict; here it is cut
into the smallest groups of tensors that depend on one another, so that only one group need be in memory. This is the
only file that knows them, and reaches them through `sys.modules`: where a transformers model is, transformers is
loaded.
"""

import copy
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Conversion:
    """`targets` are made of the tensors named `sources`: by `operation`, or by renaming the only source where that is
    None."""

    sources: tuple[str, ...]
    targets: Mapping[str, Tensor]
    """Name to a tensor on meta, which says shape and dtype."""
    operation: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def is_transformers_model(model: nn.Module) -> bool:
    return any(
        f"{c.__module__}.{c.__name__}" == "transformers.modeling_utils.PreTrainedModel" for c in type(model).__mro__
    )


def loading_conversions(model: nn.Module, stored: Mapping[str, Tensor], names: Collection[str]) -> list[Conversion]:
    """From the tensors `stored` (on meta) of a checkpoint to those of `model`, whose state dict has `names`.

    As `from_pretrained` does it: renamings, then at most one converter, then the base model's prefix added or removed.
    Targets that `model` lacks are among the result; it is the caller who knows whether that is an error. Raises
    ValueError where tensors that belong together do not fit together.
    """
    if not is_transformers_model(model):
        return [Conversion((name,), {name: tensor}) for name, tensor in stored.items()]
    loading = sys.modules["transformers.core_model_loading"]
    transforms = sys.modules["transformers.conversion_mapping"].get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    known = dict.fromkeys(names, True)

    conversions = []
    merged: dict[str, list[tuple[str, str]]] = {}  # first target -> (pattern, source)
    for source in sorted(stored, key=loading.dot_natural_key):  # an order that experts' numbers are stacked in
        target, pattern = loading.rename_source_key(source, renamings, converters, model.base_model_prefix, known)
        if target not in known and source in known:
            target, pattern = loading.rename_source_key(source, [], [], model.base_model_prefix, known)
        if pattern is None:
            conversions.append(Conversion((source,), {target: stored[source]}))
        else:
            merged.setdefault(target, []).append((pattern, source))

    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for first_target, matches in merged.items():
        converter = converter_of[matches[0][0]]

        def operation(tensors, first_target=first_target, matches=matches, converter=converter):
            collecting = copy.deepcopy(converter)
            for pattern, source in matches:
                collecting.add_tensor(first_target, source, pattern, tensors[source])
            made = collecting.convert(first_target, model=model, config=model.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

        sources = tuple(source for _, source in matches)
        try:
            targets = operation({source: stored[source] for source in sources})
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{source} {list(stored[source].shape)}" for source in sources)
            raise ValueError(f"{first_target} cannot be made of {shapes}: {error}") from error
        conversions.append(Conversion(sources, targets, operation))
    return conversions


def saving_conversions(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Conversion]:
    """From `tensors` (on meta) of `model` to those of a checkpoint that `from_pretrained` reads.

    Raises NotImplementedError where transformers' conversion of this model cannot be cut into groups.
    """
    transforms = _transforms_to_revert(model) if is_transformers_model(model) else []
    if not transforms:
        return [Conversion((name,), {name: tensor}) for name, tensor in tensors.items()]
    loading = sys.modules["transformers.core_model_loading"]
    reverse = [transform.reverse_transform() for transform in reversed(transforms)]
    renamings = [t for t in reverse if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in reverse if isinstance(t, loading.WeightConverter)]

    groups: dict[str, list[str]] = {}
    for name in tensors:
        target, _ = loading.rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(target, []).append(name)

    def operation(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return loading.revert_weight_conversion(model, group)

    conversions = [
        Conversion(tuple(group), operation({name: tensors[name] for name in group}), operation)
        for group in groups.values()
    ]
    by_groups = {name: tensor.shape for conversion in conversions for name, tensor in conversion.targets.items()}
    at_once = {name: tensor.shape for name, tensor in operation(dict(tensors)).items()}
    if by_groups != at_once:
        differing = sorted(set(by_groups.items()) ^ set(at_once.items()))[:4]
        raise NotImplementedError(
            f"{type(model).__name__} cannot be saved tensor by tensor; these would differ: {differing}"
        )
    return conversions


def _transforms_to_revert(model: nn.Module) -> list:
    """What `save_pretrained` reverts: what `from_pretrained` applied, else the defaults without legacy names and
    prefixes."""
    applied = getattr(model, "_weight_conversions", None)
    if applied is not None:
        return applied
    prefix_change = sys.modules["transformers.core_model_loading"].PrefixChange
    transforms = sys.modules["transformers.conversion_mapping"].get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if not isinstance(transform, prefix_change)]
