"""Videos found again by what they are: one flight a key, the least recent goes, no key sees another's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.pipeline import Pipeline
from runtime.serve.videos import Found, VideoKey, Videos
from runtime.text.messages import ChatMessage
from runtime.video import Clip, load_clip
from tests.processes import HANG_SECONDS as LONG

pytestmark = pytest.mark.usefixtures("one_thread")

TALK = [ChatMessage("user", "Which digit is on the circle?", video=True)]


@pytest.fixture(scope="module")
def pipeline(bundled_engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(bundled_engine, device="cpu", backend="onnxruntime") as made:
        yield made


@pytest.fixture(scope="module")
def clip(pipeline: Pipeline, drawn_clip: Path) -> Clip:
    return load_clip(drawn_clip, pipeline.manifest.frames, pipeline.manifest.model.preprocessing.size)


class Given:
    """A client's video, decoded when it is told to, and how often that was."""

    def __init__(self, clip: Clip | Exception, key: VideoKey) -> None:
        self.clip, self.key = clip, key
        self.closed = self.decoded = 0
        self.go = asyncio.Event()
        self.go.set()

    def close(self) -> None:
        self.closed += 1

    async def decode(self) -> Clip:
        await self.go.wait()
        self.decoded += 1
        if isinstance(self.clip, Exception):
            raise self.clip
        return self.clip

    def found_in(self, videos: Videos) -> Awaitable[Found]:
        return asyncio.ensure_future(videos.find(self.key, self, TALK, self.decode))


@pytest.fixture
def key(pipeline: Pipeline) -> Callable[..., VideoKey]:
    before = pipeline.check(TALK).prefix_ids

    def make(sha256: str = "a", owner: str = "k", frames: int | None = None) -> VideoKey:
        return VideoKey(sha256, before, frames, owner)

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, LONG)

    asyncio.run(limited())


def test_a_video_is_decoded_once_and_read_once(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def twice() -> None:
        videos, given = Videos(pipeline, 4), Given(clip, key())
        first = await given.found_in(videos)
        second = await given.found_in(videos)
        assert first.watched is second.watched
        assert (given.decoded, given.closed) == (1, 2)
        assert (first.decode_seconds, second.decode_seconds) == (clip.decode_seconds, 0)
        asked = [await asyncio.to_thread(one.watched.ask, TALK) for one in (first, second)]
        assert {one.tokens for one in asked} == {pipeline.ask(clip, TALK).tokens}
        assert [one.cached_tokens > 0 for one in asked] == [False, True]

    run(twice())


def test_who_comes_while_it_is_decoded_waits_for_that(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def together() -> None:
        videos, all_given = Videos(pipeline, 4), [Given(clip, key()) for _ in range(5)]
        all_given[0].go.clear()
        waiting = [one.found_in(videos) for one in all_given]
        await asyncio.sleep(0)
        all_given[0].go.set()
        found = await asyncio.gather(*waiting)
        assert len({id(one.watched) for one in found}) == 1
        assert [one.decoded for one in all_given] == [1, 0, 0, 0, 0]
        assert [one.closed for one in all_given] == [1] * 5
        assert [one.decode_seconds > 0 for one in found] == [True, False, False, False, False]

    run(together())


@pytest.mark.parametrize("other", [{"sha256": "b"}, {"owner": "l"}, {"frames": 16}])
def test_another_key_is_another_video(pipeline: Pipeline, clip: Clip, key: Any, other: dict[str, Any]) -> None:
    async def both() -> None:
        videos = Videos(pipeline, 4)
        given = Given(clip, key()), Given(clip, key(**other))
        found = [await one.found_in(videos) for one in given]
        assert found[0].watched is not found[1].watched
        assert [one.decoded for one in given] == [1, 1]
        asked = [await asyncio.to_thread(one.watched.ask, TALK) for one in found]
        assert [one.cached_tokens for one in asked] == [0, 0]

    run(both())


def test_the_least_recent_goes(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def three() -> None:
        videos = Videos(pipeline, 2)
        a, b, c = (Given(clip, key(name)) for name in "abc")
        for one in (a, b, a, c):
            await one.found_in(videos)
        assert len(videos) == 2
        for one in (a, c, b):
            await one.found_in(videos)
        assert [one.decoded for one in (a, b, c)] == [1, 2, 1]

    run(three())


def test_what_cannot_be_decoded_is_told_to_all_and_tried_again(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def broken() -> None:
        videos, given = Videos(pipeline, 4), [Given(VideoError("no video"), key()) for _ in range(3)]
        for one in await asyncio.gather(*(one.found_in(videos) for one in given), return_exceptions=True):
            assert isinstance(one, UserError)
        assert [one.closed for one in given] == [1, 1, 1]
        good = Given(clip, key())
        await good.found_in(videos)
        assert good.decoded == 1

    run(broken())


def test_one_of_several_may_leave(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def leave() -> None:
        videos, given = Videos(pipeline, 4), [Given(clip, key()) for _ in range(2)]
        given[0].go.clear()
        first, second = (asyncio.ensure_future(one.found_in(videos)) for one in given)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        given[0].go.set()
        assert (await second).decode_seconds == 0
        assert first.cancelled()

    run(leave())


def test_when_all_have_left_decoding_ends(pipeline: Pipeline, clip: Clip, key: Any) -> None:
    async def leave() -> None:
        videos, given = Videos(pipeline, 4), [Given(clip, key()) for _ in range(2)]
        given[0].go.clear()
        waiting = [asyncio.ensure_future(one.found_in(videos)) for one in given]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(0)
        assert [one.closed for one in given] == [1, 1]
        assert [one.decoded for one in given] == [0, 0]
        again = Given(clip, key())
        await again.found_in(videos)
        assert again.decoded == 1

    run(leave())
