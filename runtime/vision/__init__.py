"""Vision backends: everything that turns the frames of one clip into visual tokens, behind one small protocol.

How one graph runs is known to `onnxruntime` and `tensorrt` (either flavour), in which order to `whole`, `adaptive` and
`chunked`, which also takes the frames of a clip as they come; `by_frames` has one for each of several frame counts.
`torch` runs the checkpoint's own vision part, the reference.
"""

from runtime.vision.open import choose_backend, open_backend
from runtime.vision.protocol import BatchedVision, Encoded, VisionBackend, encode_one

__all__ = ["BatchedVision", "Encoded", "VisionBackend", "choose_backend", "encode_one", "open_backend"]
