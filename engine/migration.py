"""placement="auto" after the first steps: spare device memory takes optimizer shards, and the weights with them.

The plan that a run begins with (`budgets`) is made of bounds. Its first step records the order in which weights are
used; the second, which runs by that order, is measured: what every moment needed on the device, gathered weights that
only stayed because there was room not counted. After it the chunks that move most bytes a step for the room they take
are *promoted* to the device, as many as fit beside what each moment needs. When a later step needs more, some are
*sent home* after it; on one rank before it, where a forward pass' inputs tell. Their room at home stays reserved, so
that this cannot fail. Moves are the same on every rank and change no bit of any result.

What a `gathered` context holds counts like every other use, where the budget has room for it at all.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .chunk import Chunk
from .chunk_group import ChunkGroup
from .collectives import RankGroup
from .config import EngineConfig
from .layout import ChunkSpec
from .manager import ROOM_FOR_LONGER, Manager, Meter
from .placement import ChunkPlacement
from .schedule import Schedule
from .tiers import Tier

MEASURED_STEP = 2


@dataclass(frozen=True)
class Candidate:
    """A chunk that is at home, or promoted."""

    key: int
    saved_bytes: int
    """What a step moves less while the chunk is on the device."""
    added_bytes: np.ndarray  # int64 [moments]
    """What the device holds more then, in each moment; less than 0 where whole weights were gathered anyway."""


def choose_promotions(candidates: Sequence[Candidate], excess: np.ndarray) -> list[int]:
    """Keys of those to promote. `excess` (int64 [moments]): bytes above the room, less than 0 where some are spare; no
    moment gets any, or more than it has.

    What saves most for its room goes first, of equals the one given first. Where one candidate alone saves more than
    all those together, it does: so at least half of what the best choice saves is saved, as long as what a candidate
    adds is the same in every moment (Dantzig 1957, of knapsacks)."""
    by_density = sorted(candidates, key=_density, reverse=True)
    greedy = _fill([], by_density, excess)
    singles = [each for each in candidates if _fits(excess + each.added_bytes, excess)]
    best = max(singles, key=lambda each: each.saved_bytes, default=None)
    if best is not None and best.saved_bytes > sum(each.saved_bytes for each in greedy):
        greedy = _fill([best], by_density, excess)
    return [each.key for each in greedy]


def choose_demotions(promoted: Sequence[Candidate], excess: np.ndarray) -> list[int]:
    """Keys of those to send home, until no moment is above the room; all where that is not enough. What saves least for
    its room goes first, and stays after all where the others free enough."""
    chosen: list[Candidate] = []
    for each in sorted(promoted, key=_density):
        if (excess <= 0).all():
            break
        chosen.append(each)
        excess = excess - each.added_bytes
    while back := [each for each in chosen if (excess + each.added_bytes <= 0).all()]:
        chosen.remove(back[-1])
        excess = excess + back[-1].added_bytes
    return [each.key for each in chosen]


def _density(candidate: Candidate) -> float:
    return candidate.saved_bytes / max(int(candidate.added_bytes.max(initial=0)), 1)


def _fits(after: np.ndarray, before: np.ndarray) -> bool:
    return bool((after <= np.maximum(before, 0)).all())


def _fill(chosen: list[Candidate], candidates: Sequence[Candidate], excess: np.ndarray) -> list[Candidate]:
    now = excess + sum(each.added_bytes for each in chosen)
    for each in candidates:
        if each not in chosen and _fits(now + each.added_bytes, excess):
            chosen = [*chosen, each]
            now = now + each.added_bytes
    return chosen


def moved_bytes(spec: ChunkSpec, placement: ChunkPlacement, config: EngineConfig, micro_steps: int) -> int:
    """What a step moves of a chunk over the link and to and from the drive, each payload counted where it is at rest.
    The host's own reads and writes are no moves. What the device updates (updater_choice.py) moves its state too, which
    is not counted: which chunks that are depends on all others."""
    weight_bytes = placement.owned_numel * spec.dtype.itemsize
    fetched = 2 * micro_steps * weight_bytes if placement.weight_tier is not Tier.DEVICE else 0
    if not spec.trainable or placement.optimizer_tier is Tier.DEVICE:
        return fetched
    updated = 0  # by the host, which has a weight that is at rest there
    if placement.weight_tier is Tier.DEVICE:
        updated = 2 * weight_bytes
    elif placement.weight_tier is Tier.NVME:
        updated = (1 if config.update_in_backward else 2) * weight_bytes
    gradient = (2 if placement.gradient_tier is Tier.NVME else 1) * weight_bytes
    state = 2 * placement.state_bytes(spec) if placement.optimizer_tier is Tier.NVME else 0
    return fetched + updated + gradient + state


@dataclass(frozen=True)
class Promotion:
    """What an engine's migration has done."""

    chunks: int
    of_chunks: int
    device_bytes: int
    """That they take there, gradients not counted."""
    saved_bytes: int
    """What a step moves less, at least."""


class Migration:
    """Of one engine. `is_due` is asked once a step on every rank; `move` is called on all of them where it is on
    any."""

    def __init__(
        self,
        groups: list[ChunkGroup],
        schedule: Schedule,
        rank_group: RankGroup,
        config: EngineConfig,
        manager: Manager,
        meter: Meter | None,
    ) -> None:
        """`meter`: tells the room where there is no budget."""
        self._schedule = schedule
        self._rank_group = rank_group
        self._config = config
        self._manager = manager
        self._meter = meter
        self._home = {
            chunk.index: (group, chunk)
            for group in groups
            for chunk in group.chunks
            if not chunk.home.is_on_device(chunk.spec)
        }
        self._room_bytes = {index: _room_bytes(chunk) for index, (_, chunk) in self._home.items()}
        self._steps = 0
        self._micro_steps = 1
        self._is_planned = False
        self._summed: set[int] = set()  # chunks whose sums of micro-batches wait on the device in any case
        self._moments: list[tuple[frozenset[Hashable], int]] = []  # (groups in use, bytes above the room)
        self._input_numel = 1  # of the largest forward pass that there is room for what is computed in
        self._other_bytes = 0  # that room
        manager.watch(self, schedule.number, meter)

    def is_due(self) -> bool:
        """Measure the step that ends, whose gradients are still there."""
        self._manager.end_moment()
        if not self._schedule.micro_steps:
            return False
        self._steps += 1
        self._micro_steps = max(self._micro_steps, self._schedule.micro_steps)
        if self._steps < MEASURED_STEP:
            self._micro_steps = 1
            return False
        self._schedule.knows_micro_steps = True
        if self._is_planned and not self._promoted() and self._meter is None:
            return False
        summed = self._schedule.sums_on_device() if self._schedule.has_summed else ()
        self._summed = {gradient.chunk.index for gradient in summed}
        self._moments = self._measured_moments()
        return not self._is_planned or any(nbytes > 0 for _, nbytes in self._moments)

    def move(self) -> None:
        """Between two steps. Raises on every rank what any rank raised; nothing is promoted then."""
        own = max((nbytes for _, nbytes in self._moments), default=0)
        offers = self._rank_group.gather_objects((own, self._measured_budget(), self._micro_steps))
        self._micro_steps = max(micro_steps for _, _, micro_steps in offers)
        if self._rank_group.is_distributed:  # one rank's order of use need not be another's, but all move the same
            self._moments = [(frozenset(), max(nbytes for nbytes, _, _ in offers))]
        budgets = [budget for _, budget, _ in offers if budget is not None]
        if budgets:
            self._schedule.device_budget = min(budgets)
        was_planned, self._is_planned = self._is_planned, True
        self._manager.unplanned.discard(self._schedule.number)
        excess = np.array([nbytes for _, nbytes in self._moments], dtype=np.int64)
        self._schedule.reshard_idle()
        if was_planned:
            self._send_home(choose_demotions(self._candidates(promoted=True), excess))
        else:
            self._promote(choose_promotions(self._candidates(promoted=False), excess))
        self._schedule.count_placements()
        if not self._promoted():
            self._manager.measuring.discard(self._schedule.number)

    def expect(self, input_numel: int) -> None:
        """A forward pass with inputs of so many elements is about to begin. What it computes grows with them: where
        that would be more than the room that was left for it, send home what stands in the way. Asked on one rank
        without a budget: several know of each other's inputs only after a step."""
        growth = input_numel / self._input_numel
        if not self._is_planned:
            self._input_numel = max(self._input_numel, input_numel)
        elif growth > ROOM_FOR_LONGER:
            self._input_numel = input_numel
            self._make_room(math.ceil(self._other_bytes * (growth - 1)))

    def _make_room(self, nbytes: int) -> None:
        """For what is computed, beside what there is for it."""
        self._other_bytes += nbytes
        self._schedule.device_budget -= nbytes
        stored_bytes = self._manager.ledger.device_bytes_at_rest() + self._manager.working_bytes
        excess_bytes = stored_bytes - self._schedule.device_budget
        self._moments = [(frozenset(), excess_bytes)]
        self._schedule.reshard_idle()
        movable = [each for each in self._candidates(promoted=True) if self._gradient_is_empty(each.key)]
        self._send_home(choose_demotions(movable, np.array([excess_bytes])))
        self._schedule.count_placements()

    def send_all_home(self) -> None:
        """All that has no gradient on the device, and plan anew after the next step."""
        idle = [index for index in self._promoted() if self._gradient_is_empty(index)]
        self._send_home(idle)
        self._schedule.count_placements()
        self._is_planned = False
        self._input_numel = 1
        self._manager.unplanned.add(self._schedule.number)
        self._manager.measuring.add(self._schedule.number)

    @property
    def promotion(self) -> Promotion:
        chunks = [chunk for _, chunk in self._home.values() if chunk.is_promoted]
        device_bytes = sum(self._room_bytes[chunk.index] for chunk in chunks)
        saved = sum(moved_bytes(chunk.spec, chunk.home, self._config, self._micro_steps) for chunk in chunks)
        return Promotion(len(chunks), len(self._home), device_bytes, saved)

    # What was measured

    def _measured_moments(self) -> list[tuple[frozenset[Hashable], int]]:
        if self._meter is not None and self._is_planned:
            return [(frozenset(), self._meter.take_overshoot())]
        room = self._schedule.device_budget if self._meter is None else self._meter.room_bytes()
        budget = self._schedule.device_budget if self._meter is None else self._measured_budget()
        promoted = [self._home[index][1] for index in self._promoted()]
        moments = self._bounds(room)
        for groups, nbytes, is_held in self._manager.needed_bytes():
            # A model that is gathered with everything at home may be above the room: nothing would help.
            if is_held and nbytes - sum(self._added_bytes(chunk, groups) for chunk in promoted) > room:
                continue
            moments.append((groups, nbytes - room))
        if self._schedule.has_summed:  # sums that wait there save more than what they could make room for
            moments.append((frozenset(), self._schedule.summing_bytes() - budget))
        return moments

    def _bounds(self, room: int) -> list[tuple[frozenset[Hashable], int]]:
        """Of moments that may come: a program whose order depends on its data has not shown all of them. What is known
        by now is whether gradients are summed over micro-batches."""
        spare, number = room - self._manager.ledger.device_bytes_at_rest(), self._schedule.number
        moments = []
        for groups, gradient_bytes in self._schedule.bounds(self._micro_steps):
            weights = sum(group.gathered_bytes for group in groups)
            keys = frozenset((number, group.index) for group in groups)
            moments.append((keys, weights + gradient_bytes - spare))
        others = [nbytes for other, nbytes in self._manager.bounds.items() if other != number]
        return [*moments, (frozenset(), max(others, default=0) - spare)]

    def _measured_budget(self) -> int | None:
        """For what engines store."""
        if self._meter is None:
            return None
        if self._is_planned:
            return self._schedule.device_budget - max(nbytes for _, nbytes in self._moments)
        self._other_bytes = max(need.other_bytes for need in self._manager.trace.needs.values())
        return self._meter.room_bytes() - self._other_bytes

    def _candidates(self, promoted: bool) -> list[Candidate]:
        return [
            Candidate(
                index,
                moved_bytes(chunk.spec, chunk.home, self._config, self._micro_steps),
                np.array([self._added_bytes(chunk, groups) for groups, _ in self._moments], dtype=np.int64),
            )
            for index, (_, chunk) in self._home.items()
            if chunk.is_promoted == promoted
        ]

    def _added_bytes(self, chunk: Chunk, groups: frozenset[Hashable]) -> int:
        """By its promotion, in a moment that uses the weights of `groups`."""
        group, _ = self._home[chunk.index]
        stays_whole = chunk.home.sharded and not chunk.home.promoted(chunk.spec).sharded
        gathered = stays_whole and (self._schedule.number, group.index) in groups
        return self._room_bytes[chunk.index] + self._kept_gradient_bytes(chunk) - (chunk.full.nbytes if gathered else 0)

    def _kept_gradient_bytes(self, chunk: Chunk) -> int:
        """That stay where they would leave: from landing to the step, as if that were always."""
        if not chunk.spec.trainable or chunk.index in self._summed:
            return 0
        return chunk.home.owned_numel * (4 if self._micro_steps > 1 else chunk.spec.dtype.itemsize)

    # Moves

    def _promoted(self) -> list[int]:
        return [index for index, (_, chunk) in self._home.items() if chunk.is_promoted]

    def _promote(self, indices: list[int]) -> None:
        error = None
        try:
            for index in indices:
                group, chunk = self._home[index]
                group.promote(chunk)
        except Exception as caught:
            error = caught
        try:
            self._rank_group.barrier(error)
        except Exception:
            for index in self._promoted():
                group, chunk = self._home[index]
                group.send_home(chunk)
            raise
        self._manager.trace.age(sum(self._kept_gradient_bytes(self._home[index][1]) for index in indices))

    def _send_home(self, indices: list[int]) -> None:
        for index in indices:
            group, chunk = self._home[index]
            group.send_home(chunk)
        self._manager.trace.age(-sum(self._kept_gradient_bytes(self._home[index][1]) for index in indices))

    def _gradient_is_empty(self, index: int) -> bool:
        group, chunk = self._home[index]
        return all(gradient.is_empty for gradient in group.gradients if gradient.chunk is chunk)


def _room_bytes(chunk: Chunk) -> int:
    """On the device, at rest, of a chunk that is promoted, beside what is there anyway."""
    there = chunk.home.promoted(chunk.spec).tier_bytes(Tier.DEVICE, chunk.spec)
    return there - chunk.home.tier_bytes(Tier.DEVICE, chunk.spec)
