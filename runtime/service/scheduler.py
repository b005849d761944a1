"""A bounded queue of jobs and its worker threads: one prepares a job while another serves the one before it.

    scheduler = Scheduler(prepare, serve, waiting=8)
    job = scheduler.submit(given, deadline=2.0)
    for item in job: ...

`prepare(given, check)` prepares a job and may call `check()` at any time, which raises once nobody waits for the job;
`serve(turns)` takes up to `batch` prepared jobs and returns a generator of items (not None) for each, which are run one
after another, each to its end. Jobs are served in the order of submission; with several `lanes`, that many workers
serve different jobs. Items are buffered for their reader, so a slow or absent reader delays no other job.

A job ends in one of five ways, and its reader gets all earlier items first: served to the end, an error of `prepare` or
`serve` (the same exception), `Cancelled`, `DeadlineExceeded`, `Closed`. Workers check for an end before `prepare`, at
each `check()`, before serving and between items, never within a call. If a worker itself fails, outside those calls,
every job ends with `Closed`, and every later `submit` raises it.

It knows no tensors and no models. The states of jobs are in `runtime.service.line`, whose lock is never held while a
job runs. `Job.abandon` and `Scheduler.abandon`, which the garbage collector may call, take no lock: they may interrupt
a thread that holds it.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from earlytom.numbers import shown
from runtime.errors import Closed
from runtime.service.job import Item, Job
from runtime.service.line import Given, Line

EXIT_SECONDS = 10.0  # longest wait at interpreter exit for a worker's current call

Ready = TypeVar("Ready")


@dataclass(frozen=True)
class Turn(Generic[Ready]):
    """A prepared job whose turn has come.

    Attributes:
        ready: what `prepare` returned.
        submitted: time of submission, by the scheduler's clock.
        waited: seconds since then without those of `prepare`.
    """

    ready: Ready
    submitted: float
    waited: float


class UnwantedError(Exception):
    """Raised by `check()`: the job has ended, or is about to. Its reader gets the reason instead of this."""


class Scheduler(Line[Given, Item], Generic[Given, Ready, Item]):
    """The queue and its workers, daemon threads that start at once.

    Args:
        prepare: called in one thread with the submitted value and the job's `check`, which takes no lock; up to `batch`
            jobs are prepared ahead of those being served.
        serve: called in another thread, which also runs the generators that it returns, one for each turn. If it
            raises, all its jobs end with that error. With several lanes it is called from that many threads.
        waiting: jobs that may wait besides those being served.
        batch: the most prepared jobs of one call of `serve`, which gets those that are ready.
        lanes: jobs that may be served concurrently.
        clock: returns seconds.
    """

    def __init__(
        self,
        prepare: Callable[[Given, Callable[[], None]], Ready],
        serve: Callable[[Sequence[Turn[Ready]]], Sequence[Generator[Item, None, Any]]],
        *,
        waiting: int,
        batch: int = 1,
        lanes: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(waiting, batch, lanes, clock)
        self._prepare, self._serve = prepare, serve
        loops = [("prepare", self._prepare_all), *[("serve", self._serve_all)] * lanes]
        self._workers = [
            threading.Thread(target=self._work, args=(loop, bell), name=f"earlytom-{name}", daemon=True)
            for (name, loop), bell in zip(loops, self._bells, strict=True)
        ]
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:  # a thread could not start: those that did must end
            self.abandon()
            raise
        _running.add(self)

    def close(self, *, drain: bool = False) -> None:
        """Take no more jobs, and return when the workers have ended.

        Jobs being served are served to their end; with `drain` so are all others, else they end with `Closed`. May be
        called repeatedly, from any thread; one call without `drain` ends the queue for all of them.
        """
        if not self.home.left:
            self._shut(drain=drain, abort=False)
            self._join(None)

    def abort(self, timeout: float | None = None) -> None:
        """`close`, but jobs being served end with `Closed` before their next item.

        Args:
            timeout: seconds to wait for each worker, which may be in a long call.
        """
        if not self.home.left:
            self._shut(drain=False, abort=True)
            self._join(timeout)

    def abandon(self) -> None:
        """`abort` without taking a lock or waiting, for a finalizer."""
        self._abandoned = True
        self._ring()

    def _shut(self, *, drain: bool, abort: bool) -> None:
        with self._lock:
            self._closing = True
            self._aborting |= abort
            if not drain:
                self._end_line()
        self._ring()

    def _join(self, timeout: float | None) -> None:
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(EXIT_SECONDS if timeout is None and self._unheard else timeout)

    # All workers

    def _work(self, loop: Callable[[SimpleQueue[None]], None], bell: SimpleQueue[None]) -> None:
        try:
            loop(bell)
        except BaseException as error:  # an error of the loop itself: those of `prepare` and `serve` end their jobs
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """End all jobs after a worker's failure, without calling anything that may have failed."""
        reason = f"a worker of this pipeline failed with {shown(error)}: load another one, and report this"
        with self._lock:
            self._closing = self._aborting = True
            self._broken = self._broken or reason
            for job in self._open:
                closed = Closed(reason)
                closed.__cause__ = error
                job._end(closed)
            self._open.clear()
            self._line.clear()
            self._prepared.clear()
        try:
            for bell in self._bells:
                bell.put(None)
        except BaseException:
            self._unheard = True

    def _check(self, job: Job[Item]) -> Callable[[], None]:
        """A job's `check`: raises `UnwantedError` once nobody waits for it. Called per packet, so without a lock."""
        clock, limit = self._clock, job._submitted + job._deadline
        found = weakref.ref(job)  # avoids a cycle: the job's error holds stack frames that hold this function

        def check() -> None:
            job = found()
            if job is None or job._ended or job._abandoned or self._abandoned or clock() >= limit:
                raise UnwantedError

        return check

    # The worker that prepares

    def _prepare_all(self, bell: SimpleQueue[None]) -> None:
        while (job := self._next_in_line(bell)) is not None:
            self._prepare_one(job)
            del job  # else it would be kept alive until the next one

    def _next_in_line(self, bell: SimpleQueue[None]) -> Job[Item] | None:
        """Wait for the next job to prepare; None when there will be none."""
        while True:
            _hush(bell)
            with self._lock:
                self._sweep()
                if self._line and len(self._prepared) < self.batch:
                    job = self._preparing = self._line.popleft()
                    job._phase = "being prepared"
                    job._waited += self._clock() - job._since
                    return job
                if self._closing and not self._line:
                    return None
            bell.get()

    def _prepare_one(self, job: Job[Item]) -> None:
        ready: Ready | None = None
        error: BaseException | None = None
        try:
            ready = self._prepare(job._given, self._check(job))
        except BaseException as caught:
            error = caught
        with self._lock:
            self._sweep()  # first: after an `UnwantedError` this ends the job with the actual reason
            self._preparing = job._given = None
            if error is not None:
                self._end(job, error)
            elif not job._ended:
                job._ready = ready
                job._phase, job._since = "waiting in line", self._clock()
                self._prepared.append(job)
        self._ring()
        # A job's error holds its stack frames, and they this one: the cycle would live until a garbage collection.
        del job, ready, error

    # The workers that serve

    def _serve_all(self, bell: SimpleQueue[None]) -> None:
        while group := self._next_prepared(bell):
            self._serve_group(group)
            del group

    def _next_prepared(self, bell: SimpleQueue[None]) -> list[Job[Item]]:
        """Wait for the next jobs to serve; an empty list when there will be none."""
        while True:
            _hush(bell)
            with self._lock:
                self._sweep()
                if self._prepared:
                    group = [self._prepared.popleft() for _ in range(min(self.batch, len(self._prepared)))]
                    for job in group:
                        job._phase = "being served"
                        job._waited += self._clock() - job._since
                    self._group += group
                    self._serving.add(group[0])
                    break
                if self._closing and not self._line and (self._preparing is None or self._broken is not None):
                    return []
            bell.get()
        self._ring()  # another job may be prepared
        return group

    def _serve_group(self, group: list[Job[Item]]) -> None:
        try:
            streams = self._begin(group)
        except BaseException as error:
            with self._lock:
                for one in group:
                    self._group.remove(one)
                    self._serving.discard(one)
                    self._end(one, error)
                    del one
        else:
            for number, stream in enumerate(streams):
                self._serve_one(group[number], stream)
                del stream
        finally:
            del group  # as in `_prepare_one`

    def _begin(self, group: list[Job[Item]]) -> list[Generator[Item, None, Any]]:
        """Call `serve`; from here on only the generators hold the prepared values."""
        turns = [Turn(job._ready, job._submitted, job._waited) for job in group]
        for job in group:
            job._ready = None
        try:
            streams = list(self._serve(turns))
            if len(streams) != len(group):
                raise ValueError(f"serve was given {len(group)} turns and returned {len(streams)} generators")
            return streams
        finally:
            del group, job, turns

    def _serve_one(self, job: Job[Item], stream: Generator[Item, None, Any]) -> None:
        with self._lock:
            self._serving.add(job)
        error: BaseException | None = None
        item: Item | None = None
        try:
            while error is None and self._goes_on(job, item):
                try:
                    item = next(stream)
                except BaseException as caught:
                    error = caught
        finally:
            item = None
            try:
                stream.close()
            except BaseException as caught:
                error = caught
        with self._lock:  # in one step, so that a caller with the answer finds the place free
            self._group.remove(job)
            self._serving.remove(job)
            self._end(job, None if isinstance(error, StopIteration) else error)
        del job, error

    def _goes_on(self, job: Job[Item], item: Item | None = None) -> bool:
        """Hand a job its new item, if any, unless the job has ended; returns whether it goes on."""
        with self._lock:
            if self._aborting or self._abandoned:
                self._end(job, Closed("this pipeline was closed while the request was answered"))
            if self._is_over(job):
                return False
            if item is not None:
                job._put(item)
            return True


def _hush(bell: SimpleQueue[None]) -> None:
    """Empty a bell's queue before looking for work: while a worker is busy, rings pile up."""
    with contextlib.suppress(Empty):
        while True:
            bell.get_nowait()


_running: weakref.WeakSet[Scheduler[Any, Any, Any]] = weakref.WeakSet()


@atexit.register
def _abort_all() -> None:
    """End all workers before interpreter shutdown: a thread still in a library's code could crash the process."""
    for scheduler in list(_running):
        scheduler.abort(EXIT_SECONDS)
