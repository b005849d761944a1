"""What can go wrong at run time, by kind, so that a service can tell them apart. `UserError`s the caller can mend."""

from earlytom.errors import UserError


class VideoError(UserError):
    """The video cannot be used: no such file, not a video, too short, broken."""


class EngineError(UserError):
    """The engine folder cannot be used: missing, changed since it was built, or made for something else."""


class Overloaded(UserError):  # noqa: N818 - the name of a state, as those below
    """As many requests wait as may wait: try again later."""


class DeadlineExceeded(UserError):  # noqa: N818
    """A request's time was up before its end."""


class Cancelled(RuntimeError):  # noqa: N818
    """Its caller has cancelled the request."""


class Closed(RuntimeError):  # noqa: N818
    """The pipeline takes no more requests, or was closed before this one was answered."""


class DecoderFailed(UserError):  # noqa: N818
    """A decoder elsewhere did not do what it was asked for: it refused, hung, or said what makes no sense."""


class DecoderAway(DecoderFailed):
    """It cannot be reached, or has too much to do: try again later."""
