"""The step: Adam or AdamW over chunks, with the global norm, clipping and the loss scale in the kernel's one factor."""

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch

from ..kernels import AdamHyper
from .chunk import Chunk
from .chunk_group import ChunkGroup
from .collectives import RankGroup, sum_over_ranks
from .config import EngineConfig, Precision
from .disk_tensor import DiskTensor
from .gradients import ChunkGradient, GradientPart
from .in_backward import InBackward
from .layout import Slot
from .loss_scaler import DynamicLossScaler
from .migration import Migration
from .schedule import Schedule
from .tiers import Tier
from .update import ChunkUpdate, Run, execute
from .updaters import Updaters


def read_adam_groups(optimizer: torch.optim.Optimizer) -> None:
    """Raises what `initialize` cannot adopt: another optimizer than Adam and AdamW, or an option that the kernel
    lacks."""
    # AdamW is an Adam since torch 2.7. A subclass may add groups or schedules, but not another step, which would be
    # lost.
    own_step = inspect.unwrap(type(optimizer).step)  # torch wraps every class's for its profiler
    if not isinstance(optimizer, torch.optim.Adam) or own_step is not inspect.unwrap(torch.optim.Adam.step):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Adam or torch.optim.AdamW")
    for index, group in enumerate(optimizer.param_groups):
        for option in ("amsgrad", "maximize", "differentiable"):
            if group.get(option):
                raise ValueError(f"optimizer group {index}: {option}=True is not supported")
    if any(optimizer.state.values()):
        raise ValueError(
            "the optimizer has stepped already, and its state would be lost: "
            "give a new one, and load a checkpoint with load_checkpoint"
        )


def _cut(parts: list[GradientPart], start: int, stop: int) -> Iterator[torch.Tensor | DiskTensor]:
    """The gradient of the owned elements [start, stop)."""
    for part in parts:
        if part.start < stop and start < part.stop:
            yield part.values[max(start - part.start, 0) : stop - part.start]


class ZeroOptimizer(torch.optim.Optimizer):
    """What `initialize` returns for an Adam or AdamW: the same groups, so that any LR scheduler takes it.

    `step()` consumes the gradients: it reduces what has not been reduced, clips by the global norm, updates what this
    rank owns where its state lies, and starts the gathering of what changed. A gradient that is not finite skips the
    step on every rank. As in torch, a parameter that got no gradient on any rank is left alone.

    Chunks whose state is on the device are updated at once. For the others `step()` fixes the factor and the
    hyperparameters and returns: their updates run on lanes while the next forward pass computes, by the host's
    processor or by the device (updaters.py), each before the first use of its chunk. That also holds without clipping:
    whether a gradient is not finite, and the step to be skipped, is known when all have been reduced and no sooner.
    With `update_in_backward` a chunk does not wait for the others, and `step()` only tells of a gradient that was not
    finite.
    """

    def __init__(
        self,
        user: torch.optim.Optimizer,
        groups: list[ChunkGroup],
        schedule: Schedule,
        rank_group: RankGroup,
        config: EngineConfig,
        model: torch.nn.Module,
        updaters: Updaters,
        migration: Migration | None,
    ) -> None:
        super().__init__([{"params": group["params"]} for group in user.param_groups], user.defaults)
        self.param_groups = user.param_groups  # the same dicts: a scheduler made before keeps working
        self._decoupled = [
            group.get("decoupled_weight_decay", isinstance(user, torch.optim.AdamW)) for group in user.param_groups
        ]
        self._groups = groups
        self._schedule = schedule
        self._rank_group = rank_group
        self._config = config
        self._model = model
        self._updaters = updaters
        self._migration = migration
        self._trainable = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.scaler = (
            DynamicLossScaler(config.loss_scale or 2.0**16) if config.precision == Precision.FP16.value else None
        )
        self.steps_taken: dict[str, int] = {
            slot.fqn: 0 for group in groups for gradient in group.gradients for slot in gradient.chunk.spec.slots
        }
        """Updates that each trainable parameter has had."""
        self._in_backward = InBackward(groups) if config.update_in_backward else None
        if self._in_backward is not None:
            schedule.on_complete = self._update_in_backward
        self.grad_norm = math.nan
        """Global 2-norm of the last step's gradient, before clipping."""
        self.skipped_steps = 0

    def backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()`, in fp16 of the scaled loss."""
        if self.scaler is not None:
            self._schedule.recover()
            self._schedule.scaled_backwards += 1
            loss = loss * self.scaler.scale
        loss.backward()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that no step has consumed. Raises ValueError for set_to_none=False: gradients of zero,
        which torch would step with, are not kept."""
        if not set_to_none:
            raise ValueError("set_to_none=False is not supported: gradients are dropped")
        self._schedule.recover()
        if self._schedule.update_begun:
            raise RuntimeError(
                "zero_grad() after backward and before step(): update_in_backward=True has used the gradients already"
            )
        self._schedule.drop_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._schedule.recover()
        self._schedule.check_sound()
        self._check_usage()
        moves = self._migration is not None and self._migration.is_due()
        if self._in_backward is not None:
            self._end_updates(self._in_backward)
        else:
            touched, moves = self._agree(moves)
            self._schedule.reshard_all()
            self.grad_norm, found_inf = self._norm()
            if found_inf:
                self.skipped_steps += 1
            else:
                self._update(touched, self._factor())
            if self.scaler is not None:
                self.scaler.update(found_inf)
        self._updaters.next_step()
        self._schedule.end_step()
        if moves:
            self._migration.move()
        self._schedule.prefetch()
        return loss

    # The step, in time order

    def _check_usage(self) -> None:
        self._schedule.check_idle()
        if self.scaler is not None and self._schedule.scaled_backwards != self._schedule.micro_steps:
            raise RuntimeError(
                f"{self._schedule.micro_steps} backward passes, {self._schedule.scaled_backwards} of them with the "
                "loss scale: with precision='fp16' call optimizer.backward(loss), not loss.backward()"
            )
        for group in self._groups:
            for chunk in group.chunks:
                for fqn in chunk.views:
                    # One whose gradient landed is in the model for certain: the others are looked up by name, slowly.
                    is_used = fqn in self._schedule.touched
                    parameter = self._trainable[fqn] if is_used else self._model.get_parameter(fqn)
                    if not chunk.holds(parameter):
                        raise RuntimeError(
                            f"{fqn} was replaced, cast or resized after initialize(), so that it is not trained "
                            "any more: do that before"
                        )
                    if parameter.requires_grad and fqn not in self._trainable:
                        raise RuntimeError(f"{fqn} was frozen in initialize(): set requires_grad before it")

    def _agree(self, moves: bool) -> tuple[set[str], bool]:
        """Make ranks agree on what got gradients, and reduce what has not been. Returns the touched parameters' names,
        and whether chunks move on any rank.

        Raises RuntimeError on every rank when they issued different transfers: their weights would mix.
        """
        schedule, size = self._schedule, self._rank_group.world_size
        names = list(self.steps_taken)
        waiting = [any(gradient.has_local for gradient in group.gradients) for group in self._groups]
        flags = [float(fqn in schedule.touched) for fqn in names]
        if self._rank_group.is_distributed:
            mine = [schedule.order_hash, schedule.order_hash**2, float(moves), *map(float, waiting), *flags]
            total, total_of_squares, moves, *rest = sum_over_ranks(mine, self._rank_group)
            if total**2 != size * total_of_squares:  # Cauchy-Schwarz: equal only when all are
                raise RuntimeError(
                    "ranks ran their blocks in different orders since the last step, so that they gathered or reduced "
                    "different chunks: the model's control flow around blocks must not depend on a rank's own data"
                )
            waiting, flags = [count > 0 for count in rest[: len(waiting)]], rest[len(waiting) :]
        schedule.order_hash = 0
        for group, is_waiting in reversed(list(zip(self._groups, waiting, strict=True))):
            if is_waiting:
                group.reduce_gradients(final=True)
            for gradient in group.gradients:
                gradient.leave()
        return {fqn for fqn, flag in zip(names, flags, strict=True) if flag}, moves > 0

    def _norm(self) -> tuple[float, bool]:
        """Global 2-norm of the averaged, unscaled gradient, and whether it is not finite."""
        total = math.fsum(float(gradient.squares()) for gradient in self._gradients())
        if self._config.zero_stage > 0:  # below, every rank holds the whole gradient
            [total] = sum_over_ranks([total], self._rank_group)
        return math.sqrt(total) * self._averaging(), not math.isfinite(total)

    def _averaging(self) -> float:
        """What turns a sum over ranks of scaled gradients into their mean."""
        return 1.0 / (self._rank_group.world_size * (self.scaler.scale if self.scaler is not None else 1.0))

    def _factor(self) -> float:
        limit = self._config.max_grad_norm
        # As torch.nn.utils.clip_grad_norm_ has it.
        clip = 1.0 if limit is None else min(1.0, limit / (self.grad_norm + 1e-6))
        return self._averaging() * clip

    def _update(self, touched: set[str], factor: float) -> None:
        for fqn in touched:
            self.steps_taken[fqn] += 1
        changed: list[tuple[ChunkGroup, list[Chunk]]] = []
        deferred: list[ChunkUpdate] = []
        releases: list[Callable[[], None]] = []
        for group in self._groups:  # in forward order: the first is needed first
            updated = []
            for gradient in group.gradients:
                chunk = gradient.chunk
                if not any(slot.fqn in touched for slot in chunk.spec.slots):
                    continue
                updated.append(chunk)
                if chunk.placement.optimizer_tier is Tier.DEVICE:
                    execute(ChunkUpdate(chunk, list(self._runs(chunk, touched, gradient.parts())), factor))
                else:
                    parts, release = gradient.hand_over()
                    deferred.append(ChunkUpdate(chunk, list(self._runs(chunk, touched, parts)), factor))
                    releases.append(release)
            if updated:
                changed.append((group, updated))
        self._updaters.defer(deferred, releases)
        for group, updated in changed:
            group.mark_updated(updated)
            if not group.is_sharded:
                self._schedule.refresh(group)

    # With update_in_backward

    def _update_in_backward(self, group: ChunkGroup) -> None:
        """The gradients of `group` are complete."""
        state = self._in_backward
        touched = {slot.fqn for gradient in group.gradients for slot in gradient.chunk.spec.slots}
        touched &= self._schedule.touched
        if not touched:
            return
        if group.is_held:
            raise RuntimeError(f"{group.name} is updated in the backward pass, and a `gathered` context reads it")
        self._schedule.update_begun = True
        state.fix([self._hyper(index, 1) for index in range(len(self.param_groups))])
        for fqn in touched:
            self.steps_taken[fqn] += 1
        gradients = [g for g in group.gradients if any(slot.fqn in touched for slot in g.chunk.spec.slots)]
        in_place = any(gradient.chunk.is_updated_in_place for gradient in gradients)
        if group.is_sharded and group.is_idle and not in_place:
            group.reshard()
        if in_place:
            self._schedule.refresh(group)
            group.wait()
        for gradient in gradients:
            chunk, squares = gradient.chunk, gradient.squares()
            state.squares.append((chunk, squares))
            parts, release = gradient.hand_over()
            runs = list(self._runs(chunk, touched, parts))
            weight = chunk.owned_in_full() if chunk.is_updated_in_place else None
            update = ChunkUpdate(chunk, runs, self._averaging(), weight, squares)
            if chunk.placement.optimizer_tier is Tier.DEVICE:
                execute(update)
                release()
            else:
                self._updaters.submit(update, state.follow(chunk) if update.is_streamed else (), release)
        group.mark_updated_in_place([gradient.chunk for gradient in gradients])
        state.bound(group)

    def _end_updates(self, state: InBackward) -> None:
        """Raises FloatingPointError for a gradient that was not finite, and RuntimeError for what came too late."""
        for gradient in self._gradients():
            if gradient.parts():
                raise RuntimeError(
                    f"{gradient.chunk.name} got another gradient after it had been updated in the backward pass: "
                    "update_in_backward=True cannot train this model"
                )
        squares = [(chunk, float(value)) for chunk, value in state.squares]
        self.grad_norm = math.sqrt(math.fsum(value for _, value in squares)) * self._averaging()
        bad = [chunk.name for chunk, value in squares if not math.isfinite(value)]
        if bad:
            self._schedule.is_broken = True
            raise FloatingPointError(
                f"the gradient of {', '.join(bad[:5])} is not finite, and other chunks have been updated in this "
                "backward pass already: load a checkpoint; without update_in_backward such a step is skipped"
            )
        if squares:
            state.check([self._hyper(index, 1) for index in range(len(self.param_groups))])
        state.close()
        self._schedule.update_begun = False
        self._updaters.read_ahead(state.follow(None))

    def _runs(self, chunk: Chunk, touched: set[str], parts: list[GradientPart]) -> Iterator[Run]:
        """The owned slots, cut where the group, the step number or being touched changes; one by one where their
        moments are codes, since padding may be between them."""
        for (is_touched, group, step, _), same in groupby(
            chunk.owned_slots,
            lambda owned: (*self._kind(owned.slot, touched), None if chunk.scales is None else owned.slot.fqn),
        ):
            if is_touched:
                same = list(same)
                start, stop = same[0].shard_start, same[-1].shard_stop
                gradient = tuple(_cut(parts, start, stop))
                yield Run(start, stop, gradient[0] if len(gradient) == 1 else gradient, self._hyper(group, step))

    def _kind(self, slot: Slot, touched: set[str]) -> tuple[bool, int, int]:
        return slot.fqn in touched, slot.optimizer_group, self.steps_taken[slot.fqn]

    def _hyper(self, index: int, step: int) -> AdamHyper:
        group = self.param_groups[index]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return AdamHyper(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(self._decoupled[index]),
            step=step,
        )

    def _gradients(self) -> Iterator[ChunkGradient]:
        for group in self._groups:
            yield from group.gradients

    # State

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("the optimizer's state is spread over ranks and tiers: use megalith.engine.save_checkpoint")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError("the optimizer's state is spread over ranks and tiers: use megalith.engine.load_checkpoint")

    def shared_state(self) -> dict[str, Any]:
        """What is the same on all ranks, as plain values, for a checkpoint."""
        return {
            "groups": [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups],
            "steps_taken": dict(self.steps_taken),
            "skipped_steps": self.skipped_steps,
            "expected_micro_steps": self._schedule.expected_micro_steps,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def check_shared_state(self, state: dict[str, Any] | None) -> None:
        """Raises ValueError where a checkpoint's state is not one of this optimizer."""
        if state is None:
            raise ValueError("the checkpoint was saved without an optimizer: load it with optimizer=None")
        if len(state["groups"]) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(state['groups'])} optimizer groups, this optimizer {len(self.param_groups)}"
            )
        if state["steps_taken"].keys() != self.steps_taken.keys():
            different = sorted(state["steps_taken"].keys() ^ self.steps_taken.keys())
            raise ValueError(f"other parameters were trained when the checkpoint was saved: {', '.join(different[:5])}")

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Take a state that `check_shared_state` has passed."""
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)
        self.steps_taken.update(state["steps_taken"])
        self.skipped_steps = state["skipped_steps"]
        self._schedule.is_broken = self._schedule.update_begun = False
        if self._in_backward is not None:
            self._in_backward.close()
        self._schedule.expected_micro_steps = state["expected_micro_steps"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_groups"):
            raise RuntimeError("the chunks are laid out: give all parameters to the optimizer before initialize()")
        super().add_param_group(param_group)
