"""An empty figure of the size that a README shows. matplotlib is loaded here only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SIZE, _DPI = (9.0, 4.5), 160  # inches; a README shows about 900 pixels


def new_figure(columns: int) -> tuple[Any, Sequence[Any]]:
    """A figure and its panels, from left to right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and pyplot's global state stays untouched
    return figure, figure.subplots(1, columns, squeeze=False)[0]
