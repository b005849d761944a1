"""The three ways to ask about one video: submit, stream, ask."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Unpack

from runtime.requests import Answer, Delta

if TYPE_CHECKING:
    from runtime.pipeline import Options, Request


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
