"""Errors in OpenAI's shape."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.errors import Cancelled, Closed, DeadlineExceeded, EngineError, Overloaded, VideoError
from runtime.serve.errors import ServeError, body, encoded, from_runtime, internal, one_line


def test_the_shape() -> None:
    error = ServeError(400, "invalid_video", "no video", param="messages")
    wanted = {
        "error": {
            "message": "no video",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "invalid_video",
        }
    }
    assert body(error) == wanted
    content, headers = encoded(error)
    assert json.loads(content) == wanted
    assert dict(headers) == {b"content-type": b"application/json", b"content-length": str(len(content)).encode()}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_the_type_is_that_of_the_status(status: int, kind: str) -> None:
    assert body(ServeError(status, "x", "y"))["error"]["type"] == kind


def test_what_a_client_is_to_do_is_in_the_headers() -> None:
    assert (b"retry-after", b"3") in encoded(ServeError(429, "overloaded", "later", retry_after=3))[1]
    assert (b"www-authenticate", b"Bearer") in encoded(ServeError(401, "invalid_api_key", "no"))[1]
    assert not {b"retry-after", b"www-authenticate"} & {name for name, _ in encoded(internal())[1]}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (VideoError("torn"), 400, "invalid_video"),
        (UserError("no"), 400, "invalid_request"),
        (Overloaded("8 wait"), 429, "overloaded"),
        (DeadlineExceeded("late"), 504, "deadline_exceeded"),
        (Closed("closed"), 503, "draining"),
        (OSError(28, "No space left on device: /srv"), 503, "overloaded"),
        (OSError(13, "Permission denied: /srv"), 500, "internal_error"),
        (Cancelled("gone"), 499, "cancelled"),
        (EngineError("/srv/engine is broken"), 500, "internal_error"),
        (RuntimeError("secret"), 500, "internal_error"),
        (ServeError(404, "model_not_found", "x"), 404, "model_not_found"),
    ],
)
def test_what_a_pipeline_raises_becomes_a_status(error: Exception, status: int, code: str) -> None:
    told = from_runtime(error)
    assert (told.status, told.code) == (status, code)
    if status == 500:
        assert str(error) not in told.message  # a defect is not explained to strangers


@given(st.text())
def test_a_message_is_one_printable_line(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable()
    assert len(shown) <= 1000
    assert len(shown.splitlines()) <= 1


def test_private_words_are_left_out() -> None:
    assert one_line("'/tmp/a1' is\nno video", ["'/tmp/a1'"]) == "... is no video"
