"""Empty figures: of the size that a README shows, or of any. matplotlib is loaded here only."""

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


def new_figure(columns: int) -> tuple[Any, Sequence[Any]]:
    """A figure and its panels, from left to right."""
    from matplotlib.figure import Figure

    figure = _on_canvas(Figure(figsize=_SIZE, dpi=_DPI, layout="constrained"))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def blank(size: tuple[float, float], dpi: int, colour: tuple[float, float, float]) -> Any:
    """A figure without panels: its size in inches, its background as shares of red, green and blue."""
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
