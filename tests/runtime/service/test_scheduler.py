"""The line of jobs, with stages that stop where a test wants them to: nothing here depends on how fast anything is."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.errors import Cancelled, Closed, DeadlineExceeded, Overloaded
from runtime.service.job import Job
from runtime.service.scheduler import Scheduler, Turn
from tests.processes import HANG_SECONDS as LONG
from tests.runtime.service.callers import Caller


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """What one job is to do. With `held`, its preparation waits for `may_prepare`, each of its items for a `step`."""

    def __init__(
        self,
        name: str = "a",
        *,
        items: int = 3,
        held: str = "",
        fails: BaseException | None = None,
        fails_at: int | None = None,
    ) -> None:
        self.name, self.items, self.fails, self.fails_at = name, items, fails, fails_at
        self.may_prepare, self.steps = threading.Event(), threading.Semaphore(0)
        self.preparing, self.serving, self.through = threading.Event(), threading.Event(), threading.Event()
        self.turn: tuple[float, float] | None = None
        self.made = 0
        if held != "prepare":
            self.may_prepare.set()
        if held != "serve":
            self.step(items)

    def step(self, items: int = 1) -> None:
        for _ in range(items):
            self.steps.release()

    def let_go(self) -> None:
        self.may_prepare.set()
        self.step(self.items)

    def failure(self) -> BaseException:
        """Once: an error that is kept knows the frames that it went through, and they know the work."""
        error, self.fails = self.fails, None
        assert error is not None
        return error

    @property
    def expected(self) -> list[str]:
        return [f"{self.name}{index}" for index in range(self.items)]


class Stages:
    """`prepare` and `serve` of a scheduler, and a log of what they did."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.groups: list[list[str]] = []
        self.serve_fails: BaseException | None = None

    def prepare(self, work: Work, check: Callable[[], None]) -> Work:
        self.log.append(("prepare", work.name))
        work.preparing.set()
        assert work.may_prepare.wait(LONG)
        if work.fails is not None and work.fails_at is None:
            raise work.failure()
        return work

    def serve(self, turns: Sequence[Turn[Work]]) -> list[Generator[str, None, None]]:
        self.groups.append([turn.ready.name for turn in turns])
        if self.serve_fails is not None:
            raise self.serve_fails
        return [self.run(turn) for turn in turns]

    def run(self, turn: Turn[Work]) -> Generator[str, None, None]:
        work = turn.ready
        work.turn = (turn.submitted, turn.waited)
        self.log.append(("serve", work.name))
        try:
            for index in range(work.items):
                work.serving.set()
                assert work.steps.acquire(timeout=LONG)
                if work.fails is not None and work.fails_at == index:
                    raise work.failure()
                work.made += 1
                yield f"{work.name}{index}"
        finally:
            self.log.append(("through", work.name))
            work.through.set()


class Bench:
    """Schedulers of one test; what still runs at its end is let go, and no thread may be left."""

    def __init__(self) -> None:
        self.stages, self.clock = Stages(), Clock()
        self.made: list[Scheduler[Any, Any, Any]] = []
        self.works: list[weakref.ref[Work]] = []

    def scheduler(
        self, waiting: int = 8, *, batch: int = 1, lanes: int = 1, real: bool = False
    ) -> Scheduler[Work, Work, str]:
        clock: dict[str, Any] = {} if real else {"clock": self.clock}
        made = Scheduler(self.stages.prepare, self.stages.serve, waiting=waiting, batch=batch, lanes=lanes, **clock)
        self.made.append(made)
        return made

    def work(self, *args: Any, **how: Any) -> Work:
        made = Work(*args, **how)
        self.works.append(weakref.ref(made))
        return made

    def served(self, scheduler: Scheduler[Work, Work, str], **how: Any) -> tuple[Work, Job[str]]:
        """A job that has the worker and stops before its first item."""
        work = self.work("first", held="serve", **how)
        job = scheduler.submit(work)
        assert work.serving.wait(LONG)
        return work, job


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for one in made.works:
        if (work := one()) is not None:
            work.let_go()
    for scheduler in made.made:
        scheduler.abort(LONG)
        assert not any(worker.is_alive() for worker in scheduler._workers)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event of its own."""
    tick = threading.Event()
    for _ in range(int(LONG * 1000)):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("it did not happen")


# The course of a job


def test_a_job_s_items_come_in_order(bench: Bench) -> None:
    job = bench.scheduler().submit(bench.work("a", items=4))
    assert list(job) == ["a0", "a1", "a2", "a3"]
    assert job.done
    assert job.last() == "a3"
    assert list(job) == []  # each item goes to one reader, and the end stays the end


def test_the_end_can_be_waited_for_before_the_items_are_read(bench: Bench) -> None:
    job = bench.scheduler().submit(bench.work("a"))
    assert job.last() == "a2"
    assert list(job) == ["a0", "a1", "a2"]


def test_a_job_without_items(bench: Bench) -> None:
    job = bench.scheduler().submit(bench.work(items=0))
    assert job.last() is None
    assert list(job) == []


def test_an_item_is_there_before_the_next_is_made(bench: Bench) -> None:
    work, job = bench.served(bench.scheduler())
    work.step()
    assert next(job) == "first0"
    assert work.made == 1
    assert not job.done


def test_the_next_job_is_prepared_while_one_is_served_and_only_that_one(bench: Bench) -> None:
    scheduler = bench.scheduler()
    first, job = bench.served(scheduler)
    second, third = bench.work("second"), bench.work("third")
    jobs = [scheduler.submit(second), scheduler.submit(third)]
    assert second.preparing.wait(LONG)  # by an event: the first cannot have ended
    assert not job.done
    first.let_go()
    assert [each.last() for each in jobs] == ["second2", "third2"]
    log = bench.stages.log
    assert log.index(("prepare", "second")) < log.index(("through", "first")) < log.index(("prepare", "third"))


def test_jobs_are_served_in_the_order_in_which_they_came(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=30)
    works = [bench.work(f"{n}.") for n in range(20)]
    jobs = [scheduler.submit(work) for work in works]
    for job, work in reversed(list(zip(jobs, works, strict=True))):  # whoever reads first
        assert list(job) == work.expected
    for what in ("prepare", "serve"):
        assert [name for kind, name in bench.stages.log if kind == what] == [work.name for work in works]


def test_a_job_knows_how_long_it_was_in_line(bench: Bench) -> None:
    """Submitted at 1; in line until 5, prepared until 7, in line until 10."""
    scheduler = bench.scheduler()
    first, second = bench.work("first", held="prepare"), bench.work("second", held="prepare")
    first.steps.acquire()  # it is held when it is served, too: one item is missing
    scheduler.submit(first)
    bench.clock.now = 1
    job = scheduler.submit(second)
    assert first.preparing.wait(LONG)
    bench.clock.now = 5
    first.may_prepare.set()
    assert second.preparing.wait(LONG)
    assert first.serving.wait(LONG)
    bench.clock.now = 7
    second.may_prepare.set()
    until(lambda: len(scheduler._prepared) == 1)
    bench.clock.now = 10
    first.step()
    job.last()
    assert second.turn == (1, 4 + 3)


def test_many_callers_get_their_own_answers(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=15, real=True)

    def call(caller: int) -> list[list[str]]:
        return [list(scheduler.submit(bench.work(f"{caller}.{turn}."))) for turn in range(20)]

    callers = [Caller(lambda n=n: call(n)) for n in range(16)]  # type: ignore[misc]
    for n, caller in enumerate(callers):
        assert caller.outcome() == [[f"{n}.{turn}.{item}" for item in range(3)] for turn in range(20)]


def test_several_readers_of_one_job_share_its_items(bench: Bench) -> None:
    work, job = bench.served(bench.scheduler(), items=50)
    readers = [Caller(lambda: list(job)) for _ in range(4)]
    waiter = Caller(job.last)
    work.let_go()
    assert sorted(item for reader in readers for item in reader.outcome()) == sorted(work.expected)
    assert waiter.outcome() == "first49"


def test_a_reader_that_never_comes_holds_up_nobody(bench: Bench) -> None:
    scheduler = bench.scheduler()
    ignored = scheduler.submit(bench.work("ignored", items=1000))
    assert list(scheduler.submit(bench.work("a"))) == ["a0", "a1", "a2"]
    assert ignored.done


def test_whoever_has_the_answer_finds_the_place_free(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=0, real=True)
    for turn in range(200):
        job = scheduler.submit(bench.work(items=1, fails=ValueError("no") if turn % 3 == 2 else None))
        if turn % 3 == 0:
            job.last()
        elif turn % 3 == 1:
            list(job)
        else:
            with pytest.raises(ValueError, match="no"):
                job.last()


# Back-pressure


@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_a_full_line_refuses_in_one_line(bench: Bench, waiting: int) -> None:
    scheduler = bench.scheduler(waiting)
    first, job = bench.served(scheduler)
    jobs = [job, *(scheduler.submit(bench.work()) for _ in range(waiting))]
    with pytest.raises(Overloaded, match=rf"^{waiting + 1} requests .* {waiting} that wait: try again .*waiting=") as e:
        scheduler.submit(bench.work())
    assert "\n" not in str(e.value)
    assert isinstance(e.value, UserError)
    first.let_go()
    for job in jobs:
        job.last()
    scheduler.submit(bench.work()).last()


def test_values_that_make_no_sense(bench: Bench) -> None:
    with pytest.raises(UserError, match="waiting must be a whole number of at least 0, got -1"):
        bench.scheduler(-1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        bench.scheduler(batch=0)
    scheduler = bench.scheduler()
    for deadline in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"deadline \(seconds\) must be above 0, got"):
            scheduler.submit(bench.work(), deadline=deadline)
    assert bench.stages.log == []


# Deadlines


def test_a_deadline_that_is_met_changes_nothing(bench: Bench) -> None:
    """Negative control of those below: one second before it."""
    scheduler = bench.scheduler()
    work = bench.work("a", held="serve")
    job = scheduler.submit(work, deadline=10)
    bench.clock.now = 9
    work.let_go()
    assert list(job) == work.expected
    bench.clock.now = 99  # over in time, however late it is looked at
    assert job.last() == "a2"


def test_a_deadline_in_line_frees_the_place_at_once(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=1)
    first, _ = bench.served(scheduler)
    blocker = bench.work("late", held="prepare")
    job = scheduler.submit(blocker, deadline=10)
    with pytest.raises(Overloaded):
        scheduler.submit(bench.work())
    bench.clock.now = 10
    other = scheduler.submit(bench.work("other"))  # nobody has looked at the late one
    assert job.done
    with pytest.raises(DeadlineExceeded, match=r"deadline of 10 s passed.*more time") as caught:
        job.last()
    assert "\n" not in str(caught.value)
    blocker.let_go()
    first.let_go()
    assert other.last() == "other2"
    assert ("serve", "late") not in bench.stages.log


def test_a_deadline_before_the_preparation(bench: Bench) -> None:
    scheduler = bench.scheduler()
    first = bench.work("first", held="prepare")
    scheduler.submit(first)
    assert first.preparing.wait(LONG)
    late, last = scheduler.submit(bench.work("late"), deadline=1), scheduler.submit(bench.work("last"))
    bench.clock.now = 2
    first.let_go()
    assert last.last() == "last2"
    with pytest.raises(DeadlineExceeded, match="was waiting in line"):
        next(late)
    assert ("prepare", "late") not in bench.stages.log


def test_a_deadline_during_the_preparation(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work("late", held="prepare")
    job = scheduler.submit(work, deadline=10)
    assert work.preparing.wait(LONG)
    bench.clock.now = 11
    with pytest.raises(DeadlineExceeded, match="was being prepared"):
        next(job)  # at once: the preparation still runs
    work.let_go()
    assert scheduler.submit(bench.work("b")).last() == "b2"
    assert ("serve", "late") not in bench.stages.log


@pytest.mark.parametrize("read", [True, False])
def test_a_deadline_between_two_items(bench: Bench, read: bool) -> None:
    """Whether or not somebody reads; what came in time can be read."""
    scheduler = bench.scheduler()
    work = bench.work("late", held="serve")
    job = scheduler.submit(work, deadline=10)
    work.step()
    until(lambda: work.made == 1)
    assert work.serving.wait(LONG)
    until(lambda: len(job._items) == 1)
    bench.clock.now = 11
    if read:
        assert next(job) == "late0"
        with pytest.raises(DeadlineExceeded, match="was being served"):
            next(job)
    work.step()
    assert work.through.wait(LONG)
    assert work.made == 2  # the one that was under way, and it is not delivered
    assert scheduler.submit(bench.work("b")).last() == "b2"
    if not read:
        assert next(job) == "late0"
        with pytest.raises(DeadlineExceeded, match="was being served"):
            next(job)


@pytest.mark.parametrize("held", ["prepare", "serve"])
def test_a_caller_that_waits_is_told_when_the_deadline_comes(bench: Bench, held: str) -> None:
    """By the real clock; the stage never ends by itself."""
    job = bench.scheduler(real=True).submit(bench.work(held=held), deadline=0.05)
    readers = [Caller(lambda: next(job)), Caller(job.last), Caller(lambda: job.last(LONG))]
    assert [type(reader.outcome()) for reader in readers] == [DeadlineExceeded] * 3


def test_a_timeout_of_the_caller_is_not_the_job_s_end(bench: Bench) -> None:
    work, job = bench.served(bench.scheduler(real=True))
    with pytest.raises(TimeoutError, match=r"within 0\.01 s; the request goes on"):
        job.last(0.01)
    with pytest.raises(TimeoutError):
        job.last(0)
    work.let_go()
    assert job.last(LONG) == "first2"
    assert job.last(0) == "first2"


# Cancelling


def test_cancelling_in_line_frees_the_place_at_once(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=2)
    first, _ = bench.served(scheduler)
    prepared, queued = bench.work("prepared"), bench.work("queued")
    jobs = [scheduler.submit(prepared), scheduler.submit(queued)]
    until(lambda: len(scheduler._prepared) == 1)
    readers = [Caller(lambda job=job: next(job)) for job in jobs]  # type: ignore[misc]
    with pytest.raises(Overloaded):
        scheduler.submit(bench.work())
    for job in jobs:
        job.cancel()
        assert job.done
    assert [type(reader.outcome()) for reader in readers] == [Cancelled] * 2  # while the first is still served
    others = [scheduler.submit(bench.work(name)) for name in "bc"]
    first.let_go()
    assert [job.last() for job in others] == ["b2", "c2"]
    assert not {("serve", "prepared"), ("serve", "queued"), ("prepare", "queued")} & set(bench.stages.log)


def test_cancelling_during_the_preparation(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=0)
    work = bench.work("gone", held="prepare")
    job = scheduler.submit(work)
    assert work.preparing.wait(LONG)
    job.cancel()
    with pytest.raises(Cancelled):
        job.last()
    other = scheduler.submit(bench.work("b"))  # there is one place, and it is free
    work.let_go()
    assert other.last() == "b2"
    assert ("serve", "gone") not in bench.stages.log


def test_cancelling_while_served_frees_the_worker_within_an_item(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=1)
    work, job = bench.served(scheduler)
    work.step()
    reader = Caller(lambda: [next(job), next(job)])
    until(lambda: work.made == 1 and not job._items)
    job.cancel()
    assert isinstance(reader.outcome(), Cancelled)  # at once: the worker is held
    other = bench.work("other")
    waits = scheduler.submit(other)
    with pytest.raises(Overloaded):  # the worker is not free yet, so its place is not
        scheduler.submit(bench.work())
    work.step()
    assert waits.last() == "other2"
    assert (work.made, work.through.is_set()) == (2, True)
    with pytest.raises(Cancelled):
        next(job)


def test_cancelling_drops_what_nobody_has_read(bench: Bench) -> None:
    work, job = bench.served(bench.scheduler())
    work.step(2)
    until(lambda: len(job._items) == 2)
    job.cancel()
    with pytest.raises(Cancelled):
        next(job)


def test_cancelling_after_the_end_changes_nothing(bench: Bench) -> None:
    job = bench.scheduler().submit(bench.work("a"))
    job.last()
    job.cancel()
    assert list(job) == ["a0", "a1", "a2"]
    assert job.last() == "a2"


def test_an_abandoned_job_gives_its_place_back(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=1)
    work, job = bench.served(scheduler)
    waits = scheduler.submit(bench.work("waits", held="prepare"))
    waits.abandon()
    other = scheduler.submit(bench.work("other"))
    job.abandon()
    for one in bench.works:
        if (each := one()) is not None:
            each.may_prepare.set()
    work.step()
    assert other.last() == "other2"
    assert work.made == 1
    assert ("serve", "waits") not in bench.stages.log


def test_abandoning_takes_no_lock(bench: Bench) -> None:
    """As the garbage collector may interrupt a thread that holds it."""
    scheduler = bench.scheduler()
    _, job = bench.served(scheduler)
    with scheduler._lock:
        for call in (job.abandon, scheduler.abandon):
            assert Caller(call).outcome() is None


# Errors


class OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", [OwnError, UserError, MemoryError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [None, 0, 2])
def test_an_error_reaches_its_caller_and_no_other(
    bench: Bench, kind: type[BaseException], fails_at: int | None
) -> None:
    scheduler = bench.scheduler()
    first, _ = bench.served(scheduler)
    error = kind("it went wrong")
    bad = scheduler.submit(bench.work("bad", fails=error, fails_at=fails_at))
    good = scheduler.submit(bench.work("good"))
    first.let_go()
    assert [next(bad) for _ in range(fails_at or 0)] == ["bad0", "bad1", "bad2"][: fails_at or 0]
    with pytest.raises(kind, match="it went wrong") as caught:
        next(bad)
    assert caught.value is error
    with pytest.raises(kind):
        bad.last()
    assert good.last() == "good2"


def test_an_error_at_the_begin_of_serving(bench: Bench) -> None:
    scheduler = bench.scheduler()
    bench.stages.serve_fails = OwnError("no engine")
    with pytest.raises(OwnError, match="no engine"):
        scheduler.submit(bench.work("bad")).last()
    bench.stages.serve_fails = None
    assert scheduler.submit(bench.work("good")).last() == "good2"


def test_stages_that_break_their_promise_are_an_error_of_the_job() -> None:
    scheduler: Scheduler[int, int, int] = Scheduler(lambda given, check: given, lambda turns: [], waiting=1)
    with pytest.raises(ValueError, match="1 turns and returned 0"):
        scheduler.submit(1).last(LONG)
    with pytest.raises(ValueError, match="1 turns and returned 0"):
        scheduler.submit(1).last(LONG)
    scheduler.close()


# Groups


def group_of_three(bench: Bench) -> tuple[Scheduler[Work, Work, str], Work, list[Work], list[Job[str]]]:
    """A job that is served, and four behind it, of which three are prepared."""
    scheduler = bench.scheduler(batch=3)
    first, _ = bench.served(scheduler)
    works = [bench.work(name, held="serve") for name in "bcde"]
    jobs = [scheduler.submit(work) for work in works]
    until(lambda: len(scheduler._prepared) == 3)
    return scheduler, first, works, jobs


def test_jobs_that_are_ready_are_served_together_and_in_order(bench: Bench) -> None:
    _, first, works, jobs = group_of_three(bench)
    assert not works[3].preparing.is_set()  # no more are prepared ahead than one call takes
    for work in (first, *works):
        work.let_go()
    for job, work in zip(jobs, works, strict=True):
        assert list(job) == work.expected
    assert bench.stages.groups == [["first"], ["b", "c", "d"], ["e"]]
    assert [name for kind, name in bench.stages.log if kind == "serve"] == ["first", *"bcde"]


def test_an_error_of_one_does_not_end_the_others_of_its_group(bench: Bench) -> None:
    _, first, works, jobs = group_of_three(bench)
    works[0].fails, works[0].fails_at = OwnError("b"), 1
    jobs[1].cancel()
    for work in (first, *works):
        work.let_go()
    with pytest.raises(OwnError):
        jobs[0].last()
    with pytest.raises(Cancelled):
        jobs[1].last()
    assert [job.last() for job in jobs[2:]] == ["d2", "e2"]


def test_one_of_a_group_may_be_cancelled_while_another_is_served(bench: Bench) -> None:
    _, first, works, jobs = group_of_three(bench)
    first.let_go()
    assert works[0].serving.wait(LONG)
    jobs[1].cancel()
    for work in works:
        work.let_go()
    assert [jobs[n].last() for n in (0, 2, 3)] == ["b2", "d2", "e2"]
    assert works[1].made == 0


def test_an_error_at_the_begin_ends_the_group(bench: Bench) -> None:
    _, first, works, jobs = group_of_three(bench)
    bench.stages.serve_fails = OwnError("no engine")
    for work in (first, *works):
        work.let_go()
    for job in jobs:
        with pytest.raises(OwnError):
            job.last()


def lanes_of_two(bench: Bench) -> tuple[Scheduler[Work, Work, str], list[Work], list[Job[str]]]:
    """Two that have a worker each, and two behind them."""
    scheduler = bench.scheduler(waiting=2, lanes=2)
    works = [bench.work(name, held="serve") for name in "abcd"]
    jobs = [scheduler.submit(work) for work in works]
    assert all(work.serving.wait(LONG) for work in works[:2])
    return scheduler, works, jobs


def test_as_many_are_served_at_a_time_as_there_are_lanes(bench: Bench) -> None:
    scheduler, works, jobs = lanes_of_two(bench)
    assert (scheduler.running, scheduler.queued) == (2, 2)
    with pytest.raises(Overloaded, match=r"4 requests are unanswered, .* 2 that are answered and 2 that wait"):
        scheduler.submit(bench.work("e"))
    works[1].let_go()  # who comes later may end sooner, and the next takes its place
    assert list(jobs[1]) == works[1].expected
    assert works[2].serving.wait(LONG)
    assert not works[0].through.is_set()
    assert not works[3].serving.is_set()
    for work in works:
        work.let_go()
    assert [list(job) for job in jobs if job is not jobs[1]] == [works[n].expected for n in (0, 2, 3)]
    assert (scheduler.running, scheduler.queued) == (0, 0)


def test_what_fails_or_ends_in_one_lane_leaves_the_other(bench: Bench) -> None:
    _, works, jobs = lanes_of_two(bench)
    works[0].fails, works[0].fails_at = OwnError("a"), 1
    jobs[2].cancel()
    for work in works:
        work.let_go()
    with pytest.raises(OwnError):
        jobs[0].last()
    with pytest.raises(Cancelled):
        jobs[2].last()
    assert [jobs[n].last() for n in (1, 3)] == ["b2", "d2"]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_waits_for_all_lanes(bench: Bench, drain: bool) -> None:
    scheduler, works, jobs = lanes_of_two(bench)
    closing = Caller(lambda: scheduler.close(drain=drain))
    if not drain:
        for job in jobs[2:]:
            with pytest.raises(Closed):
                job.last()
    for work in works:
        work.let_go()
    assert closing.outcome() is None
    assert [job.last() for job in (jobs if drain else jobs[:2])] == [f"{n}2" for n in ("abcd" if drain else "ab")]
    assert not any(worker.is_alive() for worker in scheduler._workers)


def test_there_is_a_lane_at_least(bench: Bench) -> None:
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        bench.scheduler(lanes=0)


def test_closing_ends_those_of_a_group_whose_turn_has_not_come(bench: Bench) -> None:
    scheduler, first, works, jobs = group_of_three(bench)
    first.let_go()
    assert works[0].serving.wait(LONG)
    closing = Caller(scheduler.close)
    for job in jobs[1:]:
        with pytest.raises(Closed):
            job.last()
    works[0].let_go()
    assert closing.outcome() is None
    assert jobs[0].last() == "b2"


# Closing


def three_jobs(bench: Bench) -> tuple[Scheduler[Work, Work, str], list[Work], list[Job[str]], list[Caller]]:
    """One that is served, one that is being prepared and one in line, each with a caller that waits."""
    scheduler = bench.scheduler()
    first, job = bench.served(scheduler)
    works = [first, bench.work("b", held="prepare"), bench.work("c")]
    jobs = [job, *(scheduler.submit(work) for work in works[1:])]
    assert works[1].preparing.wait(LONG)
    return scheduler, works, jobs, [Caller(lambda job=job: list(job)) for job in jobs]  # type: ignore[misc]


def test_close_ends_the_line_and_finishes_what_is_served(bench: Bench) -> None:
    scheduler, works, jobs, callers = three_jobs(bench)
    closing = Caller(scheduler.close)
    assert [type(caller.outcome()) for caller in callers[1:]] == [Closed] * 2  # while the first is held
    with pytest.raises(Closed, match="closed"):
        scheduler.submit(bench.work())
    assert closing.is_alive()
    for work in works:
        work.let_go()
    assert callers[0].outcome() == works[0].expected
    assert closing.outcome() is None
    assert not any(worker.is_alive() for worker in scheduler._workers)
    assert all(job.done for job in jobs)
    scheduler.close()  # again
    assert ("serve", "b") not in bench.stages.log


def test_close_with_drain_serves_the_line_first(bench: Bench) -> None:
    scheduler, works, _, callers = three_jobs(bench)
    closing = Caller(lambda: scheduler.close(drain=True))
    until(lambda: scheduler._closing)
    with pytest.raises(Closed):
        scheduler.submit(bench.work())
    for work in works:
        work.let_go()
    assert [caller.outcome() for caller in callers] == [work.expected for work in works]
    assert closing.outcome() is None
    assert not any(worker.is_alive() for worker in scheduler._workers)


def test_a_drain_can_be_cut_short(bench: Bench) -> None:
    scheduler, works, _, callers = three_jobs(bench)
    drain = Caller(lambda: scheduler.close(drain=True))
    until(lambda: scheduler._closing)
    close = Caller(scheduler.close)
    assert [type(caller.outcome()) for caller in callers[1:]] == [Closed] * 2
    for work in works:
        work.let_go()
    assert (drain.outcome(), close.outcome()) == (None, None)
    assert callers[0].outcome() == works[0].expected


def test_abort_ends_what_is_served_too(bench: Bench) -> None:
    scheduler, works, _, callers = three_jobs(bench)
    closing = Caller(scheduler.abort)
    assert [type(caller.outcome()) for caller in callers[1:]] == [Closed] * 2
    works[0].step()
    works[1].may_prepare.set()
    assert closing.outcome() is None
    assert isinstance(callers[0].outcome(), Closed)
    assert works[0].made == 1


def test_abort_waits_no_longer_than_it_is_told(bench: Bench) -> None:
    scheduler = bench.scheduler()
    bench.served(scheduler)
    scheduler.abort(0.01)  # and returns, though the worker is in a call
    assert any(worker.is_alive() for worker in scheduler._workers)


def test_an_abandoned_scheduler_ends_its_workers(bench: Bench) -> None:
    scheduler, works, _, callers = three_jobs(bench)
    scheduler.abandon()
    works[0].step()
    works[1].may_prepare.set()
    assert [type(caller.outcome()) for caller in callers] == [Closed] * 3
    for worker in scheduler._workers:
        worker.join(LONG)
        assert not worker.is_alive()


def test_an_idle_scheduler_ends_its_workers(bench: Bench) -> None:
    for end in ("close", "abort", "abandon"):
        scheduler = bench.scheduler()
        assert {worker.name for worker in scheduler._workers} == {"earlytom-prepare", "earlytom-serve"}
        assert all(worker.is_alive() and worker.daemon for worker in scheduler._workers)
        getattr(scheduler, end)()
        for worker in scheduler._workers:
            worker.join(LONG)
            assert not worker.is_alive()


EXIT = """
import sys, threading
from runtime.service import scheduler
begun = threading.Event()

def serve(turns):
    yield_once = threading.Event()
    def run():
        while True:
            begun.set()
            {body}
            yield 1
    return [run() for _ in turns]

made = scheduler.Scheduler(lambda given, check: given, serve, waiting=3)
jobs = [made.submit(n) for n in range(3)]
begun.wait()
scheduler.EXIT_SECONDS = 0.1
print("bye")
"""


@pytest.mark.parametrize("body", ["pass", "threading.Event().wait()"])
def test_the_interpreter_ends_though_nobody_closed_it(body: str) -> None:
    """While an answer without an end is made, and while the worker is stuck in a call."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(body=body)], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")


# Memory


def gone(work: Work) -> threading.Event:
    """Set when the garbage of a job is gone, without a garbage collection."""
    event = threading.Event()
    weakref.finalize(work, event.set)
    return event


@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_a_job_that_has_ended_is_let_go(bench: Bench, fails_at: int | None) -> None:
    """The workers have nothing else to do and keep the last one no longer than another."""
    work = Work("a", fails=None if fails_at is None else OwnError("no"), fails_at=fails_at)
    event = gone(work)
    job = bench.scheduler().submit(work)
    assert work.through.wait(LONG)
    del work, job
    assert event.wait(LONG)


def test_a_failed_preparation_is_let_go(bench: Bench) -> None:
    work = Work("a", fails=OwnError("no"))
    event = gone(work)
    jobs = [bench.scheduler().submit(work)]
    until(lambda: jobs[0].done)
    jobs.clear()
    del work
    assert event.wait(LONG)


def test_a_failed_begin_is_let_go(bench: Bench) -> None:
    bench.stages.serve_fails = OwnError("no engine")
    work = Work("a")
    event = gone(work)
    jobs = [bench.scheduler().submit(work)]
    until(lambda: jobs[0].done)
    jobs.clear()
    bench.stages.serve_fails = None  # or this would keep it
    del work
    assert event.wait(LONG)


def test_a_handle_keeps_the_answer_and_not_what_it_was_made_of(bench: Bench) -> None:
    work = Work("a")
    event = gone(work)
    job = bench.scheduler().submit(work)
    del work
    assert job.last() == "a2"
    assert event.wait(LONG)


def test_a_cancelled_job_lets_go_of_its_video_at_once(bench: Bench) -> None:
    scheduler = bench.scheduler()
    first, _ = bench.served(scheduler)
    works = [Work("prepared"), Work("queued")]
    events = [gone(work) for work in works]
    jobs = [scheduler.submit(work) for work in works]
    until(lambda: len(scheduler._prepared) == 1)
    works.clear()
    for job in jobs:
        job.cancel()
    assert [event.wait(LONG) for event in events] == [True, True]  # and the first is still served
    assert not first.through.is_set()


def test_bells_do_not_pile_up_while_the_workers_are_busy(bench: Bench) -> None:
    scheduler = bench.scheduler(waiting=3)
    before, previous = scheduler.submit(bench.work()), scheduler.submit(bench.work())
    for _ in range(300):  # two in line at any time: no worker ever waits
        job = scheduler.submit(bench.work())
        before.last()
        before, previous = previous, job
    assert max(bell.qsize() for bell in scheduler._bells) < 50
    previous.last()


# Everything at once


def test_callers_that_come_and_go_as_they_like(bench: Bench) -> None:
    """Whatever they do, each sees its own items, in order, and one of the ends; at last every place is free."""
    scheduler = bench.scheduler(waiting=3, batch=2, real=True)

    def call(caller: int) -> list[str]:
        chance, ends = random.Random(caller), []
        for turn in range(40):
            name = f"{caller}.{turn}."
            fails = OwnError(name) if chance.random() < 0.2 else None
            work = Work(name, items=4, fails=fails, fails_at=chance.choice([None, 0, 3]))
            deadline = chance.choice([None, 1e-6, LONG])
            try:
                job = scheduler.submit(work, deadline=deadline)
            except Overloaded:
                ends.append("overloaded")
                continue
            came = [next(job, "") for _ in range(chance.randrange(2))] if deadline is None and fails is None else []
            end = chance.choice(["cancel", "abandon", "read", "read", "wait"])
            if end in ("cancel", "abandon"):
                getattr(job, end)()
                ends.append(end)
                continue
            try:
                came += list(job) if end == "read" else [f"{name}{job.last()[-1:]}"]  # type: ignore[index]
                assert came == work.expected or (end == "wait" and came[-1] == work.expected[-1])
                ends.append("answered")
            except DeadlineExceeded:
                ends.append("late")
            except OwnError as error:
                ends.append("failed" if str(error) == name else "another's error")
        return ends

    callers = [Caller(lambda n=n: call(n)) for n in range(8)]  # type: ignore[misc]
    ends = [end for caller in callers for end in caller.outcome()]
    assert len(ends) == 8 * 40
    assert set(ends) - {"overloaded"} == {"answered", "cancel", "abandon", "late", "failed"}
    scheduler.close(drain=True)
    assert scheduler._occupied() == 0


def test_a_fork_is_told_that_the_workers_stayed_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the number of the process differs in here: what matters is that nothing waits for threads that are gone."""
    scheduler = bench.scheduler()
    scheduler.submit(bench.work("a")).last(LONG)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.forks.os.getpid", lambda: -1)
        with scheduler._lock:  # as a fork may find it
            scheduler.close()
            with pytest.raises(Closed, match="load a pipeline after it"):
                scheduler.submit(bench.work("b"))
    assert scheduler.submit(bench.work("c")).last(LONG) is not None
