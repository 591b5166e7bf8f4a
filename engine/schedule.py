"""What hooks ask for: groups are unsharded before their use, others are fetched or make room, and gradients are reduced
as the backward pass goes on. Where that pass stands is known here alone."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Variable

from .activations import ActivationOffload
from .budgets import choose_evictions, count_that_fit, gradient_peak, window_length, working_peak
from .chunk_group import ChunkGroup
from .config import EngineConfig
from .gradients import ChunkGradient, GradientTraffic
from .layout import Layout, Slot
from .manager import Manager
from .nested import tensors_in
from .tiers import Payload, Tier


class UnitState(Protocol):
    """The hooks of a unit."""

    depth: int
    """Forward calls that are running."""


class Schedule:
    """What every unit's hooks share: the groups in layout order, the trace, and where the backward pass stands."""

    def __init__(
        self,
        groups: list[ChunkGroup],
        layout: Layout,
        config: EngineConfig,
        traffic: GradientTraffic,
        device_room: int,
        manager: Manager,
    ) -> None:
        self.groups = groups
        self._manager = manager
        self.number = manager.join(self)
        budget = manager.budgets[Tier.DEVICE]
        self.device_budget = config.device_budget if budget is None else budget
        self.order_hash = 0
        """Of the transfers issued since the last step. Equal on all ranks, or they ran different programs."""
        self.micro_steps = 0
        """Backward passes since the last step."""
        self.expected_micro_steps = 1
        """Backward passes before the last step: below stage 2, gradients are reduced in the last one alone."""
        self.touched: set[str] = set()
        """Parameters that got a gradient since the last step."""
        self._config = config
        self._traffic = traffic
        self._layout = layout
        self._device_room = device_room  # assumed where there is no budget
        self._waiting: frozenset[ChunkGradient] | None = None  # decided once a step
        self.knows_micro_steps = False
        """Whether `expected_micro_steps` tells if gradients are summed. If not, they are taken to be."""
        self.count_placements()
        self.is_distributed = traffic.group.is_distributed
        self._in_backward = False
        self._called: set[str] = set()  # units, since the last step
        self._calls: Counter[str] = Counter()  # by unit: since the last backward pass, less those that it has done
        self._inputs: dict[int, weakref.ref[torch.Tensor]] = {}  # of units, since the last backward pass
        self._done: set[str] = set()  # units, in this backward pass
        self._reduced: set[ChunkGroup] = set()  # in this backward pass
        self._next_reduce = len(groups) - 1  # in this backward pass
        self._has_landed = False  # in this backward pass
        self.scaled_backwards = 0
        """Backward passes with the loss scale since the last step."""
        self.units: list[UnitState] = []
        self.on_complete: Callable[[ChunkGroup], None] | None = None
        """With update_in_backward: told of a group whose gradients are complete, once in a backward pass."""
        self.on_forward: Callable[[int], None] | None = None
        """Told of the elements of a forward pass' inputs, where a backward pass may follow."""
        self.update_begun = False
        """With update_in_backward: something was updated since the last step."""
        self.is_broken = False
        """With update_in_backward: a part of the chunks is a step ahead of the others."""
        self.activations: ActivationOffload | None = None

    def count_placements(self) -> None:
        """What follows from where the chunks are."""
        placements = [chunk.placement for group in self.groups for chunk in group.chunks]
        stored = self._layout, placements, self._config, self._traffic.group
        self._gradients_leave = any(placement.gradient_tier is not Tier.DEVICE for placement in placements)
        self._gradient_peaks = [gradient_peak(*stored, count) for count in (1, 2)]
        self._window_length = window_length(placements, self._config)
        self._manager.bounds[self.number] = working_peak(*stored)

    @property
    def _gradient_peak(self) -> int:
        return self._gradient_peaks[self.expected_micro_steps > 1 or not self.knows_micro_steps]

    def bounds(self, micro_steps: int) -> list[tuple[list[ChunkGroup], int]]:
        """(groups whose weights are whole together, bytes of gradients) in each moment of any program that uses the
        groups in their order, whatever its data."""
        starts, gradient_bytes = range(len(self.groups)), self._gradient_peaks[micro_steps > 1]
        return [(self.groups[start : start + self._window_length], gradient_bytes) for start in starts]

    # Weights

    def use(self, needed: list[ChunkGroup], phase: str) -> None:
        """Make the weights of `needed` whole for the work that the caller issues next, and prefetch."""
        if all(group.is_held for group in needed):
            return  # and leave no trace: a rank may run what it likes then, without the others
        for group in needed:
            self._manager.visit((phase, self.number, group.index))
        predicted = self._predicted()
        wanted = needed + [group for _, group in predicted]
        self._manager.need(wanted)
        self._make_room(wanted)
        for group in needed:
            self._unshard(group)
        for schedule, group in predicted:
            schedule._unshard(group)
        for group in needed:
            group.wait()

    def prefetch(self) -> None:
        for schedule, group in self._predicted():
            schedule._unshard(group)

    def _predicted(self) -> list[tuple["Schedule", ChunkGroup]]:
        """The next groups that must be gathered, of this engine or of one with the same manager."""
        known = self._manager.groups()
        result: list[tuple[Schedule, ChunkGroup]] = []
        for _, *key in self._manager.trace.upcoming(2 * self._config.prefetch):
            entry = known.get(tuple(key))
            if entry is None or entry in result or len(result) == self._config.prefetch:
                continue
            if entry[1].is_sharded or not entry[1].is_whole:
                result.append(entry)
        return result

    def _unshard(self, group: ChunkGroup) -> None:
        if group.is_whole:
            return
        self._note_order(group.index)
        group.unshard()

    def _make_room(self, wanted: list[ChunkGroup]) -> None:
        """Reshard what is not wanted: all of it, or with a budget, what is used farthest in the future until the rest
        fits. On one rank, what an update writes is left alone. Other ranks may be done with theirs, and all must
        reshard the same, so nothing else that lanes change is asked for either."""
        idle = {
            key: group
            for key, (schedule, group) in self._manager.groups().items()
            if group.is_sharded and group.is_whole and group.is_idle and group not in wanted
            if schedule.is_distributed or not group.is_updating
        }
        evicted = list(idle)
        if self.device_budget is not None:
            of_all = self._manager.ledger
            stored = of_all.tier_bytes(Tier.DEVICE) - of_all.bytes(Tier.DEVICE, Payload.GRADIENT)
            needed = stored + self._gradient_peak - self.device_budget
            if self.expected_micro_steps > 1:
                needed += sum(gradient.waiting_bytes for gradient in self.sums_on_device())
            needed += sum(group.gathered_bytes for group in wanted if not group.is_whole)
            future = [tuple(key) for _, *key in self._manager.trace.upcoming(3 * len(self.groups))]
            uses = {key: future.index(key) if key in future else None for key in idle}
            evicted = choose_evictions([(key, group.gathered_bytes, uses[key]) for key, group in idle.items()], needed)
        for key in idle:
            if key in evicted:
                idle[key].reshard()

    def reshard_all(self) -> None:
        """Before weights change."""
        self.check_idle()
        self.reshard_idle()

    def check_idle(self) -> None:
        """Raises RuntimeError where somebody reads weights, which are about to change."""
        for group in self.groups:
            if not group.is_idle:
                users = ", ".join(sorted(group.pins | group.holders))
                raise RuntimeError(f"the weights cannot change now: {users} reads those of {group.name}")

    def reshard_idle(self) -> None:
        for group in self.groups:
            if group.is_sharded and group.is_whole and group.is_idle:
                group.reshard()

    def refresh(self, group: ChunkGroup) -> None:
        """Start gathering what is not whole of a group, after a step or for one."""
        self._unshard(group)

    def wait_all(self) -> None:
        for group in self.groups:
            group.wait()

    def has_room_for_all(self) -> bool:
        """Whether the weights of all groups fit on the device beside what is at rest there."""
        if self.device_budget is None:
            return True
        at_rest = self._manager.ledger.device_bytes_at_rest()
        return at_rest + sum(group.gathered_bytes for group in self.groups) <= self.device_budget

    def hold(self, groups: list[ChunkGroup], token: str) -> None:
        """Unshard `groups` and keep them so until `release`."""
        self._manager.hold(self.number, groups)
        for group in groups:
            self._unshard(group)
            group.holders.add(token)
        for group in groups:
            group.wait()

    def release(self, groups: list[ChunkGroup], token: str) -> None:
        for group in groups:
            group.holders.discard(token)
        self.reshard_idle()

    # Gradients

    def begin_backward(self) -> None:
        """Called by every hook that runs in a backward pass; the first one in a pass asks to be told of its end."""
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def begin_forward(self, inputs: Any) -> None:
        """Called before the model's own forward: no unit runs then, whatever an interrupt left behind."""
        self.recover()
        self.check_sound()
        if torch._C._current_graph_task_id() == -1:
            for unit in self.units:
                unit.depth = 0
            if self.activations is not None:
                self.activations.reset()
            self._drop_pins("forward ")
            if self.on_forward is not None and torch.is_grad_enabled():
                self.on_forward(sum(tensor.numel() for tensor in tensors_in(inputs, in_objects=False)))

    def recover(self) -> None:
        """After a backward pass that raised: its end was never told. What landed in it is dropped."""
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            self._leave_backward()
            self.drop_gradients()
            self.is_broken = self.update_begun

    def check_sound(self) -> None:
        if self.is_broken:
            raise RuntimeError(
                "a backward pass was interrupted, or had a gradient that is not finite, after some chunks had been "
                "updated in it (update_in_backward=True): load a checkpoint"
            )

    def drop_gradients(self) -> None:
        for group in self.groups:
            for gradient in group.gradients:
                gradient.drop()
        self._traffic.drain()
        self.micro_steps = 0
        self.scaled_backwards = 0
        self.touched.clear()
        self._waiting = None

    def end_step(self) -> None:
        self.expected_micro_steps = max(self.micro_steps, 1)
        self._called.clear()
        self.drop_gradients()

    def land(self, gradient: ChunkGradient, slot: Slot, parameter: nn.Parameter) -> None:
        self.begin_backward()
        if self.update_begun and self.micro_steps:
            raise RuntimeError(
                "a second backward pass before step(): update_in_backward=True has used the gradients of the first one "
                "already. Leave it out to accumulate gradients"
            )
        self._has_landed = True
        gradient.land(slot, parameter.grad)
        parameter.grad = None
        self.touched.add(slot.fqn)

    def unit_forward(self, unit: str) -> None:
        """A forward call of `unit`. A backward pass may follow without gradients too, by reentrant checkpointing."""
        self._called.add(unit)
        self._calls[unit] += torch.is_grad_enabled()

    def was_input(self, tensor: torch.Tensor) -> bool:
        """Whether an earlier unit took `tensor` too, as decoder blocks take the encoder's output: its gradient is
        complete when the first of them is done, and tells nothing of the others."""
        seen = self._inputs.get(id(tensor))
        self._inputs[id(tensor)] = weakref.ref(tensor)  # an id alone may be that of a tensor that is gone
        return seen is not None and seen() is tensor

    def unit_done(self, unit: str, groups: list[ChunkGroup]) -> None:
        """The backward pass of a call of `unit` is over. A group is reduced when those of all its units' calls are, and
        where there are other ranks, when all groups after it have been: one order for all, also where a rank skipped a
        unit. One with a call that this pass does not reach is left to the end."""
        self._calls[unit] -= 1
        if self._calls[unit] > 0:
            return
        self._done.add(unit)
        if not self.is_distributed:
            for group in groups:
                if self._is_done(group) and (self.on_complete is None or group.is_complete):
                    self._reduce(group)
            return
        while self._next_reduce >= 0 and self._is_done(self.groups[self._next_reduce]):
            self._reduce_next()

    def _is_done(self, group: ChunkGroup) -> bool:
        """With its units' backward pass, as far as they have not been skipped."""
        return all(unit in self._done or unit not in self._called for unit in group.units)

    @property
    def _is_final(self) -> bool:
        """Whether this is the step's last backward pass, as far as the step before tells."""
        return self.micro_steps + 1 >= self.expected_micro_steps

    def _reduces_now(self) -> bool:
        """Whether gradients leave in this backward pass or wait for a later one. The same on every rank."""
        if self._is_final:
            return True
        # Not a question of placement where ranks add up: the order of the sum would depend on it.
        return self._config.zero_stage >= 2 if self.is_distributed else self._gradients_leave

    def sums_on_device(self) -> frozenset[ChunkGradient]:
        """Gradients that leave whose sum of micro-batches has room on the device until the last one, beside what is at
        rest there, the blocks in use and the gradients that pass. The same on every rank, and in a step."""
        if self._waiting is None:
            budget = self._device_room if self.device_budget is None else self.device_budget
            at_rest = self._manager.ledger.device_bytes_at_rest()
            leaving = [gradient for group in self.groups for gradient in group.gradients if gradient.waiting_bytes]
            room = budget - at_rest - self._manager.working_bytes
            count = count_that_fit([gradient.waiting_bytes for gradient in leaving], room)
            self._waiting = frozenset(leaving[:count])
        return self._waiting

    @property
    def has_summed(self) -> bool:
        """Whether `sums_on_device` waited there in this step."""
        sums_early = not self.is_distributed or self._config.zero_stage >= 2
        return sums_early and self.micro_steps > 1 and self.expected_micro_steps > 1

    def summing_bytes(self) -> int:
        """What the device holds at most, by bounds, where the sums of all gradients that leave wait there."""
        waiting = sum(gradient.waiting_bytes for group in self.groups for gradient in group.gradients)
        return self._manager.ledger.device_bytes_at_rest() + self._manager.working_bytes + waiting

    def _reduce_next(self) -> None:
        self._next_reduce -= 1
        self._reduce(self.groups[self._next_reduce + 1])

    def _reduce(self, group: ChunkGroup) -> None:
        """Once in a backward pass."""
        if group in self._reduced:
            return
        self._reduced.add(group)
        if group.gradients and self._reduces_now():
            self._note_order(group.index + len(self.groups))
            group.reduce_gradients(self._is_final, () if self._is_final else self.sums_on_device())
            if self.on_complete is not None:
                self.on_complete(group)

    def _end_backward(self) -> None:
        self._drop_pins("backward ")
        while self._next_reduce >= 0:
            self._reduce_next()
        self.micro_steps += self._has_landed  # torch.autograd.grad brings nothing for a step
        self._leave_backward()

    def _leave_backward(self) -> None:
        self._in_backward = False
        self._has_landed = False
        self._next_reduce = len(self.groups) - 1
        self._calls.clear()
        self._inputs.clear()
        self._done.clear()
        self._reduced.clear()
        self._drop_pins("backward ")
        if self.activations is not None:
            self.activations.end_backward()

    def _drop_pins(self, prefix: str) -> None:
        for group in self.groups:
            group.pins = {pin for pin in group.pins if not pin.startswith(prefix)}

    def _note_order(self, value: int) -> None:
        self.order_hash = (self.order_hash * 31 + value + 1) % 1_000_003
