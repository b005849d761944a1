"""A watched video: encoded and prefilled once; after that each question prefills only its own text.

    watched = pipeline.watch("clip.mp4")
    watched.ask("What happens?")
    watched.ask("Who comes in?")  # no video decoding, no vision engine; the prefill is the question's text

The cache entry is a `runtime.decoder.prefix.Prefix`: the KV cache of the prompt up to the end of the video, which has
2 * layers * key/value heads * head width * tokens elements. The pipeline's `PrefixCache` has a limit in bytes and
evicts the least recently used entry. An evicted video is encoded and prefilled again at its next question, from its
source; so a watched file, or watched frames, must not change.

An answer equals that of a fresh `Pipeline.ask` up to rounding: the prefill runs in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from runtime.errors import Closed
from runtime.options import Options
from runtime.service.asking import Askable, Request
from runtime.service.requests import Remembered
from runtime.text.messages import ChatMessage

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline


class Watched(Askable):
    """One watched video; made by `Pipeline.watch`. Every method is thread-safe.

    `close`, or leaving the `with` block, frees its memory. After garbage collection the next watched video frees it.
    """

    def __init__(self, pipeline: Pipeline, remembered: Remembered) -> None:
        self._pipeline = pipeline
        self._remembered = remembered

    def submit(self, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Request:
        """`Pipeline.submit` about this video. The system message and the frame count were chosen by `watch`.

        Raises:
            Closed: not watched any more; otherwise as `Pipeline.submit`.
        """
        if self._remembered.closed:
            raise Closed("this video is not watched any more: watch it again")
        return self._pipeline.submit(self._remembered, prompt, **how)

    @property
    def held(self) -> bool:
        """Whether its prefix is in the cache; if not, the next question encodes and prefills the video again."""
        return self._remembered in self._pipeline.watched

    def close(self) -> None:
        """Drop its prefix; submitted requests are still answered. A second call does nothing."""
        self._remembered.closed = True
        if not self._pipeline.forked:  # a fork's cache raises `Closed`
            self._pipeline.watched.drop(self._remembered)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._remembered.closed = True  # no lock: the garbage collector may call this anywhere

    def __repr__(self) -> str:
        return f"Watched({self._remembered!r})"
