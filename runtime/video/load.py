"""Loads a video file as a clip."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import torch

from earlytom.errors import UserError
from earlytom.families import FrameSampling
from runtime.errors import VideoError
from runtime.video.clip import Clip
from runtime.video.clock import seconds_of
from runtime.video.decode import decode
from runtime.video.limits import DEFAULT_LIMITS, Limits
from runtime.video.opening import Opener
from runtime.video.packets import read_packets
from runtime.video.sample import check_request, frames_for, sample_indices
from runtime.video.source import Spooled, take_video


def load_clip(
    video: Any,
    frames: int | Sequence[int],
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    limits: Limits = DEFAULT_LIMITS,
    check: Callable[[], object] | None = None,
    sampling: FrameSampling = "ends",
) -> Clip:
    """Sample `frames` frames uniformly over the whole video file and resize each to `size` = (H, W).

    video: the path of a file (str or any os.PathLike), its content (bytes, bytearray, memoryview), a binary file
        object, read from where it stands, or what `take_video` has made of one of these.
    limits: how large it may be.
    sampling: which frames, see `sample_indices`.
    check: called for every packet and every frame; what it raises ends the reading at once and is passed on.

    Of several counts in `frames` the one that suits the length of the video is taken (`frames_for`). Frames are resized
    on `device`, and stay there.
    Rotation and mirroring asked for by the file are applied; the aspect ratio is not kept (nor does the model keep it).
    Memory is that of the result, one source frame and what the decoder holds, however long the video is.

    Raises VideoError when the file is missing, not a video, cut off, undecodable, above a limit or shorter than two
    frames, and UserError when `frames` or `size` make no sense.
    """
    check_request(frames, size)
    started = time.perf_counter()
    source = take_video(video, limits, check=check)
    if not isinstance(source, Path | Spooled):
        raise UserError(
            f"load_clip reads files, and the video is a {type(video).__name__}: give it to clip_from_frames"
        )
    opener = Opener(source, limits, check)
    try:
        packets = read_packets(opener)
        sample, pts = decode(opener, packets, frames, size, torch.device(device), sampling)
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise VideoError(
            f"{opener.label} cannot be read as a video ({reason}); give a file that FFmpeg reads"
        ) from error
    finally:
        if isinstance(source, Spooled) and source is not video:
            source.close()  # an error that is kept would keep it
    seconds, duration = seconds_of(pts, packets)
    chosen = sample_indices(len(pts), frames_for(len(pts), frames), sampling)
    return Clip(
        frames=sample.result(chosen),
        timestamps=tuple(seconds[chosen].tolist()),
        source_frames=len(pts),
        duration=duration,
        decode_seconds=time.perf_counter() - started - sample.resize_seconds,
        preprocess_seconds=sample.resize_seconds,
    )
