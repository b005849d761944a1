"""Errors at run time, by kind, so that a service can tell them apart. `UserError`s are those a caller can mend."""

from earlytom.errors import UserError


class VideoError(UserError):
    """The video cannot be used: no such file, not a video, too short, broken."""


class EngineError(UserError):
    """The engine folder cannot be used: missing, changed since it was built, or made for something else."""


class Overloaded(UserError):  # noqa: N818 - the name of a state, as those below
    """The queue of requests is full: try again later."""


class DeadlineExceeded(UserError):  # noqa: N818
    """A request's deadline passed before its end."""


class Cancelled(RuntimeError):  # noqa: N818
    """The caller cancelled the request."""


class Closed(RuntimeError):  # noqa: N818
    """The pipeline takes no more requests, or was closed before this one was answered."""


class DecoderFailed(UserError):  # noqa: N818
    """vLLM, in this process or on a server, did not start, refused, hung, or gave an invalid reply."""


class DecoderAway(DecoderFailed):
    """The decoder's server cannot be reached or is busy: try again later."""
