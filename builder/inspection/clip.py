"""The clip of an engine's verification, and what the reference kept of it, from the build's files.

Files are untrusted: for anything but a build's own output the result is None, and a report has no pictures.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from earlytom.errors import UserError
from runtime.engine import layout
from runtime.engine.manifest import REBUILD, Manifest
from runtime.files.plain import MIB, open_plain
from runtime.show.kept import KeptCells, grid_of


class SavedClip(NamedTuple):
    """Frames uint8 [F, 3, H, W] (of a pair of pictures the first), and the cells kept of them."""

    frames: NDArray[np.uint8]
    kept: KeptCells


def saved_clip(folder: Path, manifest: Manifest) -> SavedClip | None:
    """The engine's first clip at its largest frame count; None if the build saved none that fits."""
    size, each = manifest.model.preprocessing.size, manifest.tokens_per_frame
    names = (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE)
    inputs, outputs = (folder / manifest.at(manifest.frames).file(name) for name in names)
    if not (inputs.is_file() and outputs.is_file()):
        return None
    shape = (manifest.frames, 3, *size)
    most = 2 * manifest.batch * (math.prod(shape) + 4 * manifest.tokens * (manifest.dim + 64)) + 8 * MIB
    try:
        frames = _first(_read(inputs, most)[0][layout.FRAMES], len(shape))
        (_, iterations), *_ = _read(outputs, most).items()
        found = iterations[0]
        place = _first(np.asarray(found[layout.PLACE]), 1)
        sources = _first(np.asarray(found[layout.SOURCES]), 2)
        if (frames.dtype, frames.shape) != (np.uint8, shape) or sources.shape[1] != manifest.layout.steps:
            return None
        kept = KeptCells.of(place.astype(int).tolist(), sources.astype(float).tolist(), grid_of(each, size))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, UserError):
        return None
    return SavedClip(frames[:: manifest.layout.sizes.step], kept)


def _first(values: NDArray[Any], rank: int) -> NDArray[Any]:
    """The first of several videos, if there is a batch dimension."""
    return values[0] if values.ndim > rank else values


def _read(path: Path, most: int) -> Any:
    """Load a Polygraphy file of at most `most` bytes, else ValueError; Polygraphy's other errors are passed on."""
    from polygraphy.comparator import RunResults  # noqa: F401 - it registers what such a file may hold
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    with open_plain(path, REBUILD) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"{path.name} is too large")
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            return load_json(str(path))
    except PolygraphyException as error:
        raise ValueError(str(error)) from error
