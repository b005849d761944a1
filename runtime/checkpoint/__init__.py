"""Checkpoints: reading a source's settings, and loading parts of its model.

A *source* is None or "micro" (the bundled model), "random:NAME" (a published configuration, or the mid-size one, with
random weights, to measure without a download), a local folder, or a hub id ORG/NAME, with @REVISION (a branch, tag or
commit) unless it is the default branch.

* `describe` reads the settings and no weights.
* `load_vision` loads vision tower, projector and closing token: of a checkpoint's files only those tensors are read;
  random ones are drawn in the target dtype.
* `load_decoder` loads the rest.
* `load_model` loads the whole model, with weights equal to those of the two.
* `load_tokenizer` gives a tokenizer with the chat template of the checkpoint's processor.

Every problem of a source raises a `UserError` of one line.
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
