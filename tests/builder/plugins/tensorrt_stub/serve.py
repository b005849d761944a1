"""The build process of `builder.compile.engine` with the stand-in in TensorRT's place: a request in, an answer out."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import stand_in

from builder.compile import process
from runtime import trt as seam

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        original = seam.load

        def load(flavour: str) -> Any:
            """Where the process loads TensorRT, the stand-in is put in its place first."""
            stand_in.load(Path(folder))
            return original(flavour)

        seam.load = load
        sys.exit(process.serve())
