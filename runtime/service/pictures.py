"""An answer drawn over its video: `Answer.picture`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from earlytom.errors import UserError
from runtime.drawing.clips import write_clip
from runtime.files.partial import partial
from runtime.show.figure import check_picture
from runtime.show.kept import KeptCells
from runtime.show.pictures import Story, clip_frames, draw_image
from runtime.video import Clip, clip_from_frames, load_clip

if TYPE_CHECKING:
    from runtime.service.requests import Answer

_SIDE = 240  # approximate side of a drawn frame in pixels
_RATE = 8  # frames per second of an .mp4
_SHORTEST, _LONGEST = 2, 16  # frames of the .mp4 for each frame of the video


def picture(answers: Sequence[Answer], questions: Sequence[str], path: str | os.PathLike[str], video: Any) -> Path:
    """Draw answers about one video, with the times of the first; see `Answer.picture`."""
    target, first = check_picture(path, "path"), answers[0]
    if first.kept is None:
        raise UserError("the answer does not say what was kept of its video: ask with kept=True")
    rows, columns = first.grid
    count = first.kept.sources.shape[1]
    each = max(1, round(_SIDE / max(rows, columns)))
    size = (rows * each, columns * each)
    is_file = isinstance(video, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(video, "read")
    if isinstance(video, Clip):
        clip = clip_from_frames(video.frames, count * first.step, size)
    else:
        load = load_clip if is_file else clip_from_frames
        clip = load(video, count * first.step, size, sampling=first.sampling)
    times, decoded = first.timings, first.timings.decode + first.timings.preprocess
    stages = (
        ("decode", decoded),
        ("vision", times.vision),
        ("prefill", times.prefill),
        ("answer", max(times.total - times.first_token, 0.0)),
    )
    whole = count * rows * columns
    story = Story(
        frames=clip.frames[:: first.step].cpu().numpy(),
        kept=KeptCells.of(first.kept.place.tolist(), first.kept.sources.tolist(), (rows, columns)),
        said=tuple((question, one.text) for question, one in zip(questions, answers, strict=True)),
        seconds=stages,
        facts=f"{first.visual_tokens} of {whole} tokens",
    )
    if target.suffix.lower() == ".mp4":
        held = round(_RATE * clip.duration / count)
        return write_clip(target, _held(story, min(max(held, _SHORTEST), _LONGEST)), _RATE, (540, 960))
    with partial(target) as unfinished:
        draw_image(story, unfinished)
    return target


def _held(story: Story, count: int) -> Iterator[NDArray[np.uint8]]:
    """Repeat each frame `count` times."""
    for frame in clip_frames(story):
        for _ in range(count):
            yield frame
