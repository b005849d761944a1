"""The calibration clips, and how many frames the adaptive schedule keeps of them.

The gate runs on the clips; a chain's profiles and `--frame-budget auto` go by the frames kept. Those are measured in
PyTorch, in fp32, on the model itself: the method's decisions need its hidden states. Layers after the last merge do not
run.

The scales of int8 are fitted to clips, so that the gate would find them too good on those: `scale_clips` and
`gate_clips` share none.
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
_DRAWN: dict[int, bytes] = {}  # the mp4 of each seed: to draw one takes a second, and every frame count asks for it


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
    """Real frames by name: of the clips given, else of a clip drawn, encoded and decoded in `place`."""
    if not config.calibration:
        return {"drawn clip": _drawn(config, place, seed=0)}
    names = [path.name for path in config.calibration]
    labels = names if len(set(names)) == len(names) else [str(path) for path in config.calibration]
    loaded = (_frames(config, path) for path in config.calibration)
    return dict(zip(labels, loaded, strict=True))


def scale_clips(config: BuildConfig, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames that the scales of int8 go by: of the clips given all but those held out for the gate; where none were
    given, of the drawn clip, and for the bundled model of its task's validation split. The drawn clip has not what
    others have: scales from it alone lost points, which a gate on it could not see.

    Args:
        clips: the calibration clips.
    """
    if config.calibration:
        return dict(list(clips.items())[: len(clips) - _held_out(clips)])
    return clips | _of_task(config, range(SCALE_CLIPS), FRAMES)


def gate_clips(config: BuildConfig, clips: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
    """Frames that the gate looks at: the clips, and with int8 only such as its scales do not go by. Of the clips given
    that is the last quarter, one at least; where none were given, another drawn clip, and for the bundled model others
    of the validation split.

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
    """Clips of the bundled model's task by name, `frames` of each; of another model none."""
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
