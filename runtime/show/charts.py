"""Graphs of an HTML page: how frames were merged, bars, and a curve. Colours come from the page's style
(`runtime.show.colours`), light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.show.html import Html, element
from runtime.show.kept import KeptCells

_STEP, _HIGH, _EDGE = 40, 150, 26  # graph of frames, in SVG units: width of a frame, height, edge
_NARROWEST, _WIDEST = 36, 66  # pixels of a frame in it
_CURVE = (560, 190, 46, 26)  # a curve's width, height, left and lower margins


def frames_graph(kept: KeptCells) -> Html:
    """An SVG graph: input frames above, remaining frames below, and lines as strong as the weights between them."""
    frames, left = len(kept.cells), len(kept.sources)
    width = _STEP * max(frames, 1)

    def at(index: int, count: int) -> float:
        return width * (index + 0.5) / count

    lines = []
    for frame, slot, share in sorted(kept.links(), key=lambda link: link[2]):
        top, bottom, middle = at(frame, frames), at(slot, left), _HIGH / 2
        path = f"M{top:.1f},{_EDGE} C{top:.1f},{middle} {bottom:.1f},{middle} {bottom:.1f},{_HIGH - _EDGE}"
        strong = {"stroke_width": f"{1 + 7 * share:.2f}", "stroke_opacity": f"{0.2 + 0.7 * share:.2f}"}
        lines.append(element("path", element("title", _share(frame, slot, share)), d=path, class_="link", **strong))
    nodes = [_node(at(n, frames), _EDGE - 9, n + 1, bool(kept.cells[n])) for n in range(frames)]
    nodes += [_node(at(n, left), _HIGH - _EDGE + 9, n + 1, True) for n in range(left)]
    graph = element(
        "svg",
        *lines,
        *nodes,
        viewBox=f"0 0 {width} {_HIGH}",
        style=f"min-width:{_NARROWEST * frames}px;max-width:{_WIDEST * frames}px",
        role="img",
        aria_label=f"{frames} frames became {left}",
    )
    return element("div", graph, class_="graph wide")


def _share(frame: int, slot: int, share: float) -> str:
    return f"{share:.0%} of frame {slot + 1} that is left is frame {frame + 1}"


def _node(x: float, y: float, number: int, strong: bool) -> Html:
    text = element("text", number, x=f"{x:.1f}", y=f"{y + 4:.1f}", text_anchor="middle")
    disc = element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="10", class_="node" if strong else "node weak")
    return element("g", disc, text)


def bar(share: float, kind: str = "") -> Html:
    """A bar filled by `share`; shares above 1 fill it."""
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 100.0
    return element("span", element("i", style=f"width:{width:.1f}%"), class_=f"bar {kind}".strip())


def pair(name: str, full: float, compressed: float, shown: Sequence[str]) -> Html:
    """The full and the compressed cost of something as two bars; `shown`: their texts."""
    most = max(full, compressed) or 1.0
    return element(
        "div",
        element("h3", name),
        element("p", element("span", "full", class_="label"), bar(full / most, "plain"), element("b", shown[0])),
        element("p", element("span", "kept", class_="label"), bar(compressed / most), element("b", shown[1])),
        class_="pair",
    )


def curve(points: Sequence[tuple[str, float]], limit: float, what: str) -> Html:
    """A curve of values on a logarithmic scale, and a line at the limit that none should reach.

    `points`: name and value of each; values of 0 or less are drawn at the bottom.
    """
    width, height, left, below = _CURVE
    logs = [math.log10(value) if value > 0 and math.isfinite(value) else -math.inf for _, value in points]
    finite = [value for value in (*logs, math.log10(limit)) if value > -math.inf]
    low, high = math.floor(min(finite)), math.ceil(max(finite) + 1e-9)
    high = max(high, low + 1)

    def y(value: float) -> float:
        return 10 + (height - below - 10) * (high - max(value, low)) / (high - low)

    def x(index: int) -> float:
        return left + (width - left - 20) * (index + 0.5) / max(len(points), 1)

    step = max(1, (high - low) // 5)
    grid = [
        element("g", element("line", x1=left, x2=width, y1=f"{y(n):.1f}", y2=f"{y(n):.1f}", class_="rule"),
                element("text", f"1e{n}", x=left - 6, y=f"{y(n) + 4:.1f}", text_anchor="end"))
        for n in range(low, high + 1, step)
    ]  # fmt: skip
    bound = f"{y(math.log10(limit)):.1f}"
    places = [(x(index), y(value)) for index, value in enumerate(logs)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    every = max(1, len(points) // 14)
    names = [
        element("text", name, x=f"{x(n):.1f}", y=height - 6, text_anchor="middle")
        for n, (name, _) in enumerate(points)
        if n % every == 0
    ]
    dots = [
        element("circle", element("title", f"{name}: {value:.3g}"), cx=f"{a:.1f}", cy=f"{b:.1f}", r="4", class_="dot")
        for (name, value), (a, b) in zip(points, places, strict=True)
    ]
    drawn = element(
        "svg",
        *grid,
        element("line", x1=left, x2=width, y1=bound, y2=bound, class_="limit"),
        element("text", "limit", x=width - 4, y=f"{float(bound) - 5:.1f}", text_anchor="end", class_="limit"),
        element("polyline", points=line, class_="curve"),
        *dots,
        *names,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=what,
    )
    return element("div", drawn, class_="graph")
