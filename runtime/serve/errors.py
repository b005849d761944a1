"""What a client is told when it gets no answer: a status, a code, one line, in OpenAI's shape.

Everything in this room that a client can cause ends as a `ServeError`. Knows nothing of the web framework, so every
part of the server can raise one, the one before the framework too.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from typing import Any

from earlytom.errors import UserError
from runtime.errors import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    DecoderAway,
    DecoderFailed,
    EngineError,
    Overloaded,
    VideoError,
)

_LONGEST = 1000  # characters of a message
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# What the openai client's users see as `type`; every other status is the fault of the request.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


class ServeError(Exception):
    """A refusal, or a failure that may be told.

    status: of HTTP. code: a word for programs, such as "invalid_video". message: one line for people.
    param: the field of the request it is about. retry_after: seconds after which to ask again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = one_line(message)
        self.param = None if param is None else one_line(param)  # a client's name of a field may hold anything
        self.retry_after = retry_after


def body(error: ServeError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def encoded(error: ServeError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Body and headers of the answer, as ASGI takes them."""
    content = json.dumps(body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return content, headers


def from_runtime(error: BaseException, *, retry_after: int = 1) -> ServeError:
    """What a pipeline has raised, as a client is told it. Anything unknown is a 500 without details."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, VideoError):
        return ServeError(400, "invalid_video", str(error), param="messages")
    if isinstance(error, Overloaded):
        return ServeError(429, "overloaded", str(error), retry_after=retry_after)
    if isinstance(error, DeadlineExceeded):
        return ServeError(504, "deadline_exceeded", str(error))
    if isinstance(error, Closed):
        return ServeError(503, "draining", "the server is shutting down; ask another one", retry_after=retry_after)
    if isinstance(error, DecoderAway):  # where it is, and what it said, is nobody else's business
        what = "the language model's server cannot be reached or has too much to do; try again later"
        return ServeError(503, "decoder_unavailable", what, retry_after=retry_after)
    if isinstance(error, DecoderFailed):
        return ServeError(502, "decoder_failed", "the language model's server failed to answer; the log tells why")
    if isinstance(error, UserError) and not isinstance(error, EngineError):
        return ServeError(400, "invalid_request", str(error))
    if isinstance(error, OSError) and error.errno in _FULL:
        return no_room()
    if isinstance(error, Cancelled):
        return ServeError(499, "cancelled", "the request was cancelled")
    return internal()


def no_room() -> ServeError:
    """A video finds no disk, no memory or no descriptor here."""
    return ServeError(503, "overloaded", "there is no room for the video; try again later", retry_after=5)


def internal() -> ServeError:
    """A defect of ours: the log has the details, the client has none."""
    return ServeError(500, "internal_error", "the server failed to answer; its log tells why")


def one_line(text: str, private: Sequence[str] = ()) -> str:
    """A message without line breaks and control characters, without the `private` words, and not without end."""
    for word in private:
        text = text.replace(word, "...")
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
