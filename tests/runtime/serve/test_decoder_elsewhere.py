"""The server with its language model behind an address: the same answers, and failures in one line with a status."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint import load_decoder
from runtime.decoder.eager import Decoder
from runtime.decoder.naming import DecoderAddress
from runtime.decoder.vllm.wire import Wire
from runtime.pipeline import Pipeline
from runtime.serve.app import ServerApp, create_app
from runtime.serve.backend import Local
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings
from runtime.video import Clip, load_clip
from tests.runtime.decoder.vllm.stand_in import Raw, StandIn, reply, standing
from tests.runtime.serve.test_app import body, events, post, refusal, url_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "Which digit is on the circle?"


async def decode(taken: TakenVideo, counts: Sequence[int], size: tuple[int, int]) -> Clip:
    assert taken.path is not None
    return load_clip(taken.path, counts, size)


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn(Decoder.from_model(load_decoder(None)))


@pytest.fixture(scope="module")
def pipeline(bundled_engine: Path, stand_in: StandIn, one_thread: None) -> Iterator[Pipeline]:
    with standing(stand_in) as url, Pipeline.load(bundled_engine, device="cpu", decoder=url) as made:
        yield made


@pytest.fixture
def app(pipeline: Pipeline, bundled_engine: Path) -> Iterator[ServerApp]:
    settings = replace(Settings(bundled_engine), waiting=0)
    made = create_app(Local(pipeline, decode, videos=4), settings, ("k1",))
    yield made
    made.close()


def test_answers_are_those_of_our_decoder(app: ServerApp, bundled_engine: Path, drawn_clip: Path) -> None:
    with Pipeline.load(bundled_engine, device="cpu") as own:
        wanted = own.ask(drawn_clip, QUESTION).text
    url = url_of(drawn_clip)
    whole, streamed = post(app, body(url, QUESTION), body(url, QUESTION, stream=True))
    assert whole.json()["choices"][0]["message"]["content"] == wanted
    pieces = events(streamed)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in pieces if one["choices"]) == wanted


def test_there_are_places_for_as_many_as_are_answered_together(app: ServerApp, pipeline: Pipeline) -> None:
    assert pipeline.lanes == app.backend.facts.lanes > 8
    app.completions.inside = pipeline.lanes - 1  # none may wait, and this many are answered
    assert app.completions.room
    app.completions.inside += 1
    assert not app.completions.room
    app.completions.inside = 0


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (Raw(reply(b"", "500 Oh")), (502, "decoder_failed")),
        (Raw(reply(b"", "404 No")), (502, "decoder_failed")),
        (Raw(reply(b"", "503 Full")), (503, "decoder_unavailable")),
        (Raw(reply(b"data: nonsense\n\n")), (502, "decoder_failed")),
        (Raw(waits=True), (502, "decoder_failed")),
        (None, (503, "decoder_unavailable")),
    ],
)
def test_a_server_that_fails_is_one_line_and_a_status(
    app: ServerApp,
    pipeline: Pipeline,
    drawn_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    raw: Raw | None,
    wanted: tuple[int, str],
) -> None:
    decoder: Any = pipeline.decoder
    url = url_of(drawn_clip)
    with (Raw() if raw is None else raw).standing() as address:
        where = "http://127.0.0.1:9/v1" if raw is None else address
        monkeypatch.setattr(decoder, "_wire", Wire(DecoderAddress(where), silent_seconds=0.3))
        whole, streamed = post(app, body(url, QUESTION), body(url, QUESTION, stream=True))
    for response in (whole, streamed):
        assert refusal(response) == wanted
        assert "127.0.0.1" not in response.text  # where it is, is nobody else's business
        assert ("retry-after" in response.headers) == (wanted[0] == 503)
    monkeypatch.undo()
    assert post(app, body(url, QUESTION))[0].status_code == 200  # and nothing is left of it
    assert app.inside == 0


def test_a_failure_in_mid_answer_ends_the_events(
    app: ServerApp, pipeline: Pipeline, drawn_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = b'data: {"choices": [{"token_ids": [19], "finish_reason": null}]}\n\n'
    with Raw(reply(first)).standing() as address:
        monkeypatch.setattr(pipeline.decoder, "_wire", Wire(DecoderAddress(address), silent_seconds=0.3))
        (response,) = post(app, body(url_of(drawn_clip), QUESTION, stream=True))
    pieces = events(response)
    assert response.status_code == 200
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in pieces if "choices" in one) == "4"
    assert pieces[-1]["error"]["code"] == "decoder_failed"
