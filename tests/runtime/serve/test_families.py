"""Engines of every family behind the server: answers whole and in pieces, kept cells, further questions."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from builder import build
from earlytom.families import family_named
from runtime.pipeline import Pipeline
from runtime.serve.app import create_app
from runtime.serve.backend import Local
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings
from runtime.text.messages import ChatMessage
from runtime.video import Clip, load_clip
from tests.runtime.checkpoint.family_folders import family_folder
from tests.runtime.serve.test_app import body, events, post, user

pytestmark = pytest.mark.usefixtures("one_thread", "each_export_once")

F, Q, OTHER = 6, "What happens?", "Which digit is on the circle?"
ON = ["--ratio", "0.5", "--merge-layers", "0,1", "--backend", "onnx", "--fp32", "--no-verify"]


@pytest.fixture(scope="module", params=["internvl", "llava_next_video", "llava_qwen", "smolvlm", "qwen2_5_vl"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder, _ = family_folder(tmp_path_factory.mktemp(request.param), request.param, layers=2)
    out = tmp_path_factory.mktemp("engines")
    assert build.main(["--model", str(folder), "--frames", str(F), "--out", str(out), *ON]) == 0
    (engine,) = out.iterdir()
    with Pipeline.load(engine, device="cpu", waiting=10) as made:
        yield made


def test_a_server_answers_with_an_engine_of_the_family(pipeline: Pipeline, drawn_clip: Path) -> None:
    manifest = pipeline.manifest
    sampling = manifest.model.preprocessing.sampling
    decoded: list[Clip] = []

    async def decode(taken: TakenVideo, counts: Sequence[int], size: tuple[int, int]) -> Clip:
        assert taken.path is not None
        decoded.append(load_clip(taken.path, counts, size, sampling=sampling))
        return decoded[-1]

    url = "data:video/mp4;base64," + base64.b64encode(drawn_clip.read_bytes()).decode()
    told: dict[str, Any] = {"max_tokens": 8}
    said = {"role": "assistant", "content": "Red."}
    turns = [user(Q, url), said, {"role": "user", "content": OTHER}]
    backend = Local(pipeline, decode, videos=2)
    app = create_app(backend, Settings(Path(manifest.name)), ("k1",))
    try:
        whole, pieces, other, later = post(
            app,
            body(url, Q, **told, earlytom={"kept": True}),
            body(url, Q, **told, stream=True),
            body(url, OTHER, **told),
            body(url, **told) | {"messages": turns},
        )
    finally:
        app.close()
    direct = pipeline.ask(drawn_clip, Q, max_new_tokens=8, kept=True)
    others = pipeline.ask(drawn_clip, OTHER, max_new_tokens=8)
    talk = [ChatMessage("user", Q, video=True), ChatMessage("assistant", "Red."), ChatMessage("user", OTHER)]
    after = pipeline.ask(drawn_clip, talk, max_new_tokens=8)

    assert [one.status_code for one in (whole, pieces, other, later)] == [200] * 4
    for response, wanted in ((whole, direct), (other, others), (later, after)):
        found = response.json()
        assert found["choices"][0]["message"]["content"] == wanted.text
        assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens
        assert found["usage"]["completion_tokens"] == wanted.generated_tokens
    texts = {one.text for one in (direct, others, after)}
    assert len(texts) > 1  # negative control: the question matters
    streamed = events(pieces)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in streamed) == direct.text
    assert streamed[-1]["earlytom"]["video_tokens"] == manifest.tokens

    # Decoded and read once; further questions and turns find it.
    assert len(decoded) == 1
    cached = [one.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (whole, other, later)]
    assert cached[0] == 0
    assert cached[1] == cached[2] > manifest.tokens

    kept = whole.json()["earlytom"]["kept"]
    assert direct.kept is not None
    assert kept["positions"] == direct.kept.positions.tolist()
    assert kept["place"] == direct.kept.place.tolist()
    assert len(kept["positions"]) == manifest.tokens < manifest.tokens_full
    rows, columns = kept["grid"]
    assert (rows, columns) == backend.facts.grid
    assert rows * columns == manifest.tokens_per_frame
    assert kept["times"] == pytest.approx(list(decoded[0].timestamps), abs=1e-3)
    assert sampling == family_named(manifest.model.family).sampling
    assert (sampling == "middles") == (kept["times"][0] > 0)
