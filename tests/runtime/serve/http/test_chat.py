"""Messages of a request: the conversation and the one video in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serve.errors import ServeError
from runtime.serve.http.chat import conversation_of
from runtime.serve.media import VideoPart
from runtime.text.messages import ChatMessage

A, B = "data:video/mp4;base64,AAAA", "data:video/mp4;base64,BBBB"
TEXT = {"type": "text", "text": "What happens?"}


def video(url: str = A) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


SAID = {"role": "assistant", "content": "a ball"}


def test_a_video_and_a_question() -> None:
    for parts in ((video(), TEXT), (TEXT, video())):
        messages, part = conversation_of([user(*parts)])
        assert messages == [ChatMessage("user", "What happens?", video=True)]
        assert part == VideoPart(url=A)


def test_an_uploaded_file() -> None:
    _, part = conversation_of([user({"type": "file", "file": {"file_id": "file-1"}}, TEXT)])
    assert part == VideoPart(file="file-1")


def test_turns_and_a_system_message() -> None:
    for role in ("system", "developer"):
        told = [{"role": role, "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}]
        messages, _ = conversation_of([*told, user(video(), TEXT), SAID, {"role": "user", "content": "Where?"}])
        assert messages == [
            ChatMessage("system", "Be\nbrief."),
            ChatMessage("user", "What happens?", video=True),
            ChatMessage("assistant", "a ball"),
            ChatMessage("user", "Where?"),
        ]


def test_a_video_may_come_in_a_later_turn() -> None:
    messages, _ = conversation_of([{"role": "user", "content": "Hello."}, SAID, user(video(), TEXT)])
    assert [one.video for one in messages] == [False, False, True]


def test_a_video_that_every_turn_repeats_stands_where_it_came_first() -> None:
    messages, part = conversation_of([user(video(), TEXT), SAID, user(video(), TEXT), SAID, user(video(), TEXT)])
    assert [one.video for one in messages] == [True, False, False, False, False]
    assert part == VideoPart(url=A)


def test_an_assistant_s_message_as_the_openai_client_dumps_it() -> None:
    dumped = SAID | {"refusal": None, "audio": None, "tool_calls": None, "annotations": None}
    messages, _ = conversation_of([user(video(), TEXT), dumped, {"role": "user", "content": "Where?"}])
    assert messages[1].text == "a ball"


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "user", "content": "hi"}], "one_video"),
        ([user(TEXT)], "one_video"),
        ([user(video(), video(B), TEXT)], "one_video"),
        ([user(video(), TEXT), SAID, user(video(B), TEXT)], "one_video"),
        ([user(video(), {"type": "file", "file": {"file_id": A}}, TEXT)], "one_video"),
        (["hi"], "invalid_request"),
        ([{"content": "hi"}], "invalid_request"),
        ([{"role": ["user"], "content": "hi"}], "invalid_request"),
        ([{"role": "king", "content": "x"}], "invalid_request"),
        ([{"role": "tool", "content": "x"}], "invalid_request"),
        ([{"role": "user"}], "invalid_request"),
        ([{"role": "user", "content": 3}], "invalid_request"),
        ([user("hi")], "invalid_request"),
        ([user({"text": "hi"})], "invalid_request"),
        ([user({"type": "text", "text": 3})], "invalid_request"),
        ([user({"type": "video_url", "video_url": A})], "invalid_request"),
        ([user({"type": "video_url", "video_url": {}})], "invalid_request"),
        ([user({"type": "video_url", "video_url": {"url": ""}})], "invalid_request"),
        ([{"role": "system", "content": [video()]}, user(TEXT)], "invalid_request"),
        ([user(video(), TEXT)] * 1001, "invalid_request"),
        ([user({"type": "image_url", "image_url": {"url": A}}, video(), TEXT)], "unsupported_parameter"),
        ([user({"type": "video_url", "video_url": {"url": A, "detail": "low"}}, TEXT)], "unsupported_parameter"),
        ([user(video() | {"fps": 2}, TEXT)], "unsupported_parameter"),
        ([user(video(), TEXT) | {"name": "somebody"}], "unsupported_parameter"),
        ([user(video(), TEXT), SAID | {"tool_calls": [{}]}, user(TEXT)], "unsupported_parameter"),
    ],
)
def test_what_is_no_conversation_about_one_video_is_refused(messages: list[Any], code: str) -> None:
    with pytest.raises(ServeError) as caught:
        conversation_of(messages)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert len(caught.value.message) < 300


ANY = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["user", "text", "video_url", A]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "video_url", "url", "file"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.lists(ANY, min_size=1, max_size=3))
def test_anything_is_read_or_refused(messages: list[Any]) -> None:
    assert status_of(lambda: conversation_of(messages)) in (200, 400)


def status_of(call: Callable[[], object]) -> int:
    try:
        call()
    except ServeError as error:
        return error.status
    return 200
