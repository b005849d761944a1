"""The three ways to ask about one video, submit, stream and ask, and what the first of them returns."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from runtime.options import Options
from runtime.service.job import Job
from runtime.service.requests import Answer, Delta

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline


class Request:
    """A request that was submitted: iterate over its deltas, or wait for its answer, from any thread.

    Its deltas are kept until they are read, each for one reader; the next one is there as soon as its token exists.
    Leaving its `with` block, or letting go of the last reference to it, cancels it.
    """

    def __init__(self, job: Job[Delta], pipeline: Pipeline) -> None:
        self._job = job
        self._pipeline = pipeline  # which would end its requests if it were let go

    def __iter__(self) -> Request:
        return self

    def __next__(self) -> Delta:
        """The next delta, waited for. Raises what `Pipeline.submit` lists, after the deltas that came before it."""
        return next(self._job)

    def result(self, timeout: float | None = None) -> Answer:
        """The answer, waited for, whether or not the deltas are read.

        Raises:
            TimeoutError: there is none after `timeout` seconds; the request goes on.
            UserError: `timeout` is no number.
            see `Pipeline.submit`.
        """
        last = self._job.last(timeout)
        assert last is not None  # the last delta has it
        assert last.answer is not None
        return last.answer

    def cancel(self) -> None:
        """End it, unless it has ended: at once while it waits, else before the next packet of its video or its next
        token. What waits for it gets `Cancelled`."""
        self._job.cancel()

    @property
    def done(self) -> bool:
        """It was answered, or has ended in another way."""
        return self._job.done

    def __enter__(self) -> Request:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._pipeline.forked:  # a fork has nothing to cancel, and an error of its own to show
            self.cancel()

    def __del__(self) -> None:
        self._job.abandon()  # no lock: the garbage collector may call this anywhere


class Askable:
    """A video that a `Pipeline` knows of. A subclass says how a question about it is submitted."""

    def submit(self, prompt: str, **how: Unpack[Options]) -> Request:
        """`Pipeline.submit` about this video."""
        raise NotImplementedError

    def stream(self, prompt: str, **how: Unpack[Options]) -> Generator[Delta, None, None]:
        """`Pipeline.stream` about this video; arguments and errors as `submit`."""
        with self.submit(prompt, **how) as request:
            yield from request

    def ask(self, prompt: str, **how: Unpack[Options]) -> Answer:
        """`Pipeline.ask` about this video; arguments and errors as `submit`."""
        with self.submit(prompt, **how) as request:
            return request.result()
