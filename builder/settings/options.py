"""Limits and defaults of a build, and the checks that need neither a model nor a library.

The command line runs them before anything is loaded, `builder.settings.config.BuildConfig` for every caller.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from earlytom.errors import UserError

# `--frame-budget auto` gives enough frames for this share of the clips, by the adaptive schedule.
AUTO, AUTO_SHARE = "auto", 0.9
TARGETS = {"a100": (8, 0)}
MAX_FRAMES = 128
MAX_BATCH = 64
# Far above a tower's need (0.1 GB of scratch for 8 frames of a published one), well below an A100's memory: a graph
# that would materialise tens of GB fails in the build, not on the GPU. The limit changes the engine's bytes.
WORKSPACE_GIB = 16.0


def parse_target(text: str) -> tuple[int, int]:
    """(major, minor) from a GPU's name or a compute capability: "a100" or "8.0" gives (8, 0)."""
    if text.lower() in TARGETS:
        return TARGETS[text.lower()]
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if match is None:
        raise UserError(f"--target {text!r} is neither {', '.join(TARGETS)} nor a compute capability such as 8.0")
    return int(match[1]), int(match[2])


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of frames in pixels: "448x832" gives (448, 832)."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if match is None:
        raise UserError(f"--size {text!r} is not HEIGHTxWIDTH: give both in pixels, such as 448x832")
    return int(match[1]), int(match[2])


def check_counts(counts: Sequence[int]) -> None:
    """Raise UserError for a frame count out of range."""
    for frames in counts:
        if not 1 <= frames <= MAX_FRAMES:
            raise UserError(f"the number of frames must be between 1 and {MAX_FRAMES}, got {frames}: set --frames")


def check_batch(batch: int) -> None:
    """Raise UserError for a batch size out of range."""
    if not 1 <= batch <= MAX_BATCH:
        raise UserError(f"the number of videos must be between 1 and {MAX_BATCH}, got {batch}: set --batch")


def check_clips(int8: bool, clips: int) -> None:
    """Raise UserError for a single calibration clip with int8."""
    if int8 and clips == 1:
        raise UserError(
            "--int8 is checked on other clips than its scales come from, and --calibration names 1: name at least 2, "
            "or none"
        )


def check_shapes(
    schedule: str,
    frame_budget: float | tuple[int, ...],
    frames: int | None,
    frame_counts: tuple[int, ...] | None = None,
    *,
    batch: int = 1,
    chunk: int | None = None,
) -> None:
    """Raise UserError for incompatible schedule, frame budget, frame counts, batch and chunk.

    `frames` is None while unknown.
    """
    if schedule == "adaptive" and batch > 1:
        raise UserError(
            f"in the adaptive schedule each video decides how many frames it keeps, and --batch {batch} needs "
            "equal numbers: build with --schedule budget"
        )
    if schedule == "adaptive" and frame_counts is not None:
        raise UserError(
            f"an adaptive engine takes one frame count, got {_words(frame_counts)}: build with --schedule budget, "
            "or give --frames one number"
        )
    if frame_counts is not None and isinstance(frame_budget, tuple):
        raise UserError(
            f"the frame budget {_words(frame_budget)} fits one frame count, got "
            f"{_words(frame_counts)}: give --frame-budget a share such as 0.75, or --frames one number"
        )
    if chunk is not None:
        if frames is not None or chunk > 0:
            check_chunk(chunk, chunk if frames is None else frames, schedule)
        if batch > 1 or frame_counts is not None:
            what = f"--batch {batch}" if batch > 1 else f"--frames {_words(frame_counts or ())}"
            raise UserError(
                f"--chunk {chunk} is for one video of one frame count at a time, got {what}: leave out one of the two"
            )


def check_one_video(method: str, *, batch: int, chunk: int | None) -> None:
    """Raise UserError for batches or chunks with a published comparison method."""
    if method not in ("earlytom", "cells") and (batch > 1 or chunk is not None):
        what = f"--chunk {chunk}" if chunk is not None else f"--batch {batch}"
        raise UserError(f"--method {method} takes one whole video at a time: leave out {what}")


def check_rounds(schedule: str, rounds: int | None, backend: str) -> None:
    """Raise UserError for greedy selection of a number of tokens that depends on the video, in a compiled engine.

    It is a loop of dynamic shapes, on which tensorrt-rtx crashes; ONNX Runtime runs it.
    """
    if schedule == "adaptive" and rounds is None and backend != "onnx":
        raise UserError(
            f"--rounds greedy and --schedule adaptive are a loop that {backend} cannot compile: give --rounds a number "
            "such as 7, or build with --schedule budget or --backend onnx"
        )


def check_chunk(chunk: int, frames: int, schedule: str) -> None:
    """Raise UserError unless `chunk` divides `frames` and the schedule has static shapes."""
    if schedule != "budget":
        raise UserError(f"--chunk cuts an engine of static shapes in two: build with --schedule budget, not {schedule}")
    if chunk < 1 or frames % chunk:
        divisors = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise UserError(f"--chunk {chunk} does not divide the {frames} frames of a clip: give one of {divisors}")


def _words(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
