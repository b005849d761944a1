"""Checkpoints: what a source holds, and the parts of it that a caller asks for.

A *source* is None or "micro" (the bundled model), "random:NAME" (a published configuration, or a mid-size one, with
random weights, for measuring without a download), a local folder, or a hub id ORG/NAME, with @REVISION (a branch, a tag
or a commit) where that is not the default branch.

* `describe` reads the settings and creates no weights.
* `load_vision` creates the vision tower, the projector and what closes their tokens, never the decoder: of a
  checkpoint's files only those tensors are read; random ones are drawn in the target dtype.
* `load_decoder` creates the rest, and never the tower.
* `load_model` creates the whole model; its weights equal those of the two for the same source.
* `load_tokenizer` gives a tokenizer with the chat template of the checkpoint's processor.

Everything that can be wrong with a source ends in a `UserError` of one line.
"""

from earlytom.families.published import MID_SIZE, PUBLISHED
from runtime.checkpoint.describe import MICRO, RANDOM, Checkpoint, Source, describe
from runtime.checkpoint.load import VisionPart, load_decoder, load_model, load_tokenizer, load_vision
from runtime.checkpoint.preprocessing import Preprocessing

__all__ = [
    "MICRO",
    "MID_SIZE",
    "PUBLISHED",
    "RANDOM",
    "Checkpoint",
    "Preprocessing",
    "Source",
    "VisionPart",
    "describe",
    "load_decoder",
    "load_model",
    "load_tokenizer",
    "load_vision",
]
