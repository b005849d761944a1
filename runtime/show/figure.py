"""Empty figures, of the size that a README shows or of any, and how one is written. matplotlib is loaded here only."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from earlytom.numbers import shown

ENDINGS = (".png", ".mp4")  # of pictures
_SIZE, _DPI = (9.0, 4.5), 160  # inches; a README shows about 900 pixels


def new_figure(
    columns: int, rows: int = 1, *, size: tuple[float, float] = _SIZE, dpi: int = _DPI, **shared: bool
) -> tuple[Any, Sequence[Any]]:
    """A figure and its panels, row by row from left to right.

    Args:
        size: in inches.
        shared: sharex, sharey: whether panels have one scale.
    """
    from matplotlib.figure import Figure

    figure = _on_canvas(Figure(figsize=size, dpi=dpi, layout="constrained"))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def tidy(axes: Any) -> None:
    """A light grid, and lines on the left and below only."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG whose bytes do not tell by which version it was drawn; returns its path."""
    figure.savefig(path, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return path


def blank(size: tuple[float, float], dpi: int, colour: str) -> Any:
    """A figure without panels: its size in inches, its background."""
    from matplotlib.figure import Figure

    return _on_canvas(Figure(figsize=size, dpi=dpi, facecolor=colour))


def require_matplotlib(flag: str = "--plot") -> None:
    """Raise UserError unless matplotlib can be loaded: before a measurement of minutes, not after it."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UserError(
            f'matplotlib is not installed, which {flag} draws with: pip install "earlytom-engine-builder[plot]"'
        ) from error


def check_picture(path: str | os.PathLike[str], name: str) -> Path:
    """Where a picture goes; `name` is what asked for it.

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
    """No display is needed, and pyplot's global state stays untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return figure
