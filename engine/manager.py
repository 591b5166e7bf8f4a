"""What the engines of one process share when they are given one manager: budgets, a ledger of all, and one trace."""

import math
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .config import parse_bytes
from .tiers import Ledger, Payload, Tier
from .trace import AccessTrace, Need

ROOM_FOR_LONGER = 1.25
"""Inputs that are so much larger than those measured find room."""


class Owner(Protocol):
    """An engine's schedule."""

    groups: list[Any]
    is_distributed: bool


class Mover(Protocol):
    """An engine's migration."""

    def send_all_home(self) -> None: ...


class Meter(Protocol):
    """What a device's memory is used for beside what engines store."""

    def take_other_bytes(self, stored_bytes: int) -> int:
        """At most since the last call; engines store `stored_bytes` now."""

    def room_bytes(self) -> int:
        """All that this process may use, less what fragmentation needs."""

    def take_overshoot(self) -> int:
        """How far the peak, where it has grown since the last call, is above the room; 0 where it is not."""


@dataclass(frozen=True)
class Held:
    """The moment of a `gathered` context."""

    groups: frozenset[Hashable]


class Manager:
    """Give one to several `initialize` calls, and what they store counts against one budget for each tier.

    An engine is placed in what those before it have left. Weights that are gathered of any of them are evicted where
    another needs the room, and fetched before their next use, be it in another model's phase: the trace is of all.
    Budgets are bytes or strings such as "24GB"; None is as without a manager. Room is kept for the gradients of the one
    engine that needs most: where several wait for their steps at once, the device's budget is exceeded by the others'.
    """

    def __init__(self, *, device_budget: int | str | None = None, host_budget: int | str | None = None) -> None:
        self.budgets = {
            Tier.DEVICE: parse_bytes(device_budget, "device_budget"),
            Tier.HOST: parse_bytes(host_budget, "host_budget"),
        }
        self.ledger = Ledger()
        self.trace = AccessTrace()
        self.bounds: dict[Hashable, int] = {}
        """Of what each engine needs on the device while it computes, beside what is at rest there: by its number."""
        self.unplanned: set[Hashable] = set()
        """Those that will ask what was measured, to place their chunks anew."""
        self.measuring: set[Hashable] = set()
        """Those, and the ones that have chunks to send home if a later moment needs more."""
        self._meter: Meter | None = None
        self._schedules: list[weakref.ref[Owner]] = []
        self._movers: list[weakref.ref[Mover]] = []

    def join(self, schedule: Owner) -> int:
        """The number under which its groups are known here."""
        self._schedules.append(weakref.ref(schedule))
        return len(self._schedules) - 1

    def watch(self, mover: Mover, number: int, meter: Meter | None) -> None:
        """Measure from now on, for the engine of that number."""
        self._movers.append(weakref.ref(mover))
        self.unplanned.add(number)
        self.measuring.add(number)
        self._meter = meter or self._meter

    def send_all_home(self) -> None:
        """Give back what spare memory was used for, before an engine joins: it may need it."""
        for ref in self._movers:
            if (mover := ref()) is not None:
                mover.send_all_home()

    @property
    def working_bytes(self) -> int:
        """The most that one of the engines needs on the device while it computes."""
        return max(self.bounds.values(), default=0)

    def visit(self, use: Hashable) -> None:
        """`use` of weights begins."""
        self.end_moment()
        self.trace.visit(use)

    def hold(self, number: int, groups: list[Any]) -> None:
        """A `gathered` context of that engine begins."""
        self.end_moment()
        self.trace.begin(Held(frozenset((number, group.index) for group in groups)))
        self.need(groups)

    def need(self, wanted: list[Any]) -> None:
        """The weights of `wanted` must be whole now, and of all groups that somebody uses."""
        if self.measuring:
            groups = self.groups().items()
            keys = {key for key, (_, group) in groups if group in wanted or not group.is_idle}
            self.trace.measure(Need(groups=frozenset(keys)))

    def end_moment(self) -> None:
        """What was on the device until now belongs to the moment that ends. Of what engines do not store, which are
        activations, there is to be room for somewhat more: later batches may be longer."""
        if self.measuring:
            gradient_bytes = self.ledger.take_recent_peak(Tier.DEVICE, Payload.GRADIENT)
            other_bytes = 0
            if self._meter is not None and self.unplanned:  # it costs some time
                other_bytes = self._meter.take_other_bytes(self.ledger.tier_bytes(Tier.DEVICE))
            other_bytes = math.ceil(other_bytes * ROOM_FOR_LONGER)
            self.trace.measure(Need(gradient_bytes=gradient_bytes, other_bytes=other_bytes))

    def needed_bytes(self) -> Iterator[tuple[frozenset[Hashable], int, bool]]:
        """(groups, bytes, is_held) of every moment that was measured: what the device must hold, whose whole weights
        are in that, and whether a `gathered` context asks for them."""
        known, at_rest = self.groups(), self.ledger.device_bytes_at_rest()
        for moment, need in self.trace.needs.items():
            weights = sum(known[key][1].gathered_bytes for key in need.groups if key in known)
            is_held = isinstance(moment, Held)
            yield need.groups, at_rest + weights + need.gradient_bytes + need.other_bytes, is_held

    def left(self, tier: Tier) -> int | None:
        """Bytes of the budget that nothing is at rest in, at least 1; None without a budget."""
        budget = self.budgets[tier]
        used = self.ledger.device_bytes_at_rest() if tier is Tier.DEVICE else self.ledger.tier_bytes(tier)
        return None if budget is None else max(budget - used, 1)

    def groups(self) -> dict[tuple[int, int], tuple[Owner, Any]]:
        """(schedule, group) of all engines that are left, by (the engine's number, the group's index)."""
        alive = [(number, schedule) for number, ref in enumerate(self._schedules) if (schedule := ref()) is not None]
        return {(number, group.index): (schedule, group) for number, schedule in alive for group in schedule.groups}
