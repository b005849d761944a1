"""What can go wrong at run time that the caller can mend, by kind, so that a service can tell them apart."""

from earlytom.errors import UserError


class VideoError(UserError):
    """The video cannot be used: no such file, not a video, too short, broken."""


class EngineError(UserError):
    """The engine folder cannot be used: missing, changed since it was built, or made for something else."""
