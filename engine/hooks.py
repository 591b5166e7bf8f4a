"""When groups are unsharded, resharded and reduced: the only place that registers hooks.

Around each unit (a block, or a module outside of blocks that owns parameters):

    before forward   its groups are unsharded, what comes next is prefetched, what is not needed is resharded
    after forward    nothing is freed yet: the next use frees it, so that a unit called twice is gathered once, and the
                     last block of the forward pass, the first of the backward pass, stays
    before backward  (a gradient reaches an output) its groups are unsharded again
    gradient lands   it is copied into the chunk's buffer
    after backward   (its inputs' gradients are complete) its groups may be resharded, and are reduced, the last one
    first end of backward  the groups that were not reduced yet are, so that each has been once

What has not landed counts as zero then, and what lands later waits for the next reduction, at the latest in the step.
So ranks issue the same transfers in the same order whichever parameters their data used, as long as they run the same
units.
"""

import weakref
from typing import Any

import torch
from torch import nn

from .blocks import ModelParts, Unit
from .chunk_group import ChunkGroup
from .config import EngineConfig, Precision
from .nested import tensors_in
from .schedule import Schedule


def register_hooks(
    model: nn.Module, parts: ModelParts, groups: list[ChunkGroup], schedule: Schedule, config: EngineConfig
) -> None:
    """Around units, around the whole model, and where gradients land."""
    home = {slot.fqn: group for group in groups for chunk in group.chunks for slot in chunk.spec.slots}
    hooks: dict[str, UnitHooks] = {}  # of the units that lie in no other
    for unit in parts.units:
        needed = sorted({home[fqn] for fqn in unit.fqns}, key=lambda group: group.index)
        if all(group.stays for group in needed):
            continue  # nothing would happen around it
        unit_hooks = UnitHooks(unit, needed, hooks.get(unit.block), schedule)
        unit_hooks.register()
        schedule.units.append(unit_hooks)
        if unit.block is None:
            hooks[unit.name] = unit_hooks
            for group in needed:
                group.units.add(unit.name)
    landing = weakref.proxy(schedule)  # a hook on a tensor is no part of a cycle that can be collected
    for group in groups:
        for gradient in group.gradients:
            for slot in gradient.chunk.spec.slots:
                model.get_parameter(slot.fqn).register_post_accumulate_grad_hook(
                    lambda parameter, gradient=gradient, slot=slot: landing.land(gradient, slot, parameter)
                )

    compute_dtype = Precision(config.precision).dtype

    def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        schedule.begin_forward((args, kwargs))
        return _cast_floats(args, compute_dtype), _cast_floats(kwargs, compute_dtype)

    def after_forward(module: nn.Module, args: tuple, output: Any) -> None:
        # Reentrant checkpointing runs backward passes inside of the backward pass: this one is surely the outer one.
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(lambda gradient: schedule.begin_backward())

    # The first of all: it clears what the units' own hooks then set.
    model.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)
    model.register_forward_hook(after_forward)
    _guard_state_dicts(model, groups, schedule)


def _guard_state_dicts(model: nn.Module, groups: list[ChunkGroup], schedule: Schedule) -> None:
    def before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if any(not group.is_whole for group in groups if group.is_sharded):
            raise RuntimeError(
                "the weights are sharded: call state_dict() inside `with megalith.engine.gathered(model):`, "
                "or use save_checkpoint or save_pretrained"
            )
        schedule.wait_all()

    def before_load_state_dict(*_: Any) -> None:
        raise RuntimeError(
            "the weights are stored in chunks: load with load_checkpoint, with initialize(pretrained=...), "
            "or into the model before initialize()"
        )

    for module in model.modules():
        module.register_state_dict_pre_hook(before_state_dict)
        module.register_load_state_dict_pre_hook(before_load_state_dict)


def _cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in tuples, lists and dicts, as `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast_floats(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast_floats(item, dtype) for key, item in value.items()}
    return value


class UnitHooks:
    """The hooks of one unit."""

    def __init__(self, unit: Unit, groups: list[ChunkGroup], enclosing: "UnitHooks | None", schedule: Schedule) -> None:
        self._unit = unit
        self._groups = groups
        self._enclosing = enclosing
        self._schedule = schedule
        self.depth = 0  # forward calls that are running
        # Looking rows up is linear: the backward pass of a plain embedding reads no weights, unless to update them.
        self._backward_reads_weights = any(group.is_updated_in_place for group in groups) or not (
            isinstance(unit.module, nn.Embedding) and len(list(unit.module.parameters())) == 1
        )
        self._forward_pin = f"forward of {unit.name}"
        self._backward_pin = f"backward of {unit.name}"

    def __deepcopy__(self, memo: dict) -> "UnitHooks":
        raise RuntimeError("a model that is sharded cannot be copied: copy it before initialize()")

    def register(self) -> list[torch.utils.hooks.RemovableHandle]:
        module = self._unit.module
        return [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    @property
    def _covered(self) -> bool:
        """The enclosing block is running and has seen to the weights."""
        return self._enclosing is not None and self._enclosing.depth > 0

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._covered:
            return
        schedule = self._schedule
        schedule.recover()
        schedule.use(self._groups, "forward" if torch.is_grad_enabled() else "inference")
        self.depth += 1
        for group in self._groups:
            group.pins.add(self._forward_pin)
        in_recomputation = torch._C._current_graph_task_id() != -1  # by activation checkpointing
        if not in_recomputation:
            schedule.unit_forward(self._unit.name)
        if torch.is_grad_enabled():
            # A leaf outlives the pass, and with it the hook; that of a recomputation is made for it.
            inputs = [
                tensor
                for tensor in tensors_in((args, kwargs), in_objects=False)
                if tensor.requires_grad and (tensor.grad_fn is not None or in_recomputation)
            ]
            inputs = [tensor for tensor in inputs if not schedule.was_input(tensor)]
            self._call_when_all_arrived(inputs)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.depth == 0:  # covered
            return None
        self.depth -= 1
        if self.depth == 0:
            for group in self._groups:
                group.pins.discard(self._forward_pin)
        if not torch.is_grad_enabled():
            return None
        # A block that returns its input gets an autograd node of its own, or the hooks of several blocks would be on
        # one tensor and fire in the order of the forward pass.
        given = {id(tensor) for tensor in tensors_in((args, kwargs), in_objects=False)}
        if isinstance(output, torch.Tensor):
            output = _apart(output, given)
        elif type(output) is tuple:
            output = tuple(_apart(item, given) for item in output)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._before_backward)
        return output

    def _call_when_all_arrived(self, inputs: list[torch.Tensor]) -> None:
        """Call `_after_backward` once every tensor's gradient is complete. Not by torch's register_multi_grad_hook: its
        closures hold the graph in a cycle, and with it the activations until the garbage collector comes by."""
        remaining = len(inputs)

        def arrived(gradient: torch.Tensor) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                self._after_backward()

        for tensor in inputs:
            tensor.register_hook(arrived)

    def _before_backward(self, gradient: torch.Tensor) -> None:
        self._schedule.begin_backward()
        if self._backward_reads_weights and not all(self._backward_pin in group.pins for group in self._groups):
            self._schedule.use(self._groups, "backward")
            for group in self._groups:
                group.pins.add(self._backward_pin)

    def _after_backward(self) -> None:
        self._schedule.begin_backward()
        for group in self._groups:
            group.pins.discard(self._backward_pin)
        if self._enclosing is None:  # else a checkpoint in the block computes again: the block itself is done later
            self._schedule.unit_done(self._unit.name, self._groups)


def _apart(value: Any, given: set[int]) -> Any:
    return value.view_as(value) if isinstance(value, torch.Tensor) and id(value) in given else value
