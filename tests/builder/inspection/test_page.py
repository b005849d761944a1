"""The report of an engine: what stands in it, that it needs nothing else, and that it looks right in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.inspection import page
from builder.inspection.clip import saved_clip
from builder.inspection.page import REPORT_PAGE
from builder.inspection.record import describe
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.builder.inspection.engine_folders import Command, look_compiled, seal
from tests.processes import HANG_SECONDS

CHROMIUM = shutil.which("chromium-headless-shell")


def test_a_build_leaves_its_report(engine: Path) -> None:
    text, record = (engine / REPORT_PAGE).read_text("utf-8"), describe(engine)
    manifest = Manifest.read(engine)
    assert REPORT_PAGE not in manifest.files
    assert f"<h1>{manifest.name}</h1>" in text
    assert text.count("<figure") == text.count("data:image/png;base64,") == manifest.frames
    assert sum(map(int, re.findall(r'data-kept="(\d+)"', text))) == manifest.tokens
    for check in record["verification"]["checks"]:
        assert f'<td class="v">{check["what"]}</td>' in text
    for row in record["layers"]["kinds"][:5]:
        assert f">{row['kind']}</td>" in text
    assert f"of {manifest.tokens_full:,} visual tokens" in text
    assert "Drift by layer" in text


def test_nothing_comes_from_elsewhere(engine: Path) -> None:
    text = (engine / REPORT_PAGE).read_text("utf-8")
    assert not re.findall(r"""(?:src|href)="(?!data:)|@import|url\(|https?://|<script|<link|\bon\w+=["']""", text)


def test_the_way_in_which_it_takes_clips_is_said(engine: Path) -> None:
    """Of records that say so: what they are of other engines is built elsewhere."""
    record = describe(engine)
    plain = page.page_of(record, None)
    assert not re.search("videos at once|frames as they come|<b>int8|% in int8|as usual", plain)
    counts, manifest = record["counts"][-1], record["manifest"]
    kept = [[16, 16, 16], [10, 12, 14], [7, 9, 11], [5, 6, 8]]
    other = record | {"counts": [counts | {"frames": 8}, counts]}
    other["manifest"] = manifest | {"batch": 2, "chunk": 4, "int8": [], "frames_kept": kept}
    other["layers"] = record["layers"] | {"int8_share": 0.863}
    text = page.page_of(other, None)
    for words in (f"8 or {manifest['frames']} frames", "2 videos at once", "frames as they come, 4 at a time"):
        assert f", {words}" in text
    assert f"<b>int8, {manifest['dtype']}</b>" in text
    assert ", 86.30% in int8;" in text
    assert "<b>16 \u2192 12 \u2192 9 \u2192 6</b>" in text
    assert "as many frames left as usual" in text


def test_inspect_makes_it_again(command: Command, engine: Path, tmp_path: Path) -> None:
    target = tmp_path / "again.html"
    status, out, err = command(engine, "--html", target)
    assert (status, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["report"] == str(target)
    assert target.read_text("utf-8") == (engine / REPORT_PAGE).read_text("utf-8")


def test_two_engines_are_no_page(command: Command, engine: Path, tmp_path: Path) -> None:
    status, _, err = command(engine, "--html", tmp_path / "a.html", "--compare", engine)
    assert (status, err) == (2, "error: --html shows one engine: leave out --compare\n")


def test_what_comes_from_outside_is_text(copy: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    old = Manifest.read(copy)
    assert old.verification is not None
    gate = json.loads(json.dumps(old.verification)) | {"clips": [hostile], "notes": [hostile]}
    seal(copy, name=hostile, backend_version=hostile, verification=gate)
    text = page.page_of(describe(copy), saved_clip(copy, Manifest.read(copy)))
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 5


def test_an_engine_that_was_not_verified_has_no_pictures(copy: Path) -> None:
    for name in (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE):
        (copy / name).unlink()
    seal(copy, verification=None, polygraphy="")
    text = page.page_of(describe(copy), saved_clip(copy, Manifest.read(copy)))
    assert "<figure" not in text
    assert "not verified" in text
    assert "--no-verify" in text


def test_a_compiled_engine_shows_its_layers(copy: Path) -> None:
    text = page.write(look_compiled(copy), copy / "page.html").read_text("utf-8")
    assert ">kgen</td>" in text


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"frames": 3}]', "null", '[{"frames": {"array": "x"}}]'])
@pytest.mark.parametrize("name", [layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE])
def test_saved_frames_that_are_none_are_left_out(name: str, content: str, copy: Path) -> None:
    assert saved_clip(copy, Manifest.read(copy)) is not None  # negative control
    (copy / name).write_text(content)
    assert saved_clip(copy, Manifest.read(copy, verify_files=False)) is None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("drives Debian's chromium-headless-shell, which is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser with playwright")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_every_screen(browser: Any, engine: Path, scheme: str, width: int) -> None:
    said: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.set_default_timeout(HANG_SECONDS * 1000)
    tab.on("console", lambda message: said.append(message.text))
    tab.goto((engine / REPORT_PAGE).as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 380) == (scheme == "dark")
    assert said == []
    tab.close()
