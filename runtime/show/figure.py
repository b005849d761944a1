"""matplotlib figures: making, tidying and saving them. matplotlib is imported when one is made."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from earlytom.numbers import shown

ENDINGS = (".png", ".mp4")  # file name suffixes of pictures
_SIZE, _DPI = (9.0, 4.5), 160  # inches; a README shows about 900 pixels


def new_figure(
    columns: int, rows: int = 1, *, size: tuple[float, float] = _SIZE, dpi: int = _DPI, **shared: bool
) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, row by row from left to right.

    Args:
        size: (width, height) in inches.
        shared: sharex, sharey: whether axes have one scale.
    """
    from matplotlib.figure import Figure

    figure = _on_canvas(Figure(figsize=size, dpi=dpi, layout="constrained"))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def tidy(axes: Any) -> None:
    """Give axes a light grid, and spines on the left and below only."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG without matplotlib's version in its metadata; returns its path."""
    figure.savefig(path, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return path


def blank(size: tuple[float, float], dpi: int, colour: str) -> Any:
    """A figure without axes, of `size` (width, height) in inches and background `colour`."""
    from matplotlib.figure import Figure

    return _on_canvas(Figure(figsize=size, dpi=dpi, facecolor=colour))


def require_matplotlib(flag: str = "--plot") -> None:
    """Raise UserError unless matplotlib can be imported; to call before a measurement of minutes, not after it."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UserError(
            f'matplotlib is not installed, which {flag} draws with: pip install "earlytom-engine-builder[plot]"'
        ) from error


def check_picture(path: str | os.PathLike[str], name: str) -> Path:
    """The checked path of a picture to write; `name` is the flag or argument in messages.

    Raises:
        UserError: neither .png nor .mp4, a folder that does not exist, or matplotlib is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise UserError(f"{name} {shown(str(path))}: give a name that ends in {' or '.join(ENDINGS)}")
    if not target.parent.is_dir():
        raise UserError(f"{name} {shown(str(path))}: its folder does not exist; make it, or choose another")
    require_matplotlib(name)
    return target


def _on_canvas(figure: Any) -> Any:
    """Give a figure an Agg canvas: needs no display, and leaves pyplot's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return figure
