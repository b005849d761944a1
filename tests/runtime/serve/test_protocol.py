"""What a request may say, and what an answer looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoder.sampling import Sampling
from runtime.serve.errors import ServeError
from runtime.serve.protocol import ChatRequest, Reply, parse, usage_of

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def read(**more: Any) -> ChatRequest:
    return parse(json.dumps(GOOD | more).encode(), (8, 16), 512)


def refused(content: bytes) -> ServeError:
    with pytest.raises(ServeError) as caught:
        parse(content, (8, 16), 512)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


def test_what_a_short_request_means() -> None:
    assert read() == ChatRequest("m", GOOD["messages"], Sampling(), (), None, None, False, False, False)


def test_every_field_that_is_supported_arrives() -> None:
    found = read(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=7,
        stop=["a", "b"],
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        media_io_kwargs={"video": {"num_frames": 8}},
        earlytom={"kept": True},
        user="somebody",
    )
    assert found.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=5, seed=7)
    assert (found.stop, found.max_tokens, found.frames) == (("a", "b"), 9, 8)
    assert (found.stream, found.include_usage, found.kept) == (True, True, True)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"logprobs": False, "top_logprobs": 0},
        {"stop": None, "seed": None, "temperature": None, "stream": None, "tools": None, "nonsense": None},
        {"top_k": -1},
        {"stop": "."},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream_options": {}, "media_io_kwargs": {"video": {}}},
        {"temperature": 1},
        {"tool_choice": "auto", "parallel_tool_calls": True, "metadata": {"a": "b"}, "prompt_cache_key": "c"},
        {"min_p": 0.0, "best_of": 1, "ignore_eos": False, "chat_template_kwargs": {}, "skip_special_tokens": True},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
)
def test_what_happens_anyway_may_be_asked_for(more: dict[str, Any]) -> None:
    assert read(**more).model == "m"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.1}, "presence_penalty", "unsupported_parameter"),
        ({"nonsense": 1}, "nonsense", "unsupported_parameter"),
        ({"nonsense\n\ud800": 1}, "nonsense", "unsupported_parameter"),
        ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
        ({"ignore_eos": True}, "ignore_eos", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unsupported_parameter"),
        ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs.image", "unsupported_parameter"),
        ({"media_io_kwargs": {"video": {"fps": 2}}}, "video.fps", "unsupported_parameter"),
        ({"earlytom": {"x": 1}}, "earlytom.x", "unsupported_parameter"),
        ({"model": None}, "model", "invalid_request"),
        ({"model": 3}, "model", "invalid_request"),
        ({"messages": None}, "messages", "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": {}}, "messages", "invalid_request"),
        ({"stream": "yes"}, "stream", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
        ({"stream_options": []}, "stream_options", "invalid_request"),
        ({"temperature": -1}, "temperature", "invalid_request"),
        ({"temperature": "hot"}, "temperature", "invalid_request"),
        ({"temperature": True}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"top_p": 1.1}, "top_p", "invalid_request"),
        ({"top_k": -2}, "top_k", "invalid_request"),
        ({"top_k": 1.5}, "top_k", "invalid_request"),
        ({"seed": -1}, "seed", "invalid_request"),
        ({"seed": 2**63}, "seed", "invalid_request"),
        ({"stop": [""]}, "stop", "invalid_request"),
        ({"stop": ""}, "stop", "invalid_request"),
        ({"stop": ["a"] * 5}, "stop", "invalid_request"),
        ({"stop": ["a" * 257]}, "stop", "invalid_request"),
        ({"stop": 3}, "stop", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": 513}, "max_tokens", "invalid_request"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_request"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "invalid_request"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_request"),
        ({"media_io_kwargs": {"video": {"num_frames": 7}}}, "media_io_kwargs.video.num_frames", "invalid_request"),
        ({"media_io_kwargs": {"video": {"num_frames": 8.0}}}, "media_io_kwargs.video.num_frames", "invalid_request"),
        ({"media_io_kwargs": {"video": {"num_frames": [8]}}}, "media_io_kwargs.video.num_frames", "invalid_request"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(more: dict[str, Any], param: str, code: str) -> None:
    error = refused(json.dumps(GOOD | more).encode())
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(param)


def test_the_engine_s_frame_counts_are_listed() -> None:
    error = refused(json.dumps(GOOD | {"media_io_kwargs": {"video": {"num_frames": 7}}}).encode())
    assert "8, 16 frames, got 7" in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"1" * 5000 + b"}",
        "{}".encode("utf-16"),
        b'{"a": [' + b"[]," * 200_001 + b"0]}",
    ],
)
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    assert refused(content).code == "invalid_request"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "seed"),
        *("stop", "media_io_kwargs", "earlytom", "n", "tools", "logprobs", "x"),
    ]
)


@given(st.dictionaries(NAMES, JSON))
def test_anything_is_read_or_refused(more: dict[str, Any]) -> None:
    assert status_of(lambda: read(**more)) in (200, 400)


def status_of(call: Callable[[], object]) -> int:
    try:
        call()
    except ServeError as error:
        return error.status
    return 200


def test_an_answer_has_openai_s_shape() -> None:
    reply, usage = Reply("chatcmpl-1", 5, "m"), usage_of(10, 4, 3)
    whole = reply.whole("four", "stop", usage, {"video": "abc"})
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "four", "refusal": None}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == 13
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    piece = reply.chunk({"content": "fo"})
    assert (piece["object"], piece["id"]) == ("chat.completion.chunk", whole["id"])
    assert piece["choices"][0] == {"index": 0, "delta": {"content": "fo"}, "logprobs": None, "finish_reason": None}
    assert reply.usage_chunk(usage)["choices"] == []
