"""Fills chunks with a model's weights, from the model or from a folder, and makes its parameters views of them."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from .chunk import Chunk
from .collectives import RankGroup
from .config import EngineConfig, Precision
from .materialize import initialize_parameters, rebuild_buffers
from .parameter_names import persistent_buffer_names
from .pretrained import PretrainedFolder


class Loader(Protocol):
    """Fills the chunks of each group in turn, which are whole then, and makes the model's parameters views of them."""

    def load(self, chunks: list[Chunk]) -> None: ...

    def load_buffers(self) -> None: ...


class WeightLoader:
    def __init__(
        self,
        model: nn.Module,
        folder: PretrainedFolder | None,
        config: EngineConfig,
        rank_group: RankGroup,
        device: torch.device,
    ) -> None:
        self._model = model
        self._folder = folder
        self._config = config
        self._rank_group = rank_group
        self._device = device
        self._staging = torch.empty(0, device=device)  # float32, grown to the largest chunk

    @torch.no_grad()
    def load(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            values, views = self._whole_values(chunk)
            stored = {fqn: view for fqn, view in views.items() if self._folder is not None and fqn in self._folder}
            if stored:
                self._folder.fill(stored)
            parameters = {fqn: self._model.get_parameter(fqn) for fqn in views if fqn not in stored}
            if parameters:
                for fqn, parameter in parameters.items():
                    if not parameter.is_meta:
                        views[fqn].copy_(parameter)
                on_meta = {fqn: views[fqn] for fqn, parameter in parameters.items() if parameter.is_meta}
                initialize_parameters(self._model, on_meta, self._config.seed)
                self._broadcast(values)
            chunk.load_full(values)
            for fqn in views:
                bind(self._model, fqn, chunk.views[fqn])

    def load_buffers(self) -> None:
        if self._folder is not None:
            self._folder.fill_buffers(self._model, self._device)
        rebuild_buffers(self._model, self._device)
        # As module.to(dtype) does it. What is not persistent (rotary frequencies) is made in the precision that it
        # needs.
        persistent = persistent_buffer_names(self._model)
        for path, module in self._model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                cast = buffer.is_floating_point() and f"{path}.{name}".lstrip(".") in persistent
                dtype = Precision(self._config.precision).dtype if cast else buffer.dtype
                if (buffer.device, buffer.dtype) != (self._device, dtype):
                    module._buffers[name] = buffer.to(self._device, dtype)
                self._broadcast(module._buffers[name])

    def _whole_values(self, chunk: Chunk) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Room for the chunk's whole values [numel], in float32 where they are floats, and its slots as views of it."""
        spec = chunk.spec
        if not spec.dtype.is_floating_point:
            # Not `full`, where that is released next: what has gone to a drive can never be resized again.
            values = torch.empty(spec.numel, dtype=spec.dtype, device=self._device)
        elif spec.dtype == torch.float32 and not chunk.placement.sharded:
            values = chunk.full.data
        else:  # the pages of a `full` that is released next are better never touched
            if self._staging.numel() < spec.numel:
                self._staging = torch.empty(spec.numel, device=self._device)
            values = self._staging[: spec.numel]
        for padding in spec.padding():
            values[padding].zero_()
        return values, {slot.fqn: values[slot.offset_numel : slot.stop_numel].view(slot.shape) for slot in spec.slots}

    def _broadcast(self, values: torch.Tensor) -> None:
        if self._rank_group.is_distributed and values.numel():
            dist.broadcast(values, group_src=0, group=self._rank_group.transfers)


def bind(model: nn.Module, fqn: str, view: torch.Tensor) -> None:
    """Make a parameter a view of its chunk."""
    parameter = model.get_parameter(fqn)
    if parameter.is_meta:
        # A meta tensor cannot take real storage. The swap keeps the object, which the optimizer's groups hold.
        torch.utils.swap_tensors(parameter, nn.Parameter(view, requires_grad=parameter.requires_grad))
    else:
        parameter.data = view
    parameter.grad = None
