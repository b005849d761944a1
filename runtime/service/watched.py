"""A video that is asked more than once: encoded and read once, then only the question is read.

    watched = pipeline.watch("clip.mp4")
    watched.ask("What happens?")
    watched.ask("Who comes in?")  # no video is decoded, no vision runs, and the prefill is the text's

What is kept is a `runtime.decoder.prefix.Prefix`: the decoder's keys and values of the prompt up to the end of the
video, which takes 2 * layers * key/value heads * head width * tokens numbers. They lie in the pipeline's `PrefixCache`,
which holds a number of bytes and lets go of what was not asked for longest. A video that had to go is read again when
it is asked again, from where it came from; so a file, or frames, that were watched must stay as they were.

An answer is that of a fresh `Pipeline.ask`, to rounding: the prompt's sums run in two pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from runtime.errors import Closed
from runtime.options import Options
from runtime.service.asking import Askable, Request
from runtime.service.requests import Remembered
from runtime.text.messages import ChatMessage

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline


class Watched(Askable):
    """One watched video; made by `Pipeline.watch`. Any thread may call anything.

    Leaving its `with` block, or closing it, frees its memory. That of one that is let go is free for the next video.
    """

    def __init__(self, pipeline: Pipeline, remembered: Remembered) -> None:
        self._pipeline = pipeline
        self._remembered = remembered

    def submit(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Request:
        """`Pipeline.submit` about this video. The system message and the frame count were chosen by `watch`.

        Raises:
            Closed: it was closed; otherwise as `Pipeline.submit`.
        """
        if self._remembered.closed:
            raise Closed("this video is not watched any more: watch it again")
        return self._pipeline.submit(self._remembered, prompt, **how)

    @property
    def held(self) -> bool:
        """Whether the next question finds it read; else it had to go, and is read again."""
        return self._remembered in self._pipeline.watched

    def close(self) -> None:
        """Forget it; requests under way are answered. A second call does nothing."""
        self._remembered.closed = True
        if not self._pipeline.forked:  # in a fork there is nothing of it to free
            self._pipeline.watched.drop(self._remembered)

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._remembered.closed = True  # no lock: the garbage collector may call this anywhere

    def __repr__(self) -> str:
        return f"Watched({self._remembered!r})"
