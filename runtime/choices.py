"""What a caller may choose by name, and the defaults: what command lines offer and the library takes.

Nothing but words and numbers, so that a command line knows them without importing what they are about.
"""

from __future__ import annotations

# Backends that run a file of an engine folder. The torch backend runs a checkpoint instead, and is made from one.
ENGINE_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
BACKENDS = ("auto", *ENGINE_BACKENDS, "torch")
DECODERS = ("torch", "torch-tensorrt")
NARROW_DTYPES = ("int8",)  # of the decoder's weights
POSITIONS = ("original", "consecutive")  # of visual tokens
MAX_NEW_TOKENS = 128
MIN_FRAMES = 2  # the method compares neighbouring frames, so one frame is not a video
