"""The inputs of checkpointed blocks, on the host between the forward and the backward pass (`offload_activations`).

Activation checkpointing, of either kind, saves what a block was given and computes the rest again. Torch lets us see
what is saved while a module runs, whoever saves it (`saved_tensors_hooks`), and hooks on the blocks tell what they were
given. Of a tensor that is both:

1. It waits on the device while its block computes. One that the next block is given too (an encoder's output, a mask)
   stays there: every block of the backward pass would fetch it.
2. When the next block begins, it *leaves*: a lane copies it to the host. Its device memory is let go when the copy is
   over, at the latest when MAX_IN_FLIGHT others have begun to leave. So the input of the last block stays, and what has
   just left may: they are needed first.
3. In the backward pass, a block that asks for its input has those of the blocks before it *fetched*, as many as
   `prefetch` says, which are copied in while it computes.
4. Its place on the host is free when autograd forgets it: after the backward pass, or when the loss is dropped.

Places on the host are ordered by the lane: a copy out begins after every earlier copy in. What else is saved (logits,
what a block without checkpointing computes, parameters) is kept as it is.
"""

import weakref
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .budgets import MAX_IN_FLIGHT
from .chunk import Chunk
from .host_arena import HostArena, Place
from .lanes import Event, Lane
from .nested import tensors_in
from .tiers import Ledger, Payload, Work

SMALLEST_BYTES = 1024
"""Less is not worth a copy."""


class Saved:
    """What autograd's graph holds in place of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor.detach()  # the tensor itself would hold the graph that holds this
        self.version = tensor._version
        self.form = (tensor.shape, tensor.stride())
        self.dtype = tensor.dtype
        self.place: Place | None = None
        """Where it is on the host, once it has left."""
        self.block = 0
        """Running number of the block that was given it, 0 for none."""
        self.earlier: weakref.ref[Saved] | None = None
        """What was saved of such before it."""
        self.stays = False

    def check_unchanged(self) -> None:
        """Autograd's own check does not see through hooks."""
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.form[0])} that is needed for the backward pass has been modified by an "
                "inplace operation after it was saved"
            )


class ActivationOffload:
    """Of one engine. `lane` is for these copies alone."""

    def __init__(self, chunks: list[Chunk], device: torch.device, lane: Lane, ledger: Ledger, prefetch: int) -> None:
        self.arena = HostArena(device, ledger, Payload.ACTIVATION)
        self._chunks = chunks
        self._device = device
        self._lane = lane
        self._ledger = ledger
        self._prefetch = prefetch
        self._hooks: saved_tensors_hooks | None = None  # entered while the model runs
        self._depth = 0  # of running modules that hold blocks
        self._running = 0  # blocks
        self._block = 0  # running number
        self._first_block = 0  # of this pass, and with what else is of a pass:
        self._plain: set[int] = set()  # blocks that save what they compute
        self._given: dict[int, weakref.ref[torch.Tensor]] = {}  # to blocks
        self._saved: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[Saved]]] = {}
        self._waiting: list[weakref.ref[Saved]] = []  # for the next block to begin
        self._latest: weakref.ref[Saved] | None = None
        self._leaving: deque[tuple[Event, torch.Tensor, weakref.ref[Saved]]] = deque()
        self._fetched: dict[Saved, tuple[Event, torch.Tensor]] = {}

    def register(self, model: nn.Module, block_names: tuple[str, ...]) -> None:
        """Watch the blocks, and every module that holds some: a user may call any of those."""
        owners = {""} | {name[:at] for name in block_names for at, letter in enumerate(name) if letter == "."}
        for name in sorted(owners):
            model.get_submodule(name).register_forward_pre_hook(self._begin)
            model.get_submodule(name).register_forward_hook(self._end, always_call=True)
        for name in block_names:
            model.get_submodule(name).register_forward_pre_hook(self._begin_block, with_kwargs=True)
            model.get_submodule(name).register_forward_hook(self._end_block, always_call=True)

    # The forward pass

    def _begin(self, module: nn.Module, args: tuple) -> None:
        if _in_backward():
            return
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            raise RuntimeError(
                "offload_activations=True, and the model is called under saved_tensors_hooks of somebody else, such as "
                "save_on_cpu or a checkpoint of the whole model: one of the two must go"
            )
        self._first_block = self._block
        self._plain.clear()
        self._given.clear()
        self._saved.clear()
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if _in_backward():
            return
        self._depth -= 1
        if self._depth > 0 or self._hooks is None:
            return
        self.reset()
        if module.training and 0 < self._block - self._first_block == len(self._plain):
            raise RuntimeError(
                "offload_activations=True, and no block is checkpointed: what goes to the host are the inputs of "
                "blocks that compute again. Call model.gradient_checkpointing_enable(), or use "
                "torch.utils.checkpoint.checkpoint around each block"
            )

    def reset(self) -> None:
        """No module runs."""
        self._depth = self._running = 0
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    def _begin_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._hooks is None or _in_backward():
            return
        self._running += 1
        inputs = list(tensors_in((args, kwargs), in_objects=False))
        again = [tensor for tensor in inputs if _is_alive(self._given, tensor)]
        for tensor in again:
            saved = self._saved_of(tensor)
            if saved is not None:
                saved.stays = True
        waiting, self._waiting = self._waiting, []
        for ref in waiting:
            saved = ref()
            if saved is not None and not saved.stays:
                self._leave(saved)
        self._block += 1
        for tensor in inputs:
            self._given[id(tensor)] = weakref.ref(tensor)
            saved = self._saved_of(tensor)  # by checkpoint(block, tensor), before it calls the block
            if saved is not None and not saved.stays:
                self._wait(saved)

    def _end_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._hooks is None or _in_backward():
            return
        self._running -= 1
        if self._block in self._plain:  # it will not compute again
            self._waiting = [ref for ref in self._waiting if (saved := ref()) is None or saved.block != self._block]

    def _pack(self, tensor: torch.Tensor) -> Saved:
        saved = self._saved_of(tensor)
        if saved is not None and saved.version == tensor._version:
            return saved
        saved = Saved(tensor)
        if self._may_leave(tensor):
            self._saved[id(tensor)] = weakref.ref(tensor), weakref.ref(saved)
            if _is_alive(self._given, tensor):
                self._wait(saved)
            elif self._running:
                self._plain.add(self._block)
        return saved

    def _saved_of(self, tensor: torch.Tensor) -> Saved | None:
        ref, saved = self._saved.get(id(tensor), (None, None))
        return saved() if ref is not None and ref() is tensor else None

    def _may_leave(self, tensor: torch.Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.nbytes < SMALLEST_BYTES or tensor.device != self._device:
            return False
        by_stride = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        is_dense = tensor.permute(by_stride).is_contiguous()
        return is_dense and not any(chunk.holds(tensor) for chunk in self._chunks)

    def _wait(self, saved: Saved) -> None:
        saved.block = self._block
        saved.earlier, self._latest = self._latest, weakref.ref(saved)
        self._waiting.append(self._latest)

    def _leave(self, saved: Saved) -> None:
        saved.check_unchanged()
        values, ledger = _flat(saved.tensor), self._ledger
        saved.place = self.arena.take(values.nbytes)
        weakref.finalize(saved, self.arena.give_back, saved.place).atexit = False
        on_host = saved.place.bytes.view(saved.dtype)

        def work() -> None:
            with torch.profiler.record_function("megalith::activation out"):
                ledger.did(Work.LINK_OUT, values.nbytes)
                on_host.copy_(values, non_blocking=True)

        event = self._lane.submit(work, f"input of block {saved.block} out")
        self._leaving.append((event, saved.tensor, weakref.ref(saved)))
        while len(self._leaving) > MAX_IN_FLIGHT:
            self._let_go()

    def _let_go(self) -> None:
        event, _, ref = self._leaving.popleft()
        event.wait()  # on a GPU nothing waits but what is computed next, which may get this memory
        saved = ref()
        if saved is not None:
            saved.check_unchanged()
            saved.tensor = None

    # The backward pass

    def _unpack(self, saved: Saved) -> torch.Tensor:
        if saved.tensor is None:
            self._fetch(saved)
        near = None if saved.stays else saved.earlier
        while near is not None and (earlier := near()) is not None and saved.block - earlier.block <= self._prefetch:
            if earlier.tensor is None and earlier.block < saved.block:  # of its own block, some are in use
                self._fetch(earlier)
            near = earlier.earlier
        if saved.tensor is not None:
            saved.check_unchanged()
            return saved.tensor
        event, tensor = self._fetched.pop(saved)
        event.wait()
        return tensor

    def _fetch(self, saved: Saved) -> None:
        if saved in self._fetched:
            return
        tensor = torch.empty_strided(*saved.form, dtype=saved.dtype, device=self._device)
        values, on_host, ledger = _flat(tensor), saved.place.bytes.view(saved.dtype), self._ledger

        def work() -> None:
            with torch.profiler.record_function("megalith::activation in"):
                ledger.did(Work.LINK_IN, values.nbytes)
                values.copy_(on_host, non_blocking=True)

        self._fetched[saved] = self._lane.submit(work, f"input of block {saved.block} in"), tensor

    def end_backward(self) -> None:
        """It is over, or has raised: nothing is kept on the device that the graph does not hold."""
        while self._leaving:
            self._let_go()
        for event, _ in self._fetched.values():
            event.wait()
        self._fetched.clear()


def _in_backward() -> bool:
    """Where a checkpoint calls modules again."""
    return torch._C._current_graph_task_id() != -1


def _is_alive(refs: dict[int, weakref.ref[torch.Tensor]], tensor: torch.Tensor) -> bool:
    """Whether `tensor` itself is among `refs`, by id: the id alone may be that of one that is gone."""
    ref = refs.get(id(tensor))
    return ref is not None and ref() is tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of its storage."""
    return tensor.as_strided((tensor.numel(),), (1,))
