"""`Request`, which `submit` returns, and `Askable`: submit, stream and ask about one video.

A `Request` is read by a blocking thread (`for`, `result`) or in an event loop (`async for`), where no thread blocks:
the worker that makes a token wakes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import TYPE_CHECKING, Unpack

from runtime.options import Options
from runtime.service.job import Job
from runtime.service.requests import Answer, Delta
from runtime.text.messages import ChatMessage

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

_SOON, _LATE = 0.001, 3600.0  # least and most seconds until a waiting event loop checks the deadline again


class Request:
    """A submitted request: iterate over its deltas, or wait for its answer, from any thread.

    Deltas are kept until read; each goes to one reader, as soon as its token exists. Leaving the `with` block, or
    dropping the last reference, cancels the request.
    """

    def __init__(self, job: Job[Delta], pipeline: Pipeline) -> None:
        self._job = job
        self._pipeline = pipeline  # a reference: a garbage-collected pipeline ends its requests

    def __iter__(self) -> Request:
        return self

    def __next__(self) -> Delta:
        """Wait for the next delta. Errors as `Pipeline.submit` lists, after the deltas that precede them."""
        return next(self._job)

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        """The deltas, without blocking the event loop; errors as of `__next__`.

            async with pipeline.submit(video, "What happens?") as request:
                async for delta in request: ...

        Leaving the loop does not end the request; leaving `async with`, as a cancelled task does, cancels it.
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
        """Wait for the answer, whether or not the deltas are read.

        Raises:
            TimeoutError: no answer after `timeout` seconds; the request goes on.
            UserError: `timeout` is no number.
            see `Pipeline.submit`.
        """
        last = self._job.last(timeout)
        assert last is not None  # the last delta has it
        assert last.answer is not None
        return last.answer

    def cancel(self) -> None:
        """End the request with `Cancelled`, unless it has ended: at once while queued, else before the next packet of
        its video or its next token."""
        self._job.cancel()

    @property
    def done(self) -> bool:
        """Whether the request has ended, answered or not."""
        return self._job.done

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *raised: object) -> None:
        if not self._pipeline.forked:  # `cancel` would raise in a fork, and hide the error under way
            self.cancel()

    async def __aenter__(self) -> Request:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.__exit__()

    def __del__(self) -> None:
        self._job.abandon()  # no lock: the garbage collector may call this anywhere


class Askable:
    """A video that is open in a `Pipeline`. A subclass says how a question about it is submitted."""

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
