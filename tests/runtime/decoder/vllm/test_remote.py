"""vLLM's side of an answer behind an address: what goes there, and what becomes of what comes back.

The server is a stand-in whose decoder is real (`tests.runtime.decoder.vllm.stand_in`); `make vllm-check` does the same
with vLLM.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from earlytom.errors import UserError
from runtime.checkpoint import describe, load_decoder
from runtime.checkpoint.language_model import load_embeddings
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.naming import DecoderAddress, address_of, decoder_named
from runtime.decoder.sampling import Sampling
from runtime.decoder.vllm.remote import RemoteDecoder
from runtime.errors import Cancelled, DecoderAway, DecoderFailed
from runtime.pipeline import Pipeline
from runtime.video import Clip, load_clip
from tests.processes import HANG_SECONDS as LONG
from tests.runtime.decoder.vllm.stand_in import LISTED, NAME, Raw, StandIn, reply, standing

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ("What happens?", "Which digit is on the circle?")
TOKENS = 12


@pytest.fixture(scope="module")
def own(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def stand_in(talkative: Path) -> StandIn:
    return StandIn(Decoder.from_model(load_decoder(talkative)))


@pytest.fixture(scope="module")
def url(stand_in: StandIn) -> Iterator[str]:
    with standing(stand_in) as found:
        yield found


@pytest.fixture(scope="module")
def remote(engine: Path, url: str, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu", decoder=url) as made:
        yield made


@pytest.fixture(scope="module")
def clip(own: Pipeline, drawn_clip: Path) -> Clip:
    return load_clip(drawn_clip, own.manifest.frames, own.manifest.model.preprocessing.size)


@pytest.fixture
def holding(stand_in: StandIn) -> Iterator[threading.Event]:
    """The stand-in says nothing until it is set."""
    go = threading.Event()
    stand_in.hold = lambda token: go.wait(LONG)
    yield go
    go.set()
    stand_in.hold = lambda token: None


# Answers


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_embeddings_that_arrive_are_those_of_embed(
    own: Pipeline, remote: Pipeline, stand_in: StandIn, clip: Clip, question: str
) -> None:
    remote.ask(clip, question, max_new_tokens=1)
    assert torch.equal(stand_in.embeds[-1], own.embed(clip, question)[0])
    assert torch.equal(remote.embed(clip, question), own.embed(clip, question))


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_our_decoder(own: Pipeline, remote: Pipeline, clip: Clip, question: str) -> None:
    wanted, got = (one.ask(clip, question, max_new_tokens=TOKENS) for one in (own, remote))
    assert (got.tokens, got.text, got.finish) == (wanted.tokens, wanted.text, wanted.finish)
    assert len(got.tokens) > 4  # else little would be shown
    pieces = list(remote.stream(clip, question, max_new_tokens=TOKENS))
    assert tuple(piece.token for piece in pieces[:-1]) == wanted.tokens


def test_a_stop_token_ends_an_answer(own: Pipeline, stand_in: StandIn, url: str, clip: Clip) -> None:
    embeds = own.embed(clip, QUESTIONS[0])
    decoder = RemoteDecoder(DecoderAddress(url), stand_in._decoder._embedding.weight, 4096)  # type: ignore[union-attr]
    assert decoder.limit == 512  # the server's
    tokens = list(decoder.stream(embeds, max_new_tokens=TOKENS))
    stream = decoder.stream(embeds, max_new_tokens=TOKENS, stop_ids=(tokens[3],))
    finish = None

    def all_of() -> Any:
        nonlocal finish
        finish = yield from stream

    found = list(all_of())
    assert (found, finish) == (tokens[: tokens.index(tokens[3])], "stop")


def test_a_watched_video_is_sent_whole_each_time(
    own: Pipeline, remote: Pipeline, stand_in: StandIn, clip: Clip
) -> None:
    """vLLM finds what it has read by its content."""
    with own.watch(clip) as ours, remote.watch(clip) as theirs:
        for question in QUESTIONS:
            wanted = ours.ask(question, max_new_tokens=TOKENS)
            got = theirs.ask(question, max_new_tokens=TOKENS)
            assert got.tokens == wanted.tokens
            assert torch.equal(stand_in.embeds[-1], own.embed(clip, question)[0])
            assert got.cached_tokens == wanted.cached_tokens > 100
        assert remote.watched.counters.bytes == got.cached_tokens * 256 * 4


def test_how_tokens_are_drawn_is_told(remote: Pipeline, stand_in: StandIn, clip: Clip) -> None:
    remote.ask(clip, "What?", max_new_tokens=3, sampling=Sampling(0.5, 0.9, 7, seed=11))
    body = stand_in.bodies[-1]
    assert [body[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")] == [0.5, 0.9, 7, 11, 3]
    neutral = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    assert [body[name] for name in neutral] == [0.0, 1.0, 0.0, 0.0]  # whatever the server's own are
    assert body["ignore_eos"] is True


def test_many_are_answered_at_a_time(
    own: Pipeline, remote: Pipeline, stand_in: StandIn, clip: Clip, holding: threading.Event
) -> None:
    wanted = {question: own.ask(clip, question, max_new_tokens=TOKENS).tokens for question in QUESTIONS}
    together = 6
    arrived = threading.Semaphore(0)
    stand_in.hold = lambda token: (arrived.release(), holding.wait(LONG))
    stand_in.most = 0
    with remote.watch(clip) as watched, ThreadPoolExecutor(together) as pool:
        asked = [pool.submit(watched.ask, QUESTIONS[n % 2], max_new_tokens=TOKENS) for n in range(together)]
        for _ in range(together):  # each has a token to give, and none has been given
            assert arrived.acquire(timeout=LONG)
        assert remote.running == together
        holding.set()
        for number, one in enumerate(asked):
            assert one.result(LONG).tokens == wanted[QUESTIONS[number % 2]]
    assert stand_in.most == together


def test_who_leaves_ends_the_answer_there(
    remote: Pipeline, stand_in: StandIn, clip: Clip, holding: threading.Event
) -> None:
    came, closed = threading.Event(), threading.Event()
    tokens = itertools.count()

    def hold(token: int) -> None:
        came.set()
        (holding if next(tokens) == 0 else closed).wait(LONG)

    stand_in.hold = hold
    request = remote.submit(clip, QUESTIONS[0], max_new_tokens=200)
    assert came.wait(LONG)
    request.cancel()
    with pytest.raises(Cancelled):
        request.result()
    holding.set()  # the first token comes, and nobody wants it
    end = time.monotonic() + LONG
    while remote.running:
        assert time.monotonic() < end
        time.sleep(0.01)
    closed.set()
    assert stand_in.left.acquire(timeout=LONG)
    assert remote.ask(clip, QUESTIONS[0], max_new_tokens=2).tokens


def test_values_that_are_not_finite_are_not_sent(url: str, stand_in: StandIn, talkative: Path) -> None:
    """vLLM would take them."""
    values = load_embeddings(describe(talkative), torch.float32).values
    decoder = RemoteDecoder(DecoderAddress(url), values, 4096)
    broken, count = values[None, :5].clone(), len(stand_in.embeds)
    broken[0, 3, 7] = torch.nan
    with pytest.raises(UserError, match="values that are not finite"):
        list(decoder.stream(broken, max_new_tokens=2))
    with pytest.raises(UserError, match="values that are not finite"):
        decoder.prefill(broken)
    assert len(stand_in.embeds) == count
    assert len(list(decoder.stream(values[None, :5], max_new_tokens=2))) == 2  # negative control


# What comes back


def event(ids: Any, finish: Any = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": ids, "finish_reason": finish}]}).encode() + b"\n\n"


class Fixed(RemoteDecoder):
    """A decoder on a server that has changed since it was opened."""

    def __init__(self, url: str, was: str) -> None:
        super().__init__(DecoderAddress(was), torch.eye(8), 64, silent_seconds=0.3)
        self._wire = type(self._wire)(DecoderAddress(url), silent_seconds=0.3)


@pytest.fixture(scope="module")
def tame() -> Iterator[str]:
    """A server that takes whatever comes, for the probe."""
    listed = json.dumps(LISTED).encode()

    class Probed(Raw):
        def _answer(self, client: Any) -> None:
            with client:
                head = client.recv(1 << 16)
                if head.startswith(b"GET"):
                    client.sendall(reply(listed, kind="application/json"))
                    return
                while b'"return_token_ids"' not in head:
                    head += client.recv(1 << 16)
                client.sendall(reply(event([1], "length") + b"data: [DONE]\n\n"))

    with Probed().standing() as url:
        yield url


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (event([1, 2, 3], "length"), "more than the 2 tokens asked for"),
        (event([8]), "answered with token 8 of 8"),
        (event([-1]), "answered with token -1 of 8"),
        (event(None), "without token ids"),
        (event([1.0]), "without token ids"),
        (event([True]), "without token ids"),
        (event("12"), "without token ids"),
        (event([1], "content_filter"), "ended an answer with 'content_filter'"),
        (b'data: {"choices": 3}\n\n', "an event without choices"),
        (b'data: {"choices": [3]}\n\n', "an event without choices"),
        (b"data: [1]\n\n", "an event without choices"),
        (b'data: {"choices": [{}, {}]}\n\n', "2 choices"),
        (b"data: [DONE]\n\n", "ended before its end"),
        (event([1]) + b"data: [DONE]\n\n", "ended before its end"),
    ],
)
def test_an_answer_that_makes_no_sense_is_one_line(tame: str, content: bytes, line: str) -> None:
    with Raw(reply(content)).standing() as url:
        decoder = Fixed(url, tame)
        with pytest.raises(DecoderFailed, match=line.replace("[", r"\[")):
            list(decoder.stream(torch.zeros(1, 3, 8), max_new_tokens=2))


def test_endless_events_without_tokens_are_given_up(tame: str) -> None:
    endless = Raw(reply(b""), *[b'data: {"choices": []}\n\n' * 4000] * 100)
    with endless.standing() as url, pytest.raises(DecoderFailed, match="sent more than"):
        list(Fixed(url, tame).stream(torch.zeros(1, 3, 8), max_new_tokens=2))


# Refusals


@pytest.mark.parametrize(
    ("listed", "line"),
    [
        ({}, "lists no model with its max_model_len"),
        ([1], "lists no model with its max_model_len"),
        ({"data": [{"id": NAME}]}, "lists no model with its max_model_len"),
        ({"data": [{"id": NAME, "max_model_len": 2}]}, "none is left for an answer"),
        ({"data": [{"id": n, "max_model_len": 64} for n in "ab"]}, "has 2 models: name one of 'a', 'b' behind a #"),
    ],
)
def test_a_server_without_one_model_is_refused(stand_in: StandIn, listed: Any, line: str) -> None:
    with standing(StandIn(stand_in._decoder, listed)) as url, pytest.raises(DecoderFailed, match=line):
        RemoteDecoder(DecoderAddress(url), torch.eye(8), 64)


def test_one_of_several_models_is_named_behind_the_address(url: str, stand_in: StandIn) -> None:
    several = {"data": [{"id": n, "max_model_len": 64} for n in ("other", NAME)]}
    values = stand_in._decoder._embedding.weight
    with standing(StandIn(stand_in._decoder, several)) as address:
        found = address_of(f"{address}#{NAME}")
        assert found is not None
        assert RemoteDecoder(found, values, 4096).limit == 64  # type: ignore[arg-type]
        with pytest.raises(DecoderFailed, match="has no model 'third', but 'language-model', 'other'"):
            RemoteDecoder(DecoderAddress(address, "third"), values, 4096)  # type: ignore[arg-type]


def test_embeddings_of_another_width_are_refused_when_it_is_opened(url: str) -> None:
    with pytest.raises(DecoderFailed, match="refused with status 400: `prompt_embeds` hidden_size 8 does not match"):
        RemoteDecoder(DecoderAddress(url), torch.eye(8), 64)


def test_a_key_is_asked_for(engine: Path, stand_in: StandIn, clip: Clip) -> None:
    with standing(StandIn(stand_in._decoder, key="secret")) as url:
        with pytest.raises(DecoderFailed, match=r"asks for another API key .*--decoder-key-file"):
            Pipeline.load(engine, device="cpu", decoder=url)
        with Pipeline.load(engine, device="cpu", decoder=url, decoder_key="secret") as made:
            assert made.ask(clip, "What?", max_new_tokens=1).tokens


def test_a_server_that_is_not_there_is_one_line(engine: Path) -> None:
    with pytest.raises(DecoderAway, match=r"the decoder at http://127\.0\.0\.1:9/v1 cannot be reached"):
        Pipeline.load(engine, device="cpu", decoder="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"bias": True}, "no positions or attention bias: use --no-bias --positions consecutive, or --decoder"),
        ({"positions": "original"}, "no positions or attention bias"),
        ({"inner": InnerMerge(1)}, "inner merging runs in the PyTorch decoder, not in http"),
        ({"decoder": "vllm:"}, "unknown decoder 'vllm:'"),
        ({"decoder": "vllm", "decoder_key": "x"}, "what a vLLM server asks for"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(
    engine: Path, url: str, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr("runtime.parts.load_tokenizer", None)
    monkeypatch.setattr("runtime.parts.open_backend", None)
    with pytest.raises(UserError, match=line) as caught:
        Pipeline.load(engine, **{"device": "cpu", "decoder": url, **how})
    assert "\n" not in str(caught.value)


def test_the_decoder_itself_refuses_them_too(remote: Pipeline) -> None:
    decoder, embeds = remote.decoder, torch.zeros(1, 3, 256)
    assert decoder is not None
    for how in ({"bias": torch.zeros(3)}, {"positions": torch.arange(3)}):
        calls: list[Callable[..., Any]] = [decoder.prefill, lambda e, **h: decoder.stream(e, max_new_tokens=1, **h)]
        for call in calls:
            with pytest.raises(UserError, match="no positions or attention bias"):
                call(embeds, **how)
    with pytest.raises(UserError, match=r"need 513 positions, the decoder has 512: .*--max-model-len"):
        decoder.stream(embeds, max_new_tokens=510)
    with pytest.raises(UserError, match="leaves no room"):
        decoder.prefill(torch.zeros(1, 511, 256))
    with pytest.raises(ValueError, match="inputs_embeds must be"):
        decoder.stream(torch.zeros(1, 3, 8), max_new_tokens=1)


def test_vllm_has_to_be_installed_for_the_decoder_in_this_process(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    with pytest.raises(UserError, match="vLLM is not installed"):
        Pipeline.load(engine, device="cpu", decoder="vllm")
    with pytest.raises(UserError, match="there is no language model; write one with"):
        Pipeline.load(engine, device="cpu", decoder="vllm:/nowhere")


@pytest.mark.parametrize(
    "text", ["torch", "torch-tensorrt", "vllm", "vllm:a/b", "http://a/v1", "https://a:1/v1/", "http://[::1]:1/v1#x"]
)
def test_names_of_decoders(text: str) -> None:
    assert decoder_named(text) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("tensorrt", "unknown decoder 'tensorrt': expected torch, torch-tensorrt, vllm, vllm:FOLDER or http"),
        ("vllm:", "unknown decoder"),
        (None, "unknown decoder None"),
        ("http://", "no address"),
        ("http://a:b/v1", "no address"),
        ("http://a b/v1", "no address"),
        ("http://a/v1\r\nx: y", "no address"),
        ("http://u:p@a/v1", "leave out user, password and query"),
        ("http://a/v1?x", "leave out user, password and query"),
    ],
)
def test_what_names_no_decoder(text: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        decoder_named(text)


def test_addresses_end_without_a_slash() -> None:
    assert address_of("http://a:1/v1/#m") == DecoderAddress("http://a:1/v1", "m")
    assert address_of("vllm") is None
