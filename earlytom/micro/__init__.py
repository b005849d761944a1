"""The bundled small LLaVA-OneVision checkpoint, so that everything can be tried without a download.

`PATH` is a folder in exactly the layout of a published checkpoint; it is loaded by the same code. This module itself
imports no model library. `python -m earlytom.micro.train` makes the folder's files.
"""

import json
from pathlib import Path

PATH = Path(__file__).resolve().parent
"""Folder of the bundled checkpoint."""


def is_trained(folder: Path = PATH) -> bool:
    """Whether the weights in `folder` were trained: false where its config.json says `"earlytom_trained": false`.

    A published checkpoint does not have the field, and counts as trained.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("earlytom_trained", True))
