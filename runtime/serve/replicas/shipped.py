"""What goes between a front and a replica."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from runtime.serve.backend import Asked
from runtime.serve.errors import ServeError, from_runtime
from runtime.serve.media import TakenVideo


@dataclass(frozen=True)
class Shipped:
    """A question about a video that is in the object store.

    Attributes:
        asked: with a deadline that counts from now, as clocks of machines differ.
        sha256: of the video.
        clip: where its frames are, in a list, or Ray would fetch them with every question.
    """

    asked: Asked
    sha256: str
    clip: list[ray.ObjectRef]


@dataclass(frozen=True)
class Begun:
    """The video is there: the seconds of its frames, who answers, and how full its memory for videos is."""

    timestamps: tuple[float, ...]
    replica: str
    cache_usage: float


@dataclass(frozen=True)
class Refused:
    """A `ServeError`, which does not survive pickling as an error."""

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
    """A video as a replica has it: it is somewhere else, decoded."""

    clip: ray.ObjectRef | None = None
