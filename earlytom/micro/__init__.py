"""The bundled small checkpoint, to try everything without a download.

`PATH` is a folder in the layout of a published checkpoint, loaded by the same code. This module imports no model
library. `python -m builder.micro.train` makes the folder's files.
"""

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""Folder of the bundled checkpoint."""

TRAINING_FILE, ACCURACY_FILE = "training.json", "accuracy.json"
"""Files beside the weights: how they were trained, and their measured accuracy."""
