"""Threads that do the most urgent of what is asked of them first."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class ThreadPool:
    """As `concurrent.futures.ThreadPoolExecutor`, but that what is urgent overtakes what is not and has not begun.

    There is no lock that a thread could hold when the garbage collector comes by in it and ends the pool.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: tuple[deque, deque] = deque(), deque()  # urgent, others
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True for a job, False for the end of a thread
        # Daemons, since the interpreter waits for others before it runs the finalizers, one of which ends these.
        self._threads = [
            threading.Thread(target=_serve, args=(self._tokens, *self._jobs), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None], urgent: bool) -> Future:
        future: Future = Future()
        self._jobs[0 if urgent else 1].append((work, future))
        self._tokens.put(True)
        return future

    def shutdown(self) -> None:
        """What was submitted is done first, and waited for unless the caller is one of the threads."""
        for _ in self._threads:
            self._tokens.put(False)
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()


def _serve(tokens: queue.SimpleQueue, urgent: deque, others: deque) -> None:
    while tokens.get():
        try:
            work, future = urgent.popleft()
        except IndexError:
            work, future = others.popleft()
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # handed to the waiter, who is on another thread
            future.set_exception(error)
        del work, future  # kept here, they would keep what they use alive while the thread is idle
