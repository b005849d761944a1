"""A video that is still arriving, to be asked about as soon as it ends.

    with pipeline.open_stream(total=300) as video:
        for frame in camera:
            video.push(frame)
        answer = video.ask("What happened?")
    print(video.timings.after_last_frame)

The vision encoder works while frames arrive (`runtime.vision.live`), concurrently with the pipeline's other requests.
The first question ends the video; all questions get the visual tokens of the frames pushed until then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
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
    """One video that arrives frame by frame; made by `Pipeline.open_stream`. Leaving its `with` block closes it.

    Attributes:
        timings: seconds of its encoding; None until the video has ended.
    """

    def __init__(self, pipeline: Pipeline, clip: LiveClip) -> None:
        self._pipeline = pipeline
        self._clip = clip
        self._home = Home("this live video")
        self._lock = threading.Lock()
        self._arrived: Arrived | None = None
        self.timings: LiveTimings | None = None

    def push(self, frames: Tensor | NDArray[Any]) -> None:
        """Add the next frames; arguments and errors as `runtime.vision.live.LiveClip.push`."""
        self._clip.push(frames)

    def finish(self) -> LiveTimings:
        """End the video, unless it has ended, and wait for its visual tokens.

        Raises:
            UserError: fewer frames than `total`, or than a video must have; more may be pushed then.
            Exception: the encoder's error.
            RuntimeError: closed before the video ended.
        """
        self._home.check()
        with self._lock:
            if self._arrived is None or self.timings is None:
                found, self.timings = self._clip.finish()
                self._arrived = Arrived(found, self._clip.times)
            return self.timings

    def submit(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Request:
        """`finish`, then `Pipeline.submit` about this video; errors of both. An invalid question is refused before it
        ends the video. The deadline counts from this call."""
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
        """`finish`, then `Pipeline.watch` this video; errors of both."""
        if self._arrived is None and system is not None:
            self._pipeline.check("?", system=system)
        self.finish()
        assert self._arrived is not None
        return self._pipeline.watch(self._arrived, system=system)

    def close(self) -> None:
        """Stop encoding and drop the frames; submitted questions are still answered. A second call does nothing."""
        self._clip.close()

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
