"""The caller's handle to a job of `runtime.service.scheduler.Scheduler`: its items as they come, its end, `cancel`.

The scheduler's lock guards a job's state, which the scheduler changes; readers only take items out. Deadlines go by the
scheduler's clock.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from earlytom.numbers import real
from runtime.errors import Cancelled

if TYPE_CHECKING:
    from runtime.service.line import Line

# The longest single wait in the main thread: Ctrl-C in the instant before a wait is seen only at its end.
SIGNAL_SECONDS = 1.0

Item = TypeVar("Item")
Phase = Literal["waiting in line", "being prepared", "being served"]


class Job(Generic[Item]):
    """One job: iterate over its items, or wait for its end. Every method is thread-safe; made by `Scheduler.submit`.

    Each item goes to one reader, as soon as it exists. In a fork of the process every call but `abandon` raises
    `Closed`.
    """

    def __init__(self, scheduler: Line[Any, Item], given: Any, deadline: float) -> None:
        self._scheduler = scheduler
        self._given, self._ready = given, cast(Any, None)
        self._arrived = threading.Condition(scheduler._lock)  # an item, or the end
        self._finished = threading.Condition(scheduler._lock)
        self._items: deque[Item] = deque()  # not read yet
        self._listeners: list[Callable[[], None]] = []
        self._last: Item | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._abandoned = False
        self._phase: Phase = "waiting in line"
        self._submitted = self._since = scheduler._clock()  # `_since`: start of the current wait
        self._waited = 0.0
        self._deadline = deadline  # seconds since `_submitted`, or infinity

    def __iter__(self) -> Job[Item]:
        return self

    def __next__(self) -> Item:
        """Wait for the next item; once they are all read, raise the error that ended the job, if any."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            self._wait(self._arrived, lambda: bool(self._items) or self._ended, None)
            if self._items:
                return self._items.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def poll(self) -> tuple[Item | None, bool]:
        """The next item if there is one, and whether the job has ended and all items are read; errors as `__next__`."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            over = self._scheduler._is_over(self)
            if self._items:
                return self._items.popleft(), False
            if over and self._error is not None:
                raise self._error
            return None, over

    @contextlib.contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Within the block, call `listener` at each new item and at the end: in the thread that brings it, with the
        scheduler's lock held, so that it must neither block nor call the job."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            if not self._scheduler.home.left:
                with self._scheduler._lock:
                    self._listeners.remove(listener)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, negative once it has passed; infinity without one."""
        return self._submitted + self._deadline - self._scheduler._clock()

    def last(self, timeout: float | None = None) -> Item | None:
        """Wait for the end; the last item, read or not, or None if there was none. Raises the error that ended the job.

        Raises:
            TimeoutError: not ended after `timeout` seconds (at once if 0 or fewer); the job goes on.
        """
        self._scheduler.home.check()
        if timeout is not None:
            timeout = real("timeout (seconds)", timeout)
        with self._scheduler._lock:
            self._wait(self._finished, lambda: self._ended, timeout)
            if self._error is not None:
                raise self._error
            return self._last

    @property
    def done(self) -> bool:
        """Whether the job has ended, in whichever way."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            return self._scheduler._is_over(self)

    def cancel(self) -> None:
        """End the job with `Cancelled`, unless it has ended: at once for its readers and while it is queued; the worker
        serving it stops after the current item, the one preparing it at its next check. Unread items are dropped."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            if not self._ended:
                self._items.clear()
                self._scheduler._end(self, Cancelled("this request was cancelled"))

    def abandon(self) -> None:
        """Cancel without a lock, once nobody waits for the job; its place in the queue is freed at the next submit."""
        self._abandoned = True

    # With the lock held

    def _put(self, item: Item) -> None:
        """One more item for its readers."""
        self._last = item
        self._items.append(item)
        self._arrived.notify_all()
        self._tell()

    def _end(self, error: BaseException | None) -> None:
        """End the job: served (None), or with the error that its readers get."""
        self._ended, self._error = True, error
        if self._phase == "waiting in line":  # else a worker has the job, and drops these itself
            self._given = self._ready = None
        self._arrived.notify_all()
        self._finished.notify_all()
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _wait(self, condition: threading.Condition, over: Callable[[], bool], timeout: float | None) -> None:
        """Wait on a condition until `over` or the deadline, which ends the job."""
        clock = self._scheduler._clock
        limit = math.inf if timeout is None else clock() + timeout
        most = SIGNAL_SECONDS if threading.current_thread() is threading.main_thread() else math.inf
        while not over() and not self._scheduler._is_over(self):
            now = clock()
            if now >= limit:
                raise TimeoutError(f"no answer within {timeout:g} s; the request goes on, ask for its result again")
            left = min(limit, self._submitted + self._deadline) - now
            condition.wait(None if min(left, most) == math.inf else min(left, most, threading.TIMEOUT_MAX))
