"""What the engines of one process share when they are given one manager: budgets, a ledger of all, and one trace."""

import weakref
from typing import Any, Protocol

from .config import parse_bytes
from .tiers import Ledger, Payload, Tier
from .trace import AccessTrace


class Owner(Protocol):
    """An engine's schedule."""

    groups: list[Any]
    is_distributed: bool


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
        self.working_bytes = 0
        """The most that one of the engines needs on the device while it computes, beside what is at rest there."""
        self._schedules: list[weakref.ref[Owner]] = []

    def join(self, schedule: Owner, working_bytes: int) -> int:
        """The number under which its groups are known here."""
        self.working_bytes = max(self.working_bytes, working_bytes)
        self._schedules.append(weakref.ref(schedule))
        return len(self._schedules) - 1

    def left(self, tier: Tier) -> int | None:
        """Bytes of the budget that nothing is at rest in, at least 1; None without a budget."""
        budget = self.budgets[tier]
        passing = self.ledger.bytes(tier, Payload.GATHERED)
        if tier is Tier.DEVICE:
            passing += self.ledger.bytes(tier, Payload.GRADIENT)
        return None if budget is None else max(budget - self.ledger.tier_bytes(tier) + passing, 1)

    def groups(self) -> dict[tuple[int, int], tuple[Owner, Any]]:
        """(schedule, group) of all engines that are left, by (the engine's number, the group's index)."""
        alive = [(number, schedule) for number, ref in enumerate(self._schedules) if (schedule := ref()) is not None]
        return {(number, group.index): (schedule, group) for number, schedule in alive for group in schedule.groups}
