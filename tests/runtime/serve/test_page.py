"""The page: what it may do, and what it does in a browser, before a server that answers as the real one."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from runtime.drawing.clips import draw_clip
from runtime.serve.gate import Door
from runtime.serve.http.connection import connections
from runtime.serve.page import content, page, policy
from tests.processes import HANG_SECONDS
from tests.runtime.serve.servers import serving

CHROMIUM = shutil.which("chromium-headless-shell")
FRAMES, ROWS, COLUMNS = 8, 6, 5
CELLS = ROWS * COLUMNS
# Slots 0 and 1 are the frames 0 and 4; frames 1 to 3 went into the first. 7 cells in one, 4 in the other.
PLACE = [0, 3, 7, 8, 12, 20, 29, *(4 * CELLS + cell for cell in (1, 2, 3, 28))]


def html() -> str:
    return content()


def test_the_policy_allows_the_pages_own_script_and_nothing_else() -> None:
    response = TestClient(Starlette(routes=[Route("/", page)])).get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    allowed = response.headers["content-security-policy"]
    assert allowed == policy(html())
    assert "default-src 'none'" in allowed
    assert allowed.count("sha256-") == 2
    assert not [word for word in ("unsafe", "http:", "https:", "*") if word in allowed]


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.findall(r"""(?:src|href)="(?!data:)|@import|url\(|https?://|\bon\w+=["']| style=""", html())
    assert not re.findall(r"<script(?!>)|<style(?!>)", html())
    assert "innerHTML" not in html()  # an answer is text


def test_a_changed_script_is_not_the_one_that_is_allowed() -> None:
    """Negative control."""
    assert policy(html().replace("use strict", "use strict ")) != policy(html())


class Stage:
    """A server behind the real gate, with an answer that can be held up."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.uploads = 0

    def app(self) -> Any:
        routes = [
            Route("/", page),
            Route("/v1/models", self.models),
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]
        return Door(Starlette(routes=routes), keys=("k1",), max_body=100 << 20)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "ours"}]})

    async def upload(self, request: Request) -> Response:
        await request.form()
        self.uploads += 1
        return JSONResponse({"id": "file-1"})

    async def answer(self, request: Request) -> Response:
        self.asked.append(await request.json())
        return StreamingResponse(self.chunks(), media_type="text/event-stream")

    async def chunks(self) -> Any:
        import asyncio

        def data(**said: Any) -> str:
            return f"data: {json.dumps(said)}\n\n"

        try:
            for word in ("top", " left <b>é"):
                yield data(choices=[{"delta": {"content": word}, "finish_reason": None}])
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
                    yield ": ping\n\n"
        finally:
            self.left.set()
        names = ("waiting", "decode", "preprocess", "vision", "prefill", "first_token", "per_token", "total")
        timings = dict(zip(names, (0.0, 0.031, 0.004, 0.24, 0.052, 0.331, 0.012, 0.391), strict=True))
        sources = [[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4]
        positions = [at if at < CELLS else at - 3 * CELLS for at in PLACE]
        kept = {"positions": positions, "sources": sources, "place": PLACE, "grid": [ROWS, COLUMNS]}
        kept["times"] = [0.75 * frame for frame in range(FRAMES)]
        yield data(choices=[{"delta": {}, "finish_reason": "stop"}])
        yield data(choices=[], earlytom={"video_tokens": len(PLACE), "timings": timings, "kept": kept})
        yield "data: [DONE]\n\n"


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def base(stage: Stage) -> Iterator[str]:
    with serving(stage.app(), http=connections(), lifespan="off") as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("drives Debian's chromium-headless-shell, which is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser with playwright")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def tab(browser: Any, base: str) -> Iterator[Any]:
    """The page, opened; what it says to the console, and to whom it speaks, is checked at the end."""
    log: list[str] = []
    elsewhere: list[str] = []
    one = browser.new_page(viewport={"width": 1200, "height": 900})
    one.set_default_timeout(HANG_SECONDS * 1000)
    one.on("console", lambda message: log.append(message.text))
    one.on("pageerror", lambda error: log.append(str(error)))
    one.on(
        "request", lambda sent: elsewhere.append(sent.url) if not sent.url.startswith((base, "blob:", "data:")) else 0
    )
    one.goto(base + "/")
    yield one
    one.close()
    assert not elsewhere
    assert not [line for line in log if "401" not in line]


def ask(tab: Any, clip: Path, key: str = "k1") -> None:
    tab.set_input_files("#video", str(clip))
    tab.fill("#key", key)
    tab.click("button:has-text('Ask')")


def done(tab: Any) -> None:
    tab.wait_for_selector("body[data-done]", state="attached")


def test_a_question_is_answered_and_drawn(tab: Any, stage: Stage, clip: Path, tmp_path: Path) -> None:
    ask(tab, clip)
    done(tab)
    assert tab.inner_text("#answer") == "top left <b>é"
    assert not tab.is_visible("#err")
    (asked,) = stage.asked
    assert (asked["model"], asked["stream"], asked["earlytom"]) == ("ours", True, {"kept": True})
    video, question = asked["messages"][0]["content"]
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert question["text"]
    kept = tab.eval_on_selector_all("canvas", "all => all.map(one => +one.dataset.kept)")
    assert kept == [7, 0, 0, 0, 4, 0, 0, 0]
    assert tab.locator("#bars div").count() == 4
    assert "240 ms" in tab.inner_text("#bars")
    assert f"11 of {FRAMES * CELLS} cells" in tab.inner_text("#note")
    # A kept cell shows the film, one that is not is nearly the paper's colour.
    row = """one => {
        const data = one.getContext("2d").getImageData(0, 0.5 * one.height / 6, one.width, 1).data;
        return [0.5, 1.5].map(at => Array.from(data.slice(4 * Math.floor(at * one.width / 5)).slice(0, 3)));
    }"""
    film, dimmed = tab.eval_on_selector("canvas", row)
    assert min(dimmed) > 180
    assert min(film) < 150
    tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)


def test_the_words_come_one_by_one_and_stop_ends_it(tab: Any, stage: Stage, clip: Path) -> None:
    stage.go_on.clear()
    ask(tab, clip)
    tab.wait_for_selector("#answer:text-is('top')")
    assert tab.is_disabled("#ask")
    tab.click("#stop")
    done(tab)
    assert tab.inner_text("#err") == "Stopped."
    assert stage.left.wait(HANG_SECONDS)  # the server has heard of it
    assert not tab.is_visible("#stop")
    stage.go_on.set()
    tab.click("button:has-text('Ask')")
    tab.wait_for_selector("canvas")
    assert not tab.is_visible("#err")


def test_a_refusal_is_one_line(tab: Any, clip: Path) -> None:
    ask(tab, clip, "wrong")
    done(tab)
    assert "key" in tab.inner_text("#err")
    assert tab.inner_text("#answer") == ""
    assert not tab.is_visible("#times")


def test_without_a_video_it_says_so(tab: Any) -> None:
    tab.click("button:has-text('Ask')")
    done(tab)
    assert tab.inner_text("#err") == "Choose a video first."


def test_a_large_video_is_uploaded_once(tab: Any, stage: Stage, clip: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(clip.read_bytes() + b"\0\0\0\x08free" * (1 << 20) + b"\0\0\0\x08free")
    for _ in range(2):
        ask(tab, large) if not stage.asked else tab.click("button:has-text('Ask')")
        done(tab)
    assert stage.uploads == 1
    assert [one["messages"][0]["content"][0] for one in stage.asked] == [
        {"type": "file", "file": {"file_id": "file-1"}}
    ] * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_any_window(tab: Any, stage: Stage, clip: Path, tmp_path: Path, width: int, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    ask(tab, clip)
    done(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.screenshot(path=str(tmp_path / f"{scheme}-{width}.png"), full_page=True)
