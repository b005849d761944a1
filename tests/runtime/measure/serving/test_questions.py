"""What is sent is what was meant: the video's bytes, its hash, copies that differ in their hash alone."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.measure.serving.questions import SentVideo, Workload
from runtime.video import load_clip

MP4 = b"\0\0\0\x08ftyp"


def sent(body: bytes) -> tuple[dict[str, Any], bytes, str]:
    told = json.loads(body)
    ((video, text),) = (message["content"] for message in told["messages"])
    kind, content = video["video_url"]["url"].split(",")
    assert (kind, text["type"]) == ("data:video/mp4;base64", "text")
    return told, base64.b64decode(content, validate=True), text["text"]


@given(st.binary(max_size=50), st.integers(0, 2**64 - 1))
def test_a_copy_is_the_file_and_an_empty_box(rest: bytes, number: int) -> None:
    video = SentVideo("a.mp4", MP4 + rest)
    encoded, sha256 = video.copy(number)
    content = base64.b64decode(encoded, validate=True)
    assert content.startswith(MP4 + rest)
    box = content[len(MP4 + rest) :]
    assert (int.from_bytes(box[:4], "big"), box[4:8]) == (len(box), b"free")
    assert int.from_bytes(box[-8:], "big") == number
    assert hashlib.sha256(content).hexdigest() == sha256 != video.sha256
    assert video.copy(number ^ 1)[1] != sha256


def test_a_copy_has_the_frames_of_the_file(drawn_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.mp4"
    path.write_bytes(base64.b64decode(SentVideo("a", drawn_clip.read_bytes()).copy(5)[0]))
    frames, same = (load_clip(one, 8, (72, 72)).frames for one in (drawn_clip, path))
    assert bool((frames == same).all())


def test_a_body_is_a_request() -> None:
    work = Workload([(SentVideo("a", MP4), 'Why "so"?\n')], "tom", 7)
    told, content, question = sent(work.known(0).body)
    assert (content, question) == (MP4, 'Why "so"?\n')
    assert (told["model"], told["max_tokens"], told["temperature"], told["stream"]) == ("tom", 7, 0, True)
    assert told["stream_options"] == {"include_usage": True}
    told, *_ = sent(work.known(0, stream=False).body)
    assert (told["stream"], "stream_options" in told) == (False, False)


def test_fresh_videos_are_new_to_every_server() -> None:
    one, other = (Workload([(SentVideo("a", MP4), "Why?")], "tom", 7) for _ in range(2))
    requests = [work.fresh(0) for work in (one, other) for _ in range(5)]
    assert len({request.sha256 for request in requests}) == 10
    assert all(hashlib.sha256(sent(request.body)[1]).hexdigest() == request.sha256 for request in requests)


@given(st.floats(0, 1), st.integers(0, 1000))
def test_the_share_of_repeated_videos(share: float, seed: int) -> None:
    videos = [SentVideo(name, MP4 + name.encode()) for name in "abc"]
    work = Workload([(video, "Why?") for video in videos], "tom", 7)
    drawn = list(work.draw(600, share, seed))
    assert sum(not one.fresh for one in drawn) / 600 == pytest.approx(share, abs=0.12)
    assert {one.pair for one in drawn} == {0, 1, 2}
    assert all((one.sha256 == videos[one.pair].sha256) != one.fresh for one in drawn)
    again = list(work.draw(600, share, seed))
    assert [(one.pair, one.fresh) for one in again] == [(one.pair, one.fresh) for one in drawn]
    assert all(one.stream for one in drawn)
    assert sum(one.stream for one in work.draw(10, share, seed, alternate=True)) == 5


def test_what_cannot_be_drawn_is_refused() -> None:
    work = Workload([(SentVideo("a.mkv", b"\x1a\x45\xdf\xa3 matroska"), "Why?")], "tom", 7)
    assert len(list(work.draw(2, 1.0, 0))) == 2
    with pytest.raises(UserError, match=r"a\.mkv is no mp4.*--repeat 1"):
        work.draw(2, 0.9, 0)
    with pytest.raises(UserError, match="the share of repeated videos"):
        work.draw(2, 1.1, 0)


def test_an_answer_to_another_question_is_noticed() -> None:
    work = Workload([(SentVideo("a", MP4), "Why?"), (SentVideo("b", MP4 + b"b"), "Why?")], "tom", 7)
    request, other = work.known(0), work.known(1)
    assert work.right(request, "anything", "")  # nothing is known yet
    work.learn(0, "because")
    assert work.right(request, "because", request.sha256)
    assert not work.right(request, "because not", request.sha256)
    assert not work.right(request, "because", other.sha256)
    fresh = work.fresh(0)
    assert work.right(fresh, "because", fresh.sha256)
    assert not work.right(fresh, "because", request.sha256)
