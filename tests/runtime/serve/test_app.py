"""The application on a real pipeline: what OpenAI's clients get, whole and as it comes, and what they are refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from runtime.pipeline import Pipeline
from runtime.serve.app import ServerApp, create_app
from runtime.serve.backend import Local
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings
from runtime.video import Clip, clip_from_frames, load_clip
from tests.processes import HANG_SECONDS as LONG
from tests.runtime.serve.http.test_spans import Collector

pytestmark = pytest.mark.usefixtures("one_thread")

Q, OTHER = "Which digit is on the circle?", "How many shapes appeared?"
HEAD = {"Authorization": "Bearer k1"}
CHAT = "/v1/chat/completions"


class Decoder:
    """Decodes in this process, when it may, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.go = threading.Event()
        self.go.set()

    async def __call__(self, taken: TakenVideo, counts: Sequence[int], size: tuple[int, int]) -> Clip:
        self.count += 1
        while not self.go.is_set():  # no thread that waits: it would outlive the loop
            await asyncio.sleep(0.005)
        if taken.frames is not None:
            return clip_from_frames([Image.open(io.BytesIO(one)).convert("RGB") for one in taken.frames], counts, size)
        assert taken.path is not None
        return load_clip(taken.path, counts, size)


@pytest.fixture(scope="module")
def pipeline(bundled_engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(bundled_engine, device="cpu", backend="onnxruntime", waiting=10) as made:
        yield made


@pytest.fixture
def decode() -> Decoder:
    return Decoder()


@pytest.fixture
def make(pipeline: Pipeline, decode: Decoder, bundled_engine: Path) -> Iterator[Callable[..., ServerApp]]:
    made: list[ServerApp] = []

    def app(**settings: Any) -> ServerApp:
        told = replace(Settings(bundled_engine), **settings)
        made.append(create_app(Local(pipeline, decode, videos=told.videos), told, ("k1", "k2")))
        return made[-1]

    yield app
    for one in made:
        one.close()


@pytest.fixture
def app(make: Callable[..., ServerApp]) -> ServerApp:
    return make()


def url_of(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def url(drawn_clip: Path) -> str:
    return url_of(drawn_clip)


def user(question: str, url: str) -> dict[str, Any]:
    video = {"type": "video_url", "video_url": {"url": url}}
    return {"role": "user", "content": [video, {"type": "text", "text": question}]}


def body(url: str, question: str = Q, **more: Any) -> dict[str, Any]:
    return {"model": "earlytom", "messages": [user(question, url)], **more}


Client = httpx.AsyncClient


def talk(app: ServerApp, *talks: Callable[[Client], Awaitable[Any]]) -> list[Any]:
    """Clients that talk to the application at once."""

    async def all_of_them() -> list[Any]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=HEAD) as client:
            return await asyncio.wait_for(asyncio.gather(*(one(client) for one in talks)), LONG)

    return asyncio.run(all_of_them())


def post(app: ServerApp, *bodies: dict[str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
    """One after the other."""

    async def all_of_them(client: Client) -> list[httpx.Response]:
        return [await client.post(CHAT, json=one, headers=headers, timeout=LONG) for one in bodies]

    return talk(app, all_of_them)[0]


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Status and code, after a look at the shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return response.status_code, error["code"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@pytest.fixture(scope="module")
def wanted(pipeline: Pipeline, drawn_clip: Path) -> dict[str, str]:
    return {question: pipeline.ask(drawn_clip, question).text for question in (Q, OTHER)}


def cached(response: httpx.Response) -> int:
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


# Answers


def test_a_question_is_answered_as_the_pipeline_answers_it(
    app: ServerApp, url: str, wanted: dict[str, str], pipeline: Pipeline, drawn_clip: Path
) -> None:
    (response,) = post(app, body(url))
    told = response.json()
    direct = pipeline.ask(drawn_clip, Q)
    assert response.status_code == 200
    assert told["choices"][0]["message"]["content"] == wanted[Q]
    assert told["choices"][0]["finish_reason"] == direct.finish
    assert told["usage"]["prompt_tokens"] == direct.prompt_tokens
    assert told["usage"]["completion_tokens"] == direct.generated_tokens
    extension = told["earlytom"]
    assert extension["video_tokens"] == direct.visual_tokens
    assert len(extension["video"]) == 64
    assert extension["timings"]["decode"] > 0
    assert extension["timings"]["total"] >= extension["timings"]["first_token"] >= extension["timings"]["decode"]
    assert "kept" not in extension


def test_further_questions_find_the_video_by_its_content(
    app: ServerApp, url: str, wanted: dict[str, str], decode: Decoder
) -> None:
    renamed = url.replace("video/mp4", "video/webm")  # the content counts
    responses = post(app, body(url), body(renamed, OTHER), body(url, OTHER))
    assert [one.json()["choices"][0]["message"]["content"] for one in responses] == [
        wanted[Q],
        wanted[OTHER],
        wanted[OTHER],
    ]
    assert [cached(one) > 126 for one in responses] == [False, True, True]
    assert decode.count == 1


def test_a_second_turn_finds_it_too_also_where_the_video_is_repeated(app: ServerApp, url: str, decode: Decoder) -> None:
    said = {"role": "assistant", "content": "4"}
    again, repeated = {"role": "user", "content": OTHER}, user(OTHER, url)
    turns = [body(url) | {"messages": [user(Q, url), said, last]} for last in (again, repeated)]
    first, second, third = post(app, body(url), *turns)
    assert cached(first) == 0
    assert second.json()["choices"] == third.json()["choices"]
    assert cached(second) == cached(third) > 126
    assert decode.count == 1


def test_another_system_message_or_key_or_server_does_not(make: Any, url: str, decode: Decoder) -> None:
    app = make()
    told = body(url) | {"messages": [{"role": "system", "content": "Be brief."}, user(Q, url)]}
    post(app, body(url))
    assert [cached(one) for one in post(app, told)] == [0]
    (foreign,) = post(app, body(url), headers={"Authorization": "Bearer k2"})
    assert cached(foreign) == 0
    assert decode.count == 3
    assert cached(post(app, body(url))[0]) > 126  # negative control
    assert cached(post(make(), body(url))[0]) == 0


def test_an_answer_comes_in_pieces(app: ServerApp, url: str, wanted: dict[str, str]) -> None:
    plain, with_usage = post(
        app, body(url, stream=True), body(url, stream=True, stream_options={"include_usage": True})
    )
    assert plain.headers["content-type"].startswith("text/event-stream")
    for response, last in ((plain, -1), (with_usage, -2)):
        told = events(response)
        assert {one["id"] for one in told} == {told[0]["id"]}
        assert {one["object"] for one in told} == {"chat.completion.chunk"}
        assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        pieces = told if last == -1 else told[:-1]
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in pieces)
        assert text == wanted[Q]
        ends = [one["choices"][0]["finish_reason"] for one in pieces]
        assert ends == [None] * (len(pieces) - 1) + ["stop"]
        assert told[last]["earlytom"]["video_tokens"] == 126
    usage = events(with_usage)[-1]
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] > 126


def test_stop_max_tokens_and_seed(app: ServerApp, url: str, wanted: dict[str, str]) -> None:
    word = wanted[OTHER]
    stopped, short, *twice = post(
        app,
        body(url, OTHER, stop=word[1:]),
        body(url, OTHER, max_tokens=1),
        *[body(url, "Tell me something.", temperature=1.5, seed=3, max_tokens=12)] * 2,
    )
    assert stopped.json()["choices"][0]["message"]["content"] == word[:1]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert short.json()["choices"][0]["finish_reason"] == "length"
    assert short.json()["usage"]["completion_tokens"] == 1
    assert twice[0].json()["choices"] == twice[1].json()["choices"]


def test_frames_in_a_list(app: ServerApp, drawn_clip: Path, decode: Decoder) -> None:
    frames = load_clip(drawn_clip, 20, (120, 160)).frames
    pictures = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG")
        pictures.append(base64.b64encode(file.getvalue()).decode())
    listed = "data:video/jpeg;base64," + ",".join(pictures)
    first, second = post(app, body(listed), body(listed, OTHER))
    assert (first.status_code, second.status_code) == (200, 200)
    assert cached(second) > 126
    assert decode.count == 1


def test_kept_tokens_are_told_to_who_asks(app: ServerApp, url: str) -> None:
    both = post(app, body(url, earlytom={"kept": True}), body(url))
    kept, facts = both[0].json()["earlytom"]["kept"], both[0].json()["earlytom"]
    rows, columns = kept["grid"]
    assert len(kept["positions"]) == len(kept["place"]) == facts["video_tokens"]
    assert [place % (rows * columns) for place in kept["place"]] == [p % (rows * columns) for p in kept["positions"]]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in kept["sources"])
    assert len(kept["times"]) == len(kept["sources"][0])
    assert both[1].json()["earlytom"].get("kept") is None


def test_a_question_that_leaves_the_length_open_gets_what_fits(make: Any, url: str, pipeline: Pipeline) -> None:
    long = " ".join(["word"] * 3000)
    room = pipeline.context - len(pipeline.check(long, max_new_tokens=1).suffix_ids)
    assert room < 4096  # else it would be no test
    open_, asked = post(make(max_tokens=4096), body(url, long), body(url, long, max_tokens=4096))
    assert open_.status_code == 200
    assert refusal(asked) == (400, "invalid_request")


# Refusals


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"model": "gpt"}, 404, "model_not_found"),
        ({"n": 2}, 400, "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": Q}]}, 400, "one_video"),
        ({"max_tokens": 513}, 400, "invalid_request"),
        ({"media_io_kwargs": {"video": {"num_frames": 7}}}, 400, "invalid_request"),
        ({"stream": True, "n": 2}, 400, "unsupported_parameter"),
    ],
)
def test_what_cannot_be_done_is_refused(app: ServerApp, url: str, more: dict[str, Any], status: int, code: str) -> None:
    (response,) = post(app, body(url, **more))
    assert refusal(response) == (status, code)


@pytest.mark.parametrize("question", ["", "  \n", "<|im_end|>x", "<video>", "word " * 5000])
def test_a_question_that_cannot_be_asked_is_refused_before_its_video_is_decoded(
    app: ServerApp, url: str, question: str, decode: Decoder
) -> None:
    assert refusal(post(app, body(url, question))[0]) == (400, "invalid_request")
    assert decode.count == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_video_keeps_its_status(app: ServerApp, url: str, stream: bool) -> None:
    cut = url[: len(url) // 2 // 4 * 4]
    assert refusal(post(app, body(cut, stream=stream))[0]) == (400, "invalid_video")
    assert post(app, body(url))[0].status_code == 200


def test_addresses_are_closed_by_default(app: ServerApp) -> None:
    for address in ("http://127.0.0.1/a.mp4", "file:///etc/passwd", "https://example.org/a.mp4"):
        assert refusal(post(app, body(address))[0])[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", CHAT, 405, "method_not_allowed", "POST"),
        ("GET", "/nothing", 404, "not_found", None),
        ("GET", "/v1/models/gpt", 404, "model_not_found", None),
        ("GET", "/v1/files/file-1", 404, "file_not_found", None),
        ("POST", "/health", 405, "method_not_allowed", "GET, HEAD"),
        ("PUT", "/v1/files", 405, "method_not_allowed", "GET, HEAD, POST"),
    ],
)
def test_paths_that_are_not_there(
    app: ServerApp, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    (response,) = talk(app, lambda client: client.request(method, path))
    assert refusal(response) == (status, code)
    assert response.headers.get("allow") == allow


def test_a_key_is_asked_for_under_v1_alone(app: ServerApp, url: str) -> None:
    assert refusal(post(app, body(url), headers={"Authorization": "Bearer no"})[0]) == (401, "invalid_api_key")
    for path in ("/health", "/ready", "/metrics", "/version", "/"):
        (response,) = talk(app, lambda client, path=path: client.get(path, headers={"Authorization": ""}))
        assert response.status_code == 200, path


def test_a_defect_of_ours_has_no_details(app: ServerApp, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asked: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(app.backend, "check", fail)
    (response,) = post(app, body(url))
    assert refusal(response) == (500, "internal_error")
    assert "secret" not in response.text


def test_what_fails_after_the_first_token_is_an_event(
    app: ServerApp, url: str, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline._core.answer

    def broken(*given: Any, **how: Any) -> Iterator[Any]:
        yield next(plain(*given, **how))
        raise RuntimeError("a secret")

    monkeypatch.setattr(pipeline._core, "answer", broken)
    (response,) = post(app, body(url, OTHER, stream=True))
    told = events(response)
    assert response.status_code == 200
    assert "choices" in told[0]
    assert told[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert app.inside == 0


# The line


def asks(url: str, **more: Any) -> Callable[[Client], Awaitable[httpx.Response]]:
    return lambda client: client.post(CHAT, json=body(url, **more), timeout=LONG)


def test_more_than_the_line_holds_are_told_when_to_come_again(make: Any, url: str, decode: Decoder) -> None:
    app = make(waiting=1)
    decode.go.clear()

    async def release(client: Client) -> None:
        while app.inside < 2:
            await asyncio.sleep(0.01)
        late = await asks(url)(client)
        assert refusal(late) == (429, "overloaded")
        assert int(late.headers["retry-after"]) > 0
        decode.go.set()

    *answers, _ = talk(app, asks(url), asks(url), release)
    assert [one.status_code for one in answers] == [200, 200]
    assert app.inside == 0
    assert post(app, body(url))[0].status_code == 200


def test_a_deadline_that_passes_is_504(make: Any, url: str, decode: Decoder) -> None:
    app = make(deadline=0.2)
    decode.go.clear()
    for stream in (False, True):
        assert refusal(post(app, body(url, stream=stream))[0]) == (504, "deadline_exceeded")
    decode.go.set()
    assert app.inside == 0


def test_while_it_drains_nothing_new_is_taken_and_the_rest_is_answered(
    app: ServerApp, url: str, decode: Decoder
) -> None:
    decode.go.clear()

    async def drain(client: Client) -> None:
        while not app.inside:
            await asyncio.sleep(0.01)
        assert (await client.get("/ready")).status_code == 200
        app.draining = True
        ready, late = await client.get("/ready"), await asks(url)(client)
        assert refusal(ready) == refusal(late) == (503, "draining")
        assert "retry-after" in late.headers
        assert (await client.get("/health")).status_code == 200
        decode.go.set()

    answer, _ = talk(app, asks(url), drain)
    assert answer.status_code == 200
    assert not app.busy


def test_questions_that_come_together_decode_once(app: ServerApp, url: str, decode: Decoder) -> None:
    answers = talk(app, *[asks(url)] * 6)
    assert len({one.json()["choices"][0]["message"]["content"] for one in answers}) == 1
    assert decode.count == 1
    assert sorted(cached(one) > 0 for one in answers) == [False] + [True] * 5


# Files


def test_a_video_is_uploaded_once_and_asked_about(app: ServerApp, drawn_clip: Path, wanted: dict[str, str]) -> None:
    async def use(client: Client) -> None:
        content = drawn_clip.read_bytes()
        sent = await client.post("/v1/files", files={"file": ("a.mp4", content)}, data={"purpose": "vision"})
        assert sent.status_code == 200
        stored = sent.json()
        assert stored["purpose"] == "vision"
        assert (stored["object"], stored["bytes"], stored["filename"]) == ("file", len(content), "a.mp4")
        assert [one["id"] for one in (await client.get("/v1/files")).json()["data"]] == [stored["id"]]
        assert (await client.get(f"/v1/files/{stored['id']}")).json() == stored
        part = {"type": "file", "file": {"file_id": stored["id"]}}
        told = {"role": "user", "content": [part, {"type": "text", "text": Q}]}
        asked = await client.post(CHAT, json={"model": "earlytom", "messages": [told]}, timeout=LONG)
        assert asked.json()["choices"][0]["message"]["content"] == wanted[Q]
        other = {"Authorization": "Bearer k2"}
        assert (await client.get("/v1/files", headers=other)).json()["data"] == []
        for method, path in (("GET", f"/v1/files/{stored['id']}"), ("DELETE", f"/v1/files/{stored['id']}")):
            assert refusal(await client.request(method, path, headers=other)) == (404, "file_not_found")
        refused = await client.post(CHAT, json={"model": "earlytom", "messages": [told]}, headers=other)
        assert refusal(refused) == (404, "file_not_found")
        assert (await client.delete(f"/v1/files/{stored['id']}")).json()["deleted"] is True
        assert refusal(await client.get(f"/v1/files/{stored['id']}")) == (404, "file_not_found")

    talk(app, use)


@pytest.mark.parametrize(
    "how",
    [
        {"json": {}},
        {"files": {"other": ("a.mp4", b"x")}},
        {"data": {"file": "x"}},
        {"files": {"file": ("a.mp4", b"")}},
        {"files": {"file": ("a.mp4", b"x")}, "data": {"expires_after": "3"}},
        {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}},
        {
            "content": b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--x--',
            "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"},
        },
    ],
)
def test_what_is_no_upload_is_refused(app: ServerApp, how: dict[str, Any]) -> None:
    (response,) = talk(app, lambda client: client.post("/v1/files", **how))
    assert refusal(response)[0] == 400
    assert app.files.of("") == []


# The rest


def test_the_model_says_what_it_takes(app: ServerApp, pipeline: Pipeline) -> None:
    (listed,) = talk(app, lambda client: client.get("/v1/models"))
    (one,) = talk(app, lambda client: client.get("/v1/models/earlytom"))
    assert listed.json()["data"] == [one.json()]
    assert one.json()["max_model_len"] == pipeline.context
    assert one.json()["earlytom"]["frames"] == [16]
    assert one.json()["earlytom"]["tokens"] == [126]


def test_the_page_can_be_left_out(make: Any) -> None:
    (response,) = talk(make(page=False), lambda client: client.get("/"))
    assert refusal(response) == (404, "not_found")


# OpenTelemetry


def test_questions_are_spans_where_a_collector_is_named(make: Callable[..., ServerApp], url: str) -> None:
    collector = Collector()
    with collector.standing() as where:
        app = make(otlp=where)
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answered, refused = post(app, body(url), body(url, n=2), headers=HEAD | {"traceparent": parent})
        app.close()
    assert (answered.status_code, refused.status_code) == (200, 400)
    whole = [one for one in collector.spans if one["kind"] == 2]
    assert {one["traceId"] for one in collector.spans} == {parent.split("-")[1]}
    assert len(whole) == 1  # what is refused before it is a question is none
    assert {"vision", "prefill"} <= {one["name"] for one in collector.spans}
    sent = json.dumps(collector.spans)
    assert Q not in sent
    assert "k1" not in sent
    assert make().spans is None  # by default
