"""A video that is still coming, to be asked about as soon as it ends.

    with pipeline.open_stream(total=300) as video:
        for frame in camera:
            video.push(frame)
        answer = video.ask("What happened?")
    print(video.timings.after_last_frame)

The vision encoder works while frames come (`runtime.vision.live`), beside whatever else the pipeline answers. The first
question ends the video; it and all others get the tokens that are then there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from numpy.typing import NDArray
from torch import Tensor

from earlytom.numbers import real
from runtime.errors import DeadlineExceeded
from runtime.forks import Home
from runtime.options import Options
from runtime.service.asking import Askable, Request
from runtime.service.requests import Arrived
from runtime.text.messages import ChatMessage
from runtime.vision.live import LiveClip, LiveTimings

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.service.watched import Watched


class LiveVideo(Askable):
    """One video that comes frame by frame; made by `Pipeline.open_stream`. Leaving its `with` block closes it.

    Attributes:
        timings: what it took, once it has ended; None before.
    """

    def __init__(self, pipeline: Pipeline, clip: LiveClip) -> None:
        self._pipeline = pipeline
        self._clip = clip
        self._home = Home("this live video")
        self._lock = threading.Lock()
        self._arrived: Arrived | None = None
        self.timings: LiveTimings | None = None

    def push(self, frames: Tensor | NDArray[Any]) -> None:
        """Take the next frames: `runtime.vision.live.LiveClip.push`, with its arguments and errors."""
        self._clip.push(frames)

    def finish(self) -> LiveTimings:
        """End the video, if that was not done: no more frames will come. Waits for its tokens.

        Raises:
            UserError: fewer frames came than were promised, or than a video has; more may be pushed then.
            Exception: what the encoder failed with.
            RuntimeError: it was closed before it ended.
        """
        self._home.check()
        with self._lock:
            if self._arrived is None or self.timings is None:
                found, self.timings = self._clip.finish()
                self._arrived = Arrived(found, self._clip.times)
            return self.timings

    def submit(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Request:
        """`finish`, and `Pipeline.submit` about this video; errors of both. What is wrong with the question is said
        before the video ends for it, and the deadline counts from now."""
        began = time.perf_counter()
        if self._arrived is None:
            self._pipeline.check(prompt, **how)
        self.finish()
        assert self._arrived is not None
        if (deadline := how.get("deadline")) is not None:
            seconds = real("deadline (seconds)", deadline, 0, low_open=True)
            how["deadline"] = left = seconds - (time.perf_counter() - began)
            if left <= 0:
                raise DeadlineExceeded(
                    f"the end of the video was being encoded when the deadline of {seconds:g} s passed: give it more "
                    "time"
                )
        return self._pipeline.submit(self._arrived, prompt, **how)

    def watch(self, *, system: str | None = None) -> Watched:
        """`finish`, and `Pipeline.watch` this video; errors of both."""
        if self._arrived is None and system is not None:
            self._pipeline.check("?", system=system)
        self.finish()
        assert self._arrived is not None
        return self._pipeline.watch(self._arrived, system=system)

    def close(self) -> None:
        """Stop encoding, drop what came; questions under way are answered. A second call does nothing."""
        self._clip.close()

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
