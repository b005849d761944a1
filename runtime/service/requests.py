"""The data of a `Pipeline`: videos, questions, answers, timings, and a request between its stages. No logic here."""

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
        waiting: in the queue, behind other requests.
        decode: opening and decoding the video; preprocess: resizing its frames. Both are 0 for a `Clip`.
        vision: the vision engine (of the whole batch, where it encodes several videos at once), and the wait for the
            frames' copy to the device, which started when they were preprocessed.
        prefill: splice, prefill and the first token.
        first_token: from submission to the first token (TTFT): the stages above and the time between them.
        per_token: mean time of each further token (TPOT); 0 when there is none.
        total: from submission to the end of the answer.
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
    """One generated token and its text, which may be empty while a character is incomplete.

    The last delta has `finish` and `answer`, and no token.
    """

    text: str
    token: int | None = None
    finish: Finish | None = None
    answer: Answer | None = None


@dataclass(frozen=True, eq=False)
class Provenance:
    """Where an answer's visual tokens come from.

    Attributes:
        positions: int64 [N], `f * P + cell`: f among the F' frames left after merging, P cells a frame.
        sources: fp32 [F', F], the weight of each of the clip's F frames in each frame left after merging.
        place: int64 [N], `frame * P + cell`: the clip's frame with the largest weight in the token.
    """

    positions: Tensor
    sources: Tensor
    place: Tensor


@dataclass(frozen=True)
class Answer:
    """A finished answer: text, token ids, why it ended, timings and token counts.

    Attributes:
        text: without the stop string that ended it, if any.
        tokens: ids of all generated tokens, those of a stop string included.
        visual_tokens: of the video, without what closes them (newline or end tokens).
        prompt_tokens: of the whole prompt: text, visual tokens, what closes them.
        cached_tokens: prompt tokens found in the prefix cache; 0 unless the video is watched.
        kept: where the visual tokens come from, on the CPU; None unless asked for with `kept=True`.
        grid: (rows, columns) of the cells of a frame.
        sampling: how frames were sampled, see `runtime.video.sample_indices`.
        step: sampled pictures per frame of `kept`.
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
        """Draw the answer over its video: the frames, the cells kept of each, and the seconds of each stage.

        Args:
            path: a .png with all frames, or an .mp4 with one after the other.
            video: as given to `submit`; its frames are sampled again.
            question: shown above the answer.

        Returns:
            the path.

        Raises:
            UserError: asked without kept=True; another file suffix; a video that cannot be read; matplotlib is missing.
        """
        from runtime.service.pictures import picture

        return picture([self], [question], path, video)

    @property
    def generated_tokens(self) -> int:
        """Number of generated tokens, without the one that ended the answer."""
        return len(self.tokens)


@dataclass(frozen=True)
class CheckedQuestion:
    """A checked prompt, and how to answer it."""

    words: Prompt
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Seen:
    """A video that the decoder has prefilled: its prefix, which ends with the video, and where its tokens come from."""

    prefix: ReadPrompt
    before: tuple[int, ...]  # ids of the text before the video
    visual_tokens: int
    kept: Provenance
    times: FrameTimes
    after: int | None = None  # position id of the text after the video; None: that after its last token

    @property
    def bytes(self) -> int:
        """Size of the prefix."""
        return self.prefix.bytes


@dataclass(frozen=True, eq=False)
class Arrived:
    """A video that was encoded as it arrived: its visual tokens, which nothing overwrites, and its frames' times."""

    encoded: Encoded
    times: FrameTimes


# What callers may give, and what `runtime.video.take_video` makes of it.
Video = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Tensor | NDArray[Any] | Sequence[Any] | Clip
)
Taken = Path | Spooled | Tensor | NDArray[Any] | Clip | Seen | Arrived


@dataclass(frozen=True, eq=False)
class Embeds:
    """Embeddings [1, L, D] of a prompt with its video."""

    values: Tensor


@dataclass(eq=False)
class Remembered:
    """A watched video: the key of its entry in the prefix cache, with all that is needed to compute the entry again.

    Attributes:
        video, frames: as in `Work`.
        system: the system message before its questions.
        before: token ids of the text before the video.
        closed: not watched any more.
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
        frames: number of frames to sample; None: the count that suits the video.
        read_only: prefill a watched video, and answer nothing.
        embed: only splice the video into the prompt.
        given: frames that the caller gave on a GPU, and the event after which they may be read.
    """

    video: Taken | Remembered
    question: CheckedQuestion
    frames: int | None = None
    read_only: bool = False
    given: Arriving | None = None
    embed: bool = False


@dataclass(frozen=True)
class Ready:
    """A request whose video is prepared.

    Attributes:
        shown: the video: preprocessed frames, visual tokens, or a prefix.
        arriving: the frames of `shown`, being copied to the device.
        remembered: the watched video to cache the prefix for.
        read_only, embed: as in `Work`.
    """

    shown: Clip | Seen | Arrived
    question: CheckedQuestion
    arriving: Arriving | None = None
    remembered: Remembered | None = None
    read_only: bool = False
    embed: bool = False
