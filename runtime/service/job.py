"""What a caller holds of a job in a `runtime.service.scheduler.Scheduler`: its items as they come, its end, a way to
cancel it.

Its state belongs to the scheduler and is guarded by the scheduler's lock; readers only take items out of it. The clock
that deadlines go by is the scheduler's, too.
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

# How long a wait in the main thread may be at a time: Ctrl-C in the instant before one would not be seen until its end.
SIGNAL_SECONDS = 1.0

Item = TypeVar("Item")
Phase = Literal["waiting in line", "being prepared", "being served"]


class Job(Generic[Item]):
    """One job, for its callers: iterate over its items, or wait for its end. Any thread may call anything.

    Each item goes to one reader; those who wait for the next get it as soon as it exists. Made by `Scheduler.submit`.
    In a fork of the process every call but `abandon` raises `Closed`.
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
        self._submitted = self._since = scheduler._clock()  # `_since`: of the wait that it is in
        self._waited = 0.0
        self._deadline = deadline  # seconds since `_submitted`, or infinity

    def __iter__(self) -> Job[Item]:
        return self

    def __next__(self) -> Item:
        """The next item, waited for.

        Raises:
            StopIteration: the job was served to its end.
            BaseException: what ended it before that, after the items that came first.
        """
        self._scheduler.home.check()
        with self._scheduler._lock:
            self._wait(self._arrived, lambda: bool(self._items) or self._ended, None)
            if self._items:
                return self._items.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def poll(self) -> tuple[Item | None, bool]:
        """The next item if it is there, and whether the job was served to its end and all its items were read.

        Raises:
            BaseException: what ended it before that, after the items that came first.
        """
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
        """Within the block `listener` is called whenever there is one more item, or the end: from the thread that
        brings it and with the scheduler's lock held, so it must not wait nor call the job."""
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
        """Until its deadline, which may have passed; infinity without one."""
        return self._submitted + self._deadline - self._scheduler._clock()

    def last(self, timeout: float | None = None) -> Item | None:
        """Wait for the end; the last item (None if there was none), whether or not a reader has had it.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds (at once if they are 0 or fewer); it goes on.
            UserError: `timeout` is no number.
            BaseException: what ended it.
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
        """It has ended, in whichever way."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            return self._scheduler._is_over(self)

    def cancel(self) -> None:
        """End it with `Cancelled`, unless it has ended: at once for its readers and while it waits, within one item
        for the worker that serves it, at the next check for the one that prepares it. Items that nobody has read are
        dropped."""
        self._scheduler.home.check()
        with self._scheduler._lock:
            if not self._ended:
                self._items.clear()
                self._scheduler._end(self, Cancelled("this request was cancelled"))

    def abandon(self) -> None:
        """Cancel it from where no lock may be taken; nobody must wait for it any more. Its place in the line is free
        when the next job asks for one."""
        self._abandoned = True

    # With the lock held

    def _put(self, item: Item) -> None:
        """One more item for its readers."""
        self._last = item
        self._items.append(item)
        self._arrived.notify_all()
        self._tell()

    def _end(self, error: BaseException | None) -> None:
        """Its end, for the scheduler: it was served (None), or what its readers are told."""
        self._ended, self._error = True, error
        if self._phase == "waiting in line":  # else a worker is about to take it, and lets it go itself
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
