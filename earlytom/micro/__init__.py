"""The bundled small checkpoint, so that everything can be tried without a download.

`PATH` is a folder in exactly the layout of a published checkpoint; it is loaded by the same code. This module itself
imports no model library. `python -m builder.micro.train` makes the folder's files.
"""

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""Folder of the bundled checkpoint."""

TRAINING_FILE, ACCURACY_FILE = "training.json", "accuracy.json"
"""Beside the weights: how they came about, and what was measured with them."""
