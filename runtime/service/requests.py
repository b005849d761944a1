"""What goes into a `Pipeline` and what comes out: videos, questions, answers and their timings, and what a request is
between the two. Nothing here does anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray
from torch import Tensor

from earlytom.families import FrameSampling, FrameTimes
from runtime.decoder.eager import Finish
from runtime.decoder.protocol import ReadPrompt
from runtime.decoder.sampling import Sampling
from runtime.gpu.staging import Arriving
from runtime.text.prompt import Prompt
from runtime.video import Clip, Spooled
from runtime.vision import Encoded


@dataclass(frozen=True)
class Timings:
    """Seconds of one request. On a GPU the stages overlap the host; `vision` is then measured by events on the device.

    Attributes:
        waiting: in line, behind other requests.
        decode: opening and decoding the video; preprocess: resizing its frames. Both are 0 for a `Clip`: it is ready.
        vision: the vision engine (of all videos, where it takes several at once), and waiting for the frames' copy to
            the device, which was begun when they were ready.
        prefill: splice, prefill and the first token.
        first_token: from the request to the first token (TTFT): the stages above and what is between them.
        per_token: mean time of each further token (TPOT); 0 when there is none.
        total: from the request to the end of the answer.
    """

    waiting: float
    decode: float
    preprocess: float
    vision: float
    prefill: float
    first_token: float
    per_token: float
    total: float


@dataclass(frozen=True)
class Delta:
    """What one more token brought.

    `text` may be empty while a character is unfinished. The last delta has `finish` and `answer`, and no token.
    """

    text: str
    token: int | None = None
    finish: Finish | None = None
    answer: Answer | None = None


@dataclass(frozen=True, eq=False)
class Provenance:
    """Where an answer's visual tokens come from.

    Attributes:
        positions: int64 [N], of each token: slot * P + cell, slot the frame that was left, P cells a frame.
        sources: fp32 [F', F], what share of each frame of the clip each frame that was left is made of.
        place: int64 [N], of each token: frame of the clip * P + cell, the frame having the largest share in it.
    """

    positions: Tensor
    sources: Tensor
    place: Tensor


@dataclass(frozen=True)
class Answer:
    """A finished answer: text and token ids, why it ended, what it cost, and how many visual tokens it looked at.

    Attributes:
        text: without a stop string that ended it.
        tokens: all that were generated, those of a stop string too.
        visual_tokens: of the video, without what closes them.
        prompt_tokens: positions that the prompt took: text, visual tokens, what closes them.
        cached_tokens: those of them that were read before this request: what a watched video saves.
        kept: which visual tokens these are, on a CPU; None unless it was asked for.
        grid: (rows, columns) of the cells of a frame.
        sampling: which frames of its video were shown, see `runtime.video.sample_indices`.
        step: pictures of the video that are one frame of `kept`.
        visual_tokens_full: what `visual_tokens` would be without compression.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    timings: Timings
    visual_tokens: int
    prompt_tokens: int
    cached_tokens: int
    kept: Provenance | None = None
    grid: tuple[int, int] = (0, 0)
    sampling: FrameSampling = "ends"
    step: int = 1
    visual_tokens_full: int = 0

    def picture(self, path: str | os.PathLike[str], video: Video, *, question: str = "") -> Path:
        """Draw the answer over its video: the frames, what was kept of them, and where the time went.

        Args:
            path: a .png with all frames, or an .mp4 with one after the other.
            video: what was asked about; its frames are sampled again.
            question: to stand above the answer.

        Returns:
            the path.

        Raises:
            UserError: the answer was not asked for with kept=True; another ending; a video that cannot be read;
                matplotlib is missing.
        """
        from runtime.service.pictures import picture

        return picture([self], [question], path, video)

    @property
    def generated_tokens(self) -> int:
        """How many tokens the decoder was run for, one that only ended the answer not counted."""
        return len(self.tokens)


@dataclass(frozen=True)
class CheckedQuestion:
    """A prompt that was found good, and how to answer it."""

    words: Prompt
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Seen:
    """A video that the decoder has read before: its prefix, which ends with the video, and what it was made of."""

    prefix: ReadPrompt
    before: tuple[int, ...]  # ids of the text before the video
    visual_tokens: int
    kept: Provenance
    times: FrameTimes  # of its frames
    after: int | None = None  # where text behind the video stands, if that is not behind its last token

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.prefix.bytes


@dataclass(frozen=True, eq=False)
class Arrived:
    """A video that was encoded while it came: its visual tokens, which nobody writes over, and when its frames were."""

    encoded: Encoded
    times: FrameTimes


# What callers may give, and what becomes of it when it is taken (`runtime.video.take_video`).
Video = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Tensor | NDArray[Any] | Sequence[Any] | Clip
)
Taken = Path | Spooled | Tensor | NDArray[Any] | Clip | Seen | Arrived


@dataclass(frozen=True, eq=False)
class Embeds:
    """A prompt with its video as the decoder reads it: embeddings [1, L, D]."""

    values: Tensor


@dataclass(eq=False)
class Remembered:
    """A video that is asked more than once, as a key of the cache of what was read: how to read it again.

    Attributes:
        video, frames: as in `Work`.
        system: the message before its questions.
        before: ids of the text before it.
        closed: it is not to be kept any more.
    """

    video: Taken
    system: str | None
    frames: int | None
    before: tuple[int, ...]
    closed: bool = False

    def __repr__(self) -> str:
        return f"video {str(self.video)!r}" if isinstance(self.video, Path) else "a watched video"


@dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
        video: what it is about.
        question: what is asked.
        frames: the frames to sample; None: as many as suit the video.
        read_only: read a remembered video, and answer nothing.
        embed: only splice the video into the prompt.
        given: frames of the video that somebody gave on a GPU, and when they are there.
    """

    video: Taken | Remembered
    question: CheckedQuestion
    frames: int | None = None
    read_only: bool = False
    given: Arriving | None = None
    embed: bool = False


@dataclass(frozen=True)
class Ready:
    """A request whose video is there.

    Attributes:
        shown: the video.
        question: what is asked.
        arriving: the frames of `shown`, on their way to the device, if that is another one.
        remembered: what `shown` is to be read and kept for.
        read_only, embed: as in `Work`.
    """

    shown: Clip | Seen | Arrived
    question: CheckedQuestion
    arriving: Arriving | None = None
    remembered: Remembered | None = None
    read_only: bool = False
    embed: bool = False
