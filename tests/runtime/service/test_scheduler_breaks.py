"""A worker that fails in its own loop: everybody is told, whatever it was, and nothing waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from runtime.errors import Closed
from runtime.service import job as job_module
from runtime.service import line as line_module
from runtime.service import scheduler as scheduler_module
from runtime.service.job import Job
from runtime.service.scheduler import Scheduler, Turn

LONG = 20.0  # seconds until a test that hangs fails
WORKERS = ("earlytom-prepare", "earlytom-serve")
_OWN = tuple(str(module.__file__) for module in (job_module, line_module, scheduler_module))


class BrokenError(Exception):
    """What the tests break a worker with."""


class Stages:
    """Two stages of which each can be held: what is named in `held` waits there for `go`."""

    def __init__(self, prepare: str = "", serve: str = "") -> None:
        self.held = {"prepare": prepare, "serve": serve}
        self.there = {"prepare": threading.Event(), "serve": threading.Event()}
        self.go = threading.Event()

    def _pass(self, stage: str, name: str) -> None:
        if name == self.held[stage]:
            self.there[stage].set()
            assert self.go.wait(LONG)

    def prepare(self, name: str, check: Callable[[], None]) -> str:
        self._pass("prepare", name)
        return name

    def serve(self, turns: Sequence[Turn[str]]) -> list[Generator[str, None, None]]:
        return [self._run(turn.ready) for turn in turns]

    def _run(self, name: str) -> Generator[str, None, None]:
        yield name + "0"
        self._pass("serve", name)
        yield name + "1"


class Reader(threading.Thread):
    """Waits for a job's end: None, or the error."""

    def __init__(self, job: Job[str]) -> None:
        super().__init__(daemon=True)
        self._job, self.error = job, None
        self.start()

    def run(self) -> None:
        try:
            self._job.last()
        except BaseException as error:
            self.error = error  # type: ignore[assignment]

    def end(self) -> BaseException | None:
        self.join(LONG)
        assert not self.is_alive(), "silence"
        return self.error


def in_worker(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, which fails in that worker."""

    def call(*args: Any) -> Any:
        if threading.current_thread().name == name:
            raise BrokenError("it broke")
        return plain(*args)

    return call


class Bell:
    def __init__(self, name: str, plain: Any) -> None:
        self.get, self.put, self.get_nowait = (
            in_worker(name, each) for each in (plain.get, plain.put, plain.get_nowait)
        )


def break_bells(scheduler: Any, worker: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler, "_bells", tuple(Bell(worker, bell) for bell in scheduler._bells))


def break_method(name: str) -> Callable[[Any, str, pytest.MonkeyPatch], None]:
    return lambda scheduler, worker, patch: patch.setattr(scheduler, name, in_worker(worker, getattr(scheduler, name)))


def break_hush(scheduler: Any, worker: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler_module, "_hush", in_worker(worker, scheduler_module._hush))


BREAKS = {
    **{name: break_method(name) for name in ("_clock", "_sweep", "_jobs", "_is_over", "_ring")},
    "_hush": break_hush,
    "bells": break_bells,
}


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("what", BREAKS)
def test_jobs_in_every_phase_are_told(what: str, worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is served, one is prepared, one is being prepared, two are in line; then an internal of a worker fails."""
    stages = Stages(prepare="c", serve="a")
    scheduler: Scheduler[str, str, str] = Scheduler(stages.prepare, stages.serve, waiting=8, batch=2)
    jobs = [scheduler.submit("a")]
    assert stages.there["serve"].wait(LONG)
    jobs += [scheduler.submit(name) for name in "bcde"]
    assert stages.there["prepare"].wait(LONG)
    readers = [Reader(job) for job in jobs]
    BREAKS[what](scheduler, worker, monkeypatch)
    stages.go.set()
    ends = [reader.end() for reader in readers]
    told = [end for end in ends if isinstance(end, Closed)]
    assert set(ends) - set(told) <= {None}  # answered before, or Closed
    assert len(told) >= 2
    for end in told:
        assert "BrokenError('it broke')" in str(end)
        assert "\n" not in str(end)
        assert isinstance(end.__cause__, BrokenError)
    for call in (scheduler.submit, lambda _: scheduler.check_room()):
        with pytest.raises(Closed, match=r"BrokenError\('it broke'\).*load another one"):
            call("f")
    monkeypatch.setattr(scheduler_module, "EXIT_SECONDS", 0.1)  # where the other worker cannot be told
    for end_it in (scheduler.close, lambda: scheduler.close(drain=True), scheduler.abort):
        end_it()
    alive = [one.name for one in scheduler._workers if one.is_alive()]
    assert not alive or (what == "bells" and worker not in alive)
    for bell in scheduler._bells:  # so that it is not left behind
        bell.put(None)


class Fault:
    """Raises at the n-th call that the scheduler's own code makes in one worker, Python's and C's alike."""

    def __init__(self, worker: str, at: int) -> None:
        self.worker, self.left, self.came = worker, at, False

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if (
            event not in ("call", "c_call")
            or frame.f_code.co_filename not in _OWN
            or frame.f_code.co_name in ("_work", "_break")
            or getattr(argument, "__name__", "") == "__exit__"  # of the lock: a profiler can stop it, nothing else can
            or threading.current_thread().name != self.worker
        ):
            return
        self.left -= 1
        if self.left < 0 and not self.came:
            self.came = True
            raise MemoryError("injected")


def one_fault(worker: str, at: int) -> bool:
    """Six jobs, of which each has to end; whether the fault came."""
    stages, fault = Stages(), Fault(worker, at)
    threading.setprofile(fault)
    try:
        scheduler: Scheduler[str, str, str] = Scheduler(stages.prepare, stages.serve, waiting=8, batch=2)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    jobs: list[Job[str]] = []
    ends: list[str] = []
    for name in "abcdef":
        try:
            jobs.append(scheduler.submit(name))
        except Closed as error:
            ends.append(str(error))
    for job in jobs:
        try:
            ends.append(str(job.last(LONG)))
        except (Closed, MemoryError) as error:
            ends.append(str(error))
    assert all(end in {name + "1" for name in "abcdef"} or (fault.came and "injected" in end) for end in ends)
    scheduler.close()
    assert not any(each.is_alive() for each in scheduler._workers)
    assert not scheduler._open
    return fault.came


@pytest.mark.parametrize("worker", WORKERS)
def test_a_failure_of_any_call_that_a_worker_makes(worker: str) -> None:
    at = 0
    while one_fault(worker, at):  # until so many calls are not made: the last jobs are through before
        at += 3
    assert at > 100


def test_without_a_fault_all_are_answered() -> None:
    assert not one_fault("nobody", 0)


def test_a_thread_that_does_not_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = set(threading.enumerate()), threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "earlytom-serve":
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    stages = Stages()
    with pytest.raises(RuntimeError, match="can't start"):
        Scheduler(stages.prepare, stages.serve, waiting=1)
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
        assert not thread.is_alive()
