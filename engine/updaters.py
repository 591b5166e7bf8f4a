"""Who executes the updates that `step()` has published, of chunks whose state is not on the device: the host's
processor on one lane, the device on another, side by side."""

from collections.abc import Callable, Sequence

from .device_updates import DeviceUpdates
from .host_updates import HostUpdates
from .lanes import Lane, UpdateEvent
from .rates import UpdateRates
from .streaming import Source, UpdateStream
from .tiers import Tier
from .update import ChunkUpdate, execute
from .updater_choice import Balance, UpdateCost, update_cost


class Updaters:
    """Each update is given to its lane at once, in the order in which the chunks are used: whoever uses one next waits
    for its own."""

    def __init__(
        self,
        host_lane: Lane,
        stream: UpdateStream | None,
        host: HostUpdates | None,
        device_lane: Lane,
        device: DeviceUpdates | None,
        rates: UpdateRates | None,
    ) -> None:
        """`stream`: where something is on a drive. `host`: where it updates what is on the device. `device`: where that
        may update what is on the host."""
        self._host_lane = host_lane
        self._stream = stream
        self._host = host
        self._device_lane = device_lane
        self._device = device
        self._rates = rates if device is not None else None
        self._balance = Balance(self._rates)

    def next_step(self) -> None:
        """What is submitted from now on is of another step."""
        self._balance = Balance(self._rates)

    def defer(self, updates: list[ChunkUpdate], releases: list[Callable[[], None]]) -> None:
        """All updates of a step, in order; each is followed by its release."""
        coming = [update for update in updates if update.is_streamed]
        for update, release in zip(updates, releases, strict=True):
            if update.is_streamed:
                coming = coming[1:]
            self.submit(update, coming, release)

    def submit(self, update: ChunkUpdate, coming: Sequence[Source], release: Callable[[], None]) -> None:
        """`coming` are read ahead, `release` is called when the gradient has been read."""
        stream, host, device, copies, writes = self._stream, self._host, self._device, [], []

        def on_host() -> None:  # neither knows `self`, which is the model's
            if update.is_streamed:
                writes.extend(stream.execute(update, coming))
            elif host is not None:
                host.execute(update)
            else:
                execute(update)
            release()

        def on_device() -> None:
            copies.append(device.execute(update))
            release()

        chunk = update.chunk
        chunk.settle()
        # Without runs, nothing in this rank's part of the chunk has changed.
        by_device = update.runs and self._balance.give(_cost(update)) is Tier.DEVICE
        lane, work = (self._device_lane, on_device) if by_device else (self._host_lane, on_host)
        chunk.pending = UpdateEvent(lane.submit(work, f"update {chunk.name}"), copies, writes)

    def read_ahead(self, coming: Sequence[Source]) -> None:
        """With nothing to update for a while."""
        if self._stream is not None:
            stream = self._stream
            self._host_lane.submit(lambda: stream.read_ahead(coming), "read ahead")


def _cost(update: ChunkUpdate) -> UpdateCost:
    gradient = update.runs[0].gradient
    first = gradient[0] if isinstance(gradient, tuple) else gradient
    return update_cost(update.chunk.placement, update.chunk.spec, first.dtype.itemsize)
