"""A video, in whatever form a caller has it, becomes the engine's input: uint8 RGB frames at its resolution.

Knows FFmpeg (through PyAV, and nothing else does) and sampling. Knows nothing of models, tokens or engines.

`source` is what callers hand over, `opening` the one place that opens a container, `packets` the pass over the packets
and the plan, `cuts` whether a file is whole, `decode` the decoding, `clock` the times, `sample` which frames are shown
and their way to the model's size, `frames` frames as tensors, `clip` the result, `load` all of it.
"""

from runtime.video.clip import Clip, clip_from_frames
from runtime.video.frames import MIN_FRAMES, channels_first, resize_frames
from runtime.video.limits import Limits
from runtime.video.load import load_clip
from runtime.video.sample import apply_display_matrix, frames_for, sample_indices
from runtime.video.source import Spooled, take_video

__all__ = [
    "MIN_FRAMES",
    "Clip",
    "Limits",
    "Spooled",
    "apply_display_matrix",
    "channels_first",
    "clip_from_frames",
    "frames_for",
    "load_clip",
    "resize_frames",
    "sample_indices",
    "take_video",
]
