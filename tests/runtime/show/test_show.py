"""What everything that is drawn is made of: kept cells, elements, pixels, charts."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.show import charts, colours, html, png
from runtime.show.frames import kept_frame
from runtime.show.html import Html, element
from runtime.show.kept import KeptCells, grid_of

# Four frames of 2 x 3 cells; 1 and 2 became the first that is left, 4 the second, 3 none.
SOURCES = [[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
PLACE = [0, 5, 18, 19, 23]
KEPT = KeptCells.of(PLACE, SOURCES, (2, 3))


def test_places_are_cells_of_frames() -> None:
    assert KEPT.cells == (frozenset({0, 5}), frozenset(), frozenset(), frozenset({0, 1, 5}))
    assert KEPT.tokens == 5
    assert [KEPT.became(frame) for frame in range(4)] == [(0,), (0,), (), (1,)]
    assert set(KEPT.links()) == {(0, 0, 0.75), (1, 0, 0.25), (3, 1, 1.0)}
    assert [KEPT.fate(frame) for frame in range(4)] == ["2 cells", "merged", "dropped", "3 cells"]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.data())
def test_places_come_back(rows: int, columns: int, frames: int, data: st.DataObject) -> None:
    cells = rows * columns
    place = data.draw(st.lists(st.integers(0, frames * cells - 1), unique=True))
    kept = KeptCells.of(place, np.eye(frames).tolist(), (rows, columns))
    back = [frame * cells + cell for frame, found in enumerate(kept.cells) for cell in found]
    assert sorted(back) == sorted(place)
    assert kept.tokens == len(place)


@pytest.mark.parametrize(
    ("place", "sources"), [([24], SOURCES), ([-1], SOURCES), ([0], [[1.0], [0.0, 1.0]]), ([0], [])]
)
def test_what_does_not_fit_is_refused(place: list[int], sources: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="places"):
        KeptCells.of(place, sources, (2, 3))


@pytest.mark.parametrize(
    ("cells", "size", "grid"),
    [
        (25, (72, 72), (5, 5)),
        (196, (384, 384), (14, 14)),
        (12, (60, 80), (3, 4)),
        (12, (80, 60), (4, 3)),
        (7, (9, 9), (1, 7)),
    ],
)
def test_a_grid_has_cells_that_are_nearly_square(cells: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    found = grid_of(cells, size)
    assert sorted(found) == sorted(grid)
    assert found == grid or cells == 7


# Elements

HOSTILE = "<script>alert(1)</script>\"'&"


def test_what_is_put_into_an_element_is_text() -> None:
    made = element("p", HOSTILE, [element("b", HOSTILE), None], title=HOSTILE, class_="a", data_x=1, id=None)
    assert "<script" not in made
    parsed = ElementTree.fromstring(made)
    assert (parsed.text, parsed.get("title"), parsed[0].text) == (HOSTILE, HOSTILE, HOSTILE)
    assert parsed.attrib == {"title": HOSTILE, "class": "a", "data-x": "1"}


def test_only_elements_are_html() -> None:
    """Negative control: what says that it is one is not escaped again."""
    assert element("p", Html("<b>x</b>")) == "<p><b>x</b></p>"
    assert element("p", "<b>x</b>") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    found: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(element("p", text))
    parser.close()
    assert "".join(found) == text


def test_a_page_may_load_nothing() -> None:
    page = html.page(HOSTILE, "body { color: red }", element("main", "x"))
    assert "default-src &#x27;none&#x27;" in page
    assert page.count("<script") == 0
    with pytest.raises(ValueError, match="style"):
        html.style("</style><script>")


# Pixels


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (72, 72)])
def test_a_png_holds_the_pixels(shape: tuple[int, int]) -> None:
    image_library = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = image_library.open(io.BytesIO(png.encode(pixels)))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), pixels)


def test_a_thumbnail_is_the_mean_of_squares() -> None:
    frame = np.zeros((3, 6, 8), np.uint8)
    frame[0, :2, :2] = [[0, 100], [100, 200]]
    small = png.thumbnail(frame, 4)
    assert small.shape == (3, 4, 3)
    assert small[0, 0].tolist() == [100, 0, 0]
    assert np.array_equal(png.thumbnail(frame, 8), frame.transpose(1, 2, 0))


# Colours


@pytest.mark.parametrize("sheet", ["builder/inspection/report.css", "runtime/serve/page.html"])
def test_pages_have_no_colours_of_their_own(sheet: str) -> None:
    """But for the black behind a film, whose sides are that everywhere."""
    text = (Path(__file__).parents[3] / sheet).read_text("utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0] or text
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[^{}]*[;}])", style)) <= {"#000"}
    named = set(re.findall(r"var\(--(\w+)\)", style)) | set(re.findall(r'"--(\w+)"', text))
    assert {"paper", "accent", "dimmed"} <= named
    assert named <= {*colours.LIGHT, "dimmed"}
    assert colours.LIGHT.keys() == colours.DARK.keys()


def test_a_page_takes_its_colours_light_or_dark() -> None:
    light, dark = colours.css().split("@media(prefers-color-scheme:dark)")
    for name in colours.LIGHT:
        assert f"--{name}:{colours.LIGHT[name]};" in light
        assert f"--{name}:{colours.DARK[name]};" in dark
    assert colours.rgb("accent") == (0xB4, 0x49, 0x1F)


# Charts


def parsed(drawn: Html) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r"(<img[^>]*)>", r"\1/>", drawn))


def test_a_frame_shows_what_was_kept_of_it() -> None:
    figure = parsed(kept_frame("data:,", KEPT, 3, "caption"))
    kinds = [one.get("class") for one in figure.iter("rect")]
    assert (kinds.count("kept"), kinds.count("gone")) == (3, 3)
    assert figure.get("data-kept") == "3"


def test_the_graph_has_every_share() -> None:
    graph = parsed(charts.frames_graph(KEPT))
    widths = sorted(float(str(path.get("stroke-width"))) for path in graph.iter("path"))
    assert widths == [2.75, 6.25, 8.0]
    assert len(list(graph.iter("circle"))) == 4 + 2


@pytest.mark.parametrize("values", [[1e-7, 3e-4], [0.0, 2.0], [float("nan")], [], [1e-3]])
def test_a_curve_of_any_values_stays_in_its_picture(values: list[float]) -> None:
    drawn = parsed(charts.curve([(f"layer {n}", value) for n, value in enumerate(values)], 1e-3, "drift"))
    (svg,) = drawn.iter("svg")
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    dots = list(svg.iter("circle"))
    assert len(dots) == len(values)
    assert all(0 <= float(str(d.get("cx"))) <= width and 0 <= float(str(d.get("cy"))) <= height for d in dots)


@pytest.mark.parametrize(
    ("share", "width"), [(0.5, "50.0%"), (2.0, "100.0%"), (-1.0, "0.0%"), (float("nan"), "100.0%")]
)
def test_a_bar_fills_at_most_its_room(share: float, width: str) -> None:
    (inner,) = parsed(charts.bar(share)).iter("i")
    assert inner.get("style") == f"width:{width}"
