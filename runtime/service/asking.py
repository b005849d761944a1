"""The three ways to ask about one video, submit, stream and ask, and what the first of them returns.

A `Request` is read by a thread that waits (`for`, `result`), or in an event loop (`async for`), where no thread waits:
the worker that makes a token tells the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from runtime.options import Options
from runtime.service.job import Job
from runtime.service.requests import Answer, Delta
from runtime.text.messages import ChatMessage

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

_SOON, _LATE = 0.001, 3600.0  # seconds after which a loop that waits looks again whether the deadline has passed


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

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        """Its deltas in an event loop, which goes on between them; errors as of `__next__`.

            async with pipeline.submit(video, "What happens?") as request:
                async for delta in request: ...

        Ending this loop does not end the request; leaving its `async with`, as a task that is cancelled does, cancels
        it.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(news.set)

        with self._job.telling(tell):
            while True:
                news.clear()
                delta, over = self._job.poll()
                if over:
                    return
                if delta is not None:
                    yield delta
                    continue
                timer = loop.call_later(min(max(self._job.seconds_left, _SOON), _LATE), news.set)
                try:
                    await news.wait()
                finally:
                    timer.cancel()

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

    async def __aenter__(self) -> Request:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, where)

    def __del__(self) -> None:
        self._job.abandon()  # no lock: the garbage collector may call this anywhere


class Askable:
    """A video that a `Pipeline` knows of. A subclass says how a question about it is submitted."""

    def submit(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Request:
        """`Pipeline.submit` about this video."""
        raise NotImplementedError

    def stream(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Generator[Delta, None, None]:
        """`Pipeline.stream` about this video; arguments and errors as `submit`."""
        with self.submit(prompt, **how) as request:
            yield from request

    def ask(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Answer:
        """`Pipeline.ask` about this video; arguments and errors as `submit`."""
        with self.submit(prompt, **how) as request:
            return request.result()
