"""The calibration clips, and how many frames the adaptive schedule keeps of them.

The gate runs on the clips; a chain's optimisation profiles and `--frame-budget auto` use the frames kept, measured on
the PyTorch model in fp32. Layers after the last merge do not run.

As int8 scales are fitted to clips, on which the gate would be too optimistic, `scale_clips` and `gate_clips` are
disjoint.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from builder.export.vision import VisionGraph
from builder.settings.options import AUTO_SHARE
from earlytom.encoder import encode
from earlytom.errors import UserError
from earlytom.methods import method_of
from earlytom.micro.data import labelled_clip
from earlytom.micro.data.scene import FRAMES
from runtime.checkpoint import MICRO
from runtime.drawing.clips import draw_clip
from runtime.video import load_clip, sample_indices

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig

SCALE_CLIPS, GATE_CLIPS = 24, 8  # of the bundled model's own task
_DRAWN: dict[int, bytes] = {}  # the mp4 of each seed: drawing takes a second, and each frame count needs it


@dataclass(frozen=True)
class FramesKept:
    """Numbers of frames before the first merge and after each one, of every clip by name."""

    clips: Mapping[str, tuple[int, ...]]

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """(minimum, median, maximum) of each stage; the upper median for an even number of clips."""
        return tuple((min(counts), _median(counts), max(counts)) for counts in self._stages())

    def budget(self, share: float = AUTO_SHARE) -> tuple[int, ...]:
        """After each merge, the least number of frames that is enough for at least `share` of the clips."""
        return tuple(_percentile(counts, share) for counts in self._stages()[1:])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: minimum, median and maximum by stage, and the counts of every clip."""
        least, median, most = (list(column) for column in zip(*self.ranges, strict=True))
        return {
            "minimum": least,
            "median": median,
            "maximum": most,
            "clips": {name: list(counts) for name, counts in self.clips.items()},
        }

    def _stages(self) -> list[tuple[int, ...]]:
        return list(zip(*self.clips.values(), strict=True))


def _median(counts: tuple[int, ...]) -> int:
    return sorted(counts)[len(counts) // 2]


def _percentile(counts: tuple[int, ...], share: float) -> int:
    """The smallest of the counts that at least `share` of them do not exceed."""
    return sorted(counts)[math.ceil(share * len(counts)) - 1]


def frames_kept(graph: VisionGraph, clips: Mapping[str, Tensor]) -> FramesKept:
    """Run the adaptive schedule on clips, with all other settings of `graph`.

    Args:
        graph: the vision part in fp32.
        clips: name to uint8 frames [F, 3, H, W].
    """
    config = graph.config.replace(schedule="adaptive")
    depth = config.merge_layers[-1] + 1 if config.merge_layers else 1
    method, vision = method_of(config), graph.vision
    found = {}
    for name, frames in clips.items():
        visual = encode(vision, graph.pixels(frames), method, depth=depth)
        found[name] = visual.frames_per_stage
    return FramesKept(found)


def calibration_clips(config: BuildConfig, place: Path) -> dict[str, Tensor]:
    """Frames uint8 [F, 3, H, W] by clip: of the given clips, else of a clip drawn, encoded and decoded in `place`."""
    if not config.calibration:
        return {"drawn clip": _drawn(config, place, seed=0)}
    names = [path.name for path in config.calibration]
    labels = names if len(set(names)) == len(names) else [str(path) for path in config.calibration]
    loaded = (_frames(config, path) for path in config.calibration)
    return dict(zip(labels, loaded, strict=True))


def scale_clips(config: BuildConfig, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clips for int8 scales: of given clips all but those held out for the gate; else the drawn clip, for the
    bundled model with clips of its task's validation split, as scales from the drawn clip alone lost accuracy, which a
    gate on it did not notice.

    Args:
        clips: the calibration clips.
    """
    if config.calibration:
        return dict(list(clips.items())[: len(clips) - _held_out(clips)])
    return clips | _of_task(config, range(SCALE_CLIPS), FRAMES)


def gate_clips(config: BuildConfig, clips: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
    """The clips for the gate: all; with int8 only those that its scales do not use: of given clips the last quarter, at
    least one; else another drawn clip, for the bundled model with other clips of the validation split.

    Args:
        clips: the calibration clips.
        place: a folder to draw in.
    """
    if config.int8 is None:
        return clips
    if not config.calibration:
        more = _of_task(config, range(SCALE_CLIPS, SCALE_CLIPS + GATE_CLIPS), config.frames)
        return {"another drawn clip": _drawn(config, place, seed=1)} | more
    held = dict(list(clips.items())[len(clips) - _held_out(clips) :])
    for name, frames in held.items():
        for seen, others in scale_clips(config, clips).items():
            if torch.equal(frames, others):
                raise UserError(
                    f"--calibration: {name} shows the same frames as {seen}, and int8 is checked on clips that its "
                    "scales do not come from: name another video"
                )
    return held


def _held_out(clips: dict[str, Tensor]) -> int:
    return max(1, len(clips) // 4)


def _of_task(config: BuildConfig, indices: range, frames: int) -> dict[str, Tensor]:
    """Clips of the bundled model's task by name, `frames` frames of each; none for other models."""
    if config.checkpoint.source != MICRO:
        return {}
    length = max(FRAMES, frames)
    times = sample_indices(length, frames)
    clips = {index: labelled_clip("validation", index, times=times, length=length) for index in indices}
    return {f"validation {index}": torch.from_numpy(clip.frames) for index, clip in clips.items()}


def _drawn(config: BuildConfig, place: Path, seed: int) -> Tensor:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "drawn.mp4"
        if seed in _DRAWN:
            path.write_bytes(_DRAWN[seed])
        else:
            _DRAWN[seed] = draw_clip(path, seed=seed).read_bytes()
        return _frames(config, path)


def _frames(config: BuildConfig, path: Path) -> Tensor:
    """uint8 [F, 3, H, W] of a video, as the runtime samples it."""
    given = config.checkpoint.preprocessing
    return load_clip(path, frames=config.frames, size=given.size, sampling=given.sampling).frames
