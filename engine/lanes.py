"""Lanes: ordered queues of work, a CUDA stream on a GPU and a worker thread on a CPU; events order lanes.

All movement of chunks goes through a lane, with one rule: work that is submitted starts after everything that the
submitting thread has issued so far ("compute"), and after the lane's earlier work. Nothing else is ordered until
somebody waits for the event that `submit` returns.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Event(Protocol):
    def wait(self) -> None:
        """Order all later work of the caller after the event. Raises what the lane's work raised."""

    def synchronize(self) -> None:
        """Block the host until the event has happened: before it reads what the work wrote."""

    def done(self) -> bool:
        """Whether it has happened, well or not."""


class Lane(Protocol):
    name: str

    def submit(self, work: Callable[[], None], label: str) -> Event: ...

    def close(self) -> None: ...


class MakeLane(Protocol):
    """`make_lane` on a ground."""

    def __call__(self, name: str, *, waits: bool, waits_for_host: bool) -> Lane: ...


class LaneError(RuntimeError):
    """Work on a lane failed; the message names the lane and the work, `__cause__` is what was raised."""


class ThreadEvent:
    """Set by a worker thread. The wait blocks the calling thread."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: LaneError | None = None

    def set(self, error: LaneError | None) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error

    synchronize = wait

    def done(self) -> bool:
        return self._done.is_set()


WORKER_PREFIX = "megalith-"
"""Of the names of the threads that move data."""


def on_worker() -> bool:
    """Whether the caller is such a thread."""
    return threading.current_thread().name.startswith(WORKER_PREFIX)


class ThreadLane:
    """A worker thread that does its work in order. After a failure the lane refuses all later work with that failure:
    what depended on the failed work must not run, and every waiter gets the reason."""

    def __init__(self, name: str, delay: Callable[[], float] | None = None) -> None:
        self.name = name
        self._delay = delay
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._error: LaneError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=WORKER_PREFIX + name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], label: str) -> ThreadEvent:
        if self._closed:
            raise LaneError(f"lane {self.name!r} is closed and cannot take {label}")
        event = ThreadEvent()
        self._queue.put((work, label, event))
        return event

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, label, event = item
            if self._error is None:
                try:
                    if self._delay is not None:
                        time.sleep(self._delay())
                    work()
                except BaseException as error:  # handed to the waiter, who is on another thread
                    self._error = LaneError(f"lane {self.name!r} failed at {label}: {type(error).__name__}: {error}")
                    self._error.__cause__ = error
            del item, work  # a closure kept here would keep its chunk's buffers alive while the lane is idle
            event.set(self._error)

    def close(self) -> None:
        """What was submitted is done first. The wait is bounded, since a peer that is gone may never answer; without
        one, a process that ends while the worker is in the middle of a transfer would abort."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)


class StreamEvent:
    """The wait orders the caller's current stream; the host goes on."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()

    def done(self) -> bool:
        return self._event.query()


class StreamLane:
    """A CUDA stream. `submit` issues the work at once, ordered after the caller's stream."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[[], None], label: str) -> StreamEvent:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.profiler.record_function(f"megalith::{self.name}: {label}"):
            work()
            return StreamEvent(self._stream.record_event())

    def close(self) -> None:
        self._stream.synchronize()


class IssuedEvent:
    """The event of work that a thread issues on a stream: it can be ordered once the thread has come to it."""

    def __init__(self, issued: ThreadEvent, event: torch.cuda.Event) -> None:
        self._issued = issued
        self._event = event

    def wait(self) -> None:
        self._issued.wait()
        torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        self._issued.wait()
        self._event.synchronize()

    def done(self) -> bool:
        return self._issued.done() and self._event.query()


class StreamThreadLane:
    """A worker thread that issues its work on a CUDA stream of its own: for work that waits for what a thread does on
    the host, so that the caller need not."""

    def __init__(self, name: str, device: torch.device, delay: Callable[[], float] | None = None) -> None:
        self.name = name
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadLane(name, delay)

    def submit(self, work: Callable[[], None], label: str) -> IssuedEvent:
        before = torch.cuda.current_stream(self._device).record_event()
        after = torch.cuda.Event()

        def issue() -> None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                work()
                after.record(self._stream)

        return IssuedEvent(self._thread.submit(issue, label), after)

    def close(self) -> None:
        self._thread.close()
        self._stream.synchronize()


class DoneEvent:
    """The event of work that was done in place."""

    def wait(self) -> None:
        return None

    synchronize = wait

    def done(self) -> bool:
        return True


class UpdateEvent:
    """Of an update that ends on other lanes, or on a drive, after it has left its own."""

    def __init__(self, left: Event, copies: Sequence[Event], writes: Sequence[Event]) -> None:
        """`copies` on other lanes and `writes` to a drive are filled by the update."""
        self._left = left
        self._copies = copies
        self._writes = writes

    def wait_for_values(self) -> None:
        """As `wait`, but that the drive may still be taking what memory has."""
        self._left.wait()
        for copy in self._copies:
            copy.wait()

    def wait(self) -> None:
        self.wait_for_values()
        for write in self._writes:
            write.wait()

    def synchronize(self) -> None:
        self._left.synchronize()
        for end in (*self._copies, *self._writes):
            end.synchronize()

    def done(self) -> bool:
        return self._left.done() and all(end.done() for end in (*self._copies, *self._writes))


class InlineLane:
    """Work done at once by the caller: where there is nothing to overlap it with."""

    def __init__(self, name: str) -> None:
        self.name = name

    def submit(self, work: Callable[[], None], label: str) -> DoneEvent:
        work()
        return DoneEvent()

    def close(self) -> None:
        return None


def random_delay(seed: int, max_delay_s: float) -> Callable[[], float]:
    """Delays for the tests that look for a missing wait: with them, a lane's work ends as late as it may."""
    generator = random.Random(seed)
    return lambda: generator.random() * max_delay_s


def make_lane(
    name: str,
    device: torch.device,
    delay: Callable[[], float] | None = None,
    *,
    waits: bool = True,
    waits_for_host: bool = False,
) -> Lane:
    """`waits`: work on this lane waits for other ranks or for a drive. On a CPU other work gains nothing by a thread,
    which would take the cores from the model's computation in the middle of it; a `delay` needs one all the same.
    `waits_for_host`: it waits for events of threads."""
    if device.type != "cuda":
        return ThreadLane(name, delay) if waits or delay is not None else InlineLane(name)
    return StreamThreadLane(name, device, delay) if waits_for_host else StreamLane(name, device)
