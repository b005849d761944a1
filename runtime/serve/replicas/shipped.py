"""Messages between a front and a replica."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from runtime.serve.backend import Asked
from runtime.serve.errors import ServeError, from_runtime
from runtime.serve.media import TakenVideo


@dataclass(frozen=True)
class Shipped:
    """A question about a video in the object store.

    Attributes:
        asked: its deadline is in seconds from now, as clocks of machines differ.
        sha256: the video's hash.
        clip: reference to its frames, in a list, or Ray would fetch them with every question.
    """

    asked: Asked
    sha256: str
    clip: list[ray.ObjectRef]


@dataclass(frozen=True)
class Begun:
    """A replica begins an answer: times of the frames in seconds, the replica's id, its video cache's usage."""

    timestamps: tuple[float, ...]
    replica: str
    cache_usage: float


@dataclass(frozen=True)
class Refused:
    """A `ServeError` in a form that can be pickled."""

    status: int
    code: str
    message: str
    param: str | None
    retry_after: int | None

    @classmethod
    def of(cls, error: BaseException) -> Refused:
        found = from_runtime(error)
        return cls(found.status, found.code, found.message, found.param, found.retry_after)

    def error(self) -> ServeError:
        return ServeError(self.status, self.code, self.message, param=self.param, retry_after=self.retry_after)


@dataclass
class ShippedVideo(TakenVideo):
    """A video as a replica has it: a reference to its decoded frames."""

    clip: ray.ObjectRef | None = None
