"""Checks of a manifest's fields that their types cannot make: single values, and fields against each other.

Every failure is an `EngineError` of one line that names the field.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.numbers import shown
from runtime.engine.records import REBUILD, cut, is_file_name
from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.engine.manifest import Manifest


def check_agreement(manifest: Manifest) -> None:
    """Raise EngineError for an invalid field, or for two that contradict each other."""
    _values(manifest)
    _counts(manifest)
    _kinds(manifest)


def _values(manifest: Manifest) -> None:
    """Check single fields."""
    counts, kept, verified = manifest.frame_counts, manifest.frames_kept or (), manifest.verification
    passed = verified is None or isinstance(verified.get("passed"), bool)
    rules = [
        ("created", _is_time(manifest.created), "an ISO 8601 time"),
        ("figures", all(map(_is_finite, manifest.figures.values())), "finite numbers"),
        ("verification", passed, 'null or an object with "passed": true or false'),
        ("frames_kept", all(list(row) == sorted(row) for row in kept), "least, median and most of every stage"),
        ("frame_counts", counts is None or list(counts) == sorted(set(counts)), "null or ascending frame counts"),
    ]
    for name, good, expected in rules:
        if not good:
            raise EngineError(f"manifest.{name}: expected {expected}, got {shown(getattr(manifest, name))}: {REBUILD}")
    for name in (*manifest.files, *manifest.programs):
        if not is_file_name(name):
            raise EngineError(f"manifest lists a file named {shown(name)}, which is no plain file name: {REBUILD}")


def _counts(manifest: Manifest) -> None:
    """Check that the recorded counts are those that the layout derives from the recorded settings."""
    try:
        config, layout = manifest.settings, manifest.layout
        expected: dict[str, Any] = {"tokens_full": layout.tokens_full}
        expected |= {"frames_per_stage": layout.stages, "tokens": layout.tokens}
    except UserError as error:
        raise EngineError(
            f"manifest has {manifest.method} settings that make no sense ({cut(error)}): {REBUILD}"
        ) from error
    if not layout.adaptive:
        expected["frames_kept"] = None
    for name, value in expected.items():
        if (got := getattr(manifest, name)) != value:
            raise _contradiction(f"{name} is {shown(got)}, its settings give {shown(value)}")
    if manifest.frames != manifest.counts[-1]:
        raise _contradiction(
            f"frames is {manifest.frames}, of frame_counts {shown(manifest.counts)} it must be the last"
        )
    if manifest.frame_counts is not None and isinstance(config.frame_budget, tuple):
        raise _contradiction(
            f"frame_budget {shown(config.frame_budget)} fits one frame count, frame_counts is "
            f"{shown(manifest.frame_counts)}"
        )
    whole = manifest.batch == 1 and manifest.frame_counts is None and config.schedule == "budget"
    if manifest.chunk is not None and not (whole and manifest.frames % manifest.chunk == 0):
        raise _contradiction(
            f"chunk is {manifest.chunk}, which is for one video of one frame count in the budget schedule and divides "
            f"its {manifest.frames} frames"
        )
    if config.schedule == "adaptive":
        if manifest.batch > 1 or manifest.frame_counts is not None:
            raise _contradiction(
                f"an adaptive engine takes one video of one frame count, batch is {manifest.batch} and frame_counts "
                f"{shown(manifest.frame_counts)}"
            )
        kept = manifest.frames_kept or ()
        fits = len(kept) == len(layout.stages) and kept[0] == (manifest.frames,) * 3
        if not fits or any(most > manifest.frames for _, _, most in kept):
            raise _contradiction(
                f"frames_kept is {shown(manifest.frames_kept)}, its settings give {len(layout.stages)} stages of at "
                f"most {manifest.frames} frames"
            )


def _kinds(manifest: Manifest) -> None:
    """Only TensorRT has plugins."""
    if manifest.compression == "plugin" and manifest.backend != "tensorrt":
        raise _contradiction(f"compression is plugin, {manifest.backend} has none")
    if manifest.plugins and manifest.compression != "plugin":
        raise _contradiction("compression is native and plugins are listed")


def _contradiction(text: str) -> EngineError:
    return EngineError(f"manifest contradicts itself: {text}: {REBUILD}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
