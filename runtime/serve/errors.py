"""Errors for clients: a status, a code and one line, in OpenAI's format.

Every error of the server that a client can cause is a `ServeError`. Independent of the web framework, so that all parts
of the server can raise one, also those below the framework.
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
# The error's `type` in OpenAI's format; every other status is an error of the request.
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
    """An error that clients may see.

    status: of HTTP. code: a word for programs, such as "invalid_video". message: one line for people.
    param: the field of the request in error. retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = one_line(message)
        self.param = None if param is None else one_line(param)  # a field name from a client may hold anything
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
    """The client's error for an exception of a pipeline. Anything unknown is a 500 without details."""
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
    if isinstance(error, DecoderAway):  # clients do not learn its address or message
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
    """The error of a server without disk space, memory or file descriptors for a video."""
    return ServeError(503, "overloaded", "there is no room for the video; try again later", retry_after=5)


def internal() -> ServeError:
    """The error of a defect of ours, whose details are in the log only."""
    return ServeError(500, "internal_error", "the server failed to answer; its log tells why")


def one_line(text: str, private: Sequence[str] = ()) -> str:
    """A message without line breaks, control characters and the `private` words, shortened to `_LONGEST`."""
    for word in private:
        text = text.replace(word, "...")
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
