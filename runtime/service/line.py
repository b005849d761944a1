"""The queue of a scheduler: its jobs, the state of each, and how each ends.

A job is queued, being prepared, prepared, or being served; until it ends it takes one of `waiting + lanes` places.
Every change of state rings the bells that the workers of `runtime.service.scheduler` wait for. One lock guards
everything; it is held for a few instructions at a time.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from earlytom.numbers import real, whole
from runtime.errors import Cancelled, Closed, DeadlineExceeded, Overloaded
from runtime.forks import Home
from runtime.service.job import Item, Job

Given = TypeVar("Given")


class Line(Generic[Given, Item]):
    """The queue without its workers; arguments as of `Scheduler`."""

    def __init__(self, waiting: int, batch: int, lanes: int, clock: Callable[[], float]) -> None:
        waiting = whole("waiting", waiting, 0)
        for name, number in (("batch", batch), ("lanes", lanes)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.waiting, self.batch, self.lanes = waiting, batch, lanes
        self._clock = clock
        self.home = Home("this pipeline")
        self._lock = threading.Lock()
        self._open: set[Job[Item]] = set()  # jobs that have not ended, in any state
        self._line: deque[Job[Item]] = deque()
        self._preparing: Job[Item] | None = None
        self._prepared: deque[Job[Item]] = deque()
        self._group: list[Job[Item]] = []  # given to `serve`, not finished yet
        self._serving: set[Job[Item]] = set()  # jobs of `_group` that a worker is running
        self._closing = self._aborting = self._abandoned = False
        self._broken: str | None = None  # why all workers have stopped
        self._unheard = False  # a bell could not be rung, so a worker may still sleep
        # Rung when something has changed for a worker. Queues, not conditions, so that a finalizer may ring them.
        self._bells: tuple[SimpleQueue[None], ...] = tuple(SimpleQueue() for _ in range(1 + lanes))

    def submit(self, given: Given, *, deadline: float | None = None) -> Job[Item]:
        """Queue a job.

        Args:
            given: for `prepare`; dropped once the job is prepared or has ended.
            deadline: seconds from now after which the job ends with `DeadlineExceeded`.

        Raises:
            Overloaded: the queue is full.
            Closed: no more jobs are taken, or this is a fork of the process that has the workers.
            UserError: a deadline that is not a positive number.
        """
        seconds = _seconds(deadline)
        self.home.check()
        with self._lock:
            self._admit()
            job: Job[Item] = Job(self, given, seconds)
            self._ring()  # first: if it fails nothing has changed, and a woken worker waits for the lock
            self._line.append(job)
            self._open.add(job)
        return job

    def check_room(self, deadline: float | None = None) -> None:
        """Raise what `submit` would raise now; to call before costly work."""
        _seconds(deadline)
        self.home.check()
        with self._lock:
            self._admit()

    @property
    def running(self) -> int:
        """Number of unfinished jobs given to `serve`."""
        return len(self._places()[0])

    @property
    def queued(self) -> int:
        """Number of jobs queued, being prepared, or prepared."""
        return len(self._places()[1])

    def _places(self) -> tuple[list[Job[Item]], list[Job[Item]]]:
        """Jobs given to `serve`, and the others."""
        self.home.check()
        with self._lock:
            self._sweep()
            taken = [job for job in self._jobs() if job in self._serving or not job._ended]
            running = [job for job in taken if job in self._group]
            return running, [job for job in taken if job not in running]

    def _ring(self) -> None:
        for bell in self._bells:
            bell.put(None)

    # With the lock held

    def _admit(self) -> None:
        """Raise unless one more job may come."""
        self._sweep()
        if self._closing:
            raise Closed(self._broken or "this pipeline is closed: load another one")
        if (occupied := self._occupied()) >= self.waiting + self.lanes:
            answered = "one that is answered" if self.lanes == 1 else f"{self.lanes} that are answered"
            raise Overloaded(
                f"{occupied} requests are unanswered, and the limit is {answered} and {self.waiting} "
                f"that wait: try again when one has ended, or raise the limit with Pipeline.load(waiting=...)"
            )

    def _occupied(self) -> int:
        """Places taken. A job that has ended keeps its place only while a worker still runs it."""
        return sum(job in self._serving or not job._ended for job in self._jobs())

    def _sweep(self) -> None:
        """End jobs that are abandoned or past their deadline, and all queued ones if the scheduler is abandoned."""
        if self._abandoned:
            self._closing = self._aborting = True
            self._end_line()
        for job in self._jobs():
            self._is_over(job)

    def _jobs(self) -> list[Job[Item]]:
        preparing = [] if self._preparing is None else [self._preparing]
        return [*self._group, *self._prepared, *preparing, *self._line]

    def _end_line(self) -> None:
        """End every job that is not being served."""
        for job in self._jobs():
            if job not in self._serving:
                self._end(job, Closed("this pipeline was closed before the request was answered"))

    def _is_over(self, job: Job[Item]) -> bool:
        """Whether a job has ended; one that is abandoned or past its deadline is ended here."""
        if job._ended:
            return True
        if job._abandoned:
            self._end(job, Cancelled("this request was cancelled: nobody reads it any more"))
        elif self._clock() >= job._submitted + job._deadline:
            self._end(
                job,
                DeadlineExceeded(
                    f"the request was {job._phase} when its deadline of {job._deadline:g} s passed: give it more time, "
                    "or send fewer at once"
                ),
            )
        return job._ended

    def _end(self, job: Job[Item], error: BaseException | None) -> None:
        """End a job, unless it has ended."""
        if job._ended:
            return
        job._end(error)
        self._open.discard(job)
        for line in (self._line, self._prepared):
            if job in line:
                line.remove(job)
        self._ring()


def _seconds(deadline: float | None) -> float:
    return math.inf if deadline is None else real("deadline (seconds)", deadline, 0, low_open=True)
