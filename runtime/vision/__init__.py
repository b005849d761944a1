"""Vision backends: they turn the frames of one clip into visual tokens, behind one small protocol.

`onnxruntime` and `tensorrt` (either flavour) run one graph; `whole`, `adaptive` and `chunked` run an engine's graphs in
their order, `chunked` also on frames as they arrive; `by_frames` holds one backend per frame count. `torch` runs the
checkpoint's own vision tower, the reference.
"""

from runtime.vision.open import choose_backend, open_backend
from runtime.vision.protocol import BatchedVision, Encoded, VisionBackend, encode_one

__all__ = ["BatchedVision", "Encoded", "VisionBackend", "choose_backend", "encode_one", "open_backend"]
