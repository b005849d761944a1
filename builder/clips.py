"""The calibration clips, and how many frames the adaptive schedule keeps of them.

The gate runs on the clips; a chain's profiles and `--frame-budget auto` go by the frames kept. Those are measured in
PyTorch, in fp32, on the model itself: the method's decisions need its hidden states. Layers after the last merge do not
run.
"""

from __future__ import annotations

import functools
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
from earlytom.methods import method_of
from earlytom.micro.data import labelled_clip
from runtime.checkpoint import MICRO
from runtime.drawing.clips import draw_clip
from runtime.video import load_clip

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig

SCALE_CLIPS = 8  # of the bundled model's own task


@dataclass(frozen=True)
class FramesKept:
    """Frames before the first merge and after each one, of every clip by its name."""

    clips: Mapping[str, tuple[int, ...]]

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """Least, median (of an even number of clips the larger one in the middle) and most, of each stage."""
        return tuple((min(counts), _median(counts), max(counts)) for counts in self._stages())

    def budget(self, share: float = AUTO_SHARE) -> tuple[int, ...]:
        """Frames to keep after each merge so that they are enough for at least `share` of the clips, merge by merge."""
        return tuple(_percentile(counts, share) for counts in self._stages()[1:])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: by stage the least, median and most, and the counts of every clip."""
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
    """The smallest of them that at least `share` of them do not exceed."""
    return sorted(counts)[math.ceil(share * len(counts)) - 1]


def frames_kept(graph: VisionGraph, clips: Mapping[str, Tensor]) -> FramesKept:
    """Run the adaptive schedule, with the other settings as they are, on clips.

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
    """Real frames for the gate: of the clips given, else of a clip drawn, encoded and decoded for it."""
    preprocessing = config.checkpoint.preprocessing
    load = functools.partial(load_clip, frames=config.frames, size=preprocessing.size, sampling=preprocessing.sampling)
    if config.calibration:
        names = [path.name for path in config.calibration]
        labels = names if len(set(names)) == len(names) else [str(path) for path in config.calibration]
        loaded = (load(path).frames for path in config.calibration)
        return dict(zip(labels, loaded, strict=True))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = draw_clip(Path(folder) / "drawn.mp4")
        return {"drawn clip": load(path).frames}


def scale_clips(config: BuildConfig, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames that the scales of int8 go by: of the clips, and where none were given for the bundled model, of its
    task's validation split. The drawn clip has not what others have: scales from it alone lost points, which the gate
    on it cannot see."""
    if config.calibration or config.checkpoint.source != MICRO:
        return clips
    found = {f"validation {index}": labelled_clip("validation", index).frames for index in range(SCALE_CLIPS)}
    return clips | {name: torch.from_numpy(frames) for name, frames in found.items()}
