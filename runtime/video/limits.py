"""Limits on videos, checked before the first frame is decoded, as a few bytes of a file can demand huge resources."""

from __future__ import annotations

from dataclasses import dataclass

from earlytom.numbers import real, whole


@dataclass(frozen=True)
class Limits:
    """The largest video that is read; None: no limit. A larger one is refused by an error that names the limit.

    The defaults are what one machine can handle (8K, a day), not what a service with many callers should allow.
    """

    max_pixels: int | None = 8192 * 4320  # of one frame
    max_frames: int | None = 2_000_000
    max_seconds: float | None = 24 * 3600.0
    max_bytes: int | None = 16 << 30  # of the file

    def __post_init__(self) -> None:
        """Raises UserError for a limit that is no positive number."""
        for name in ("max_pixels", "max_frames", "max_bytes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole(name, value, 1))
        if self.max_seconds is not None:
            object.__setattr__(self, "max_seconds", real("max_seconds", self.max_seconds, 0, low_open=True))


DEFAULT_LIMITS = Limits()


def remedy(name: str) -> str:
    """How a caller raises the limit `name`."""
    return f"give a smaller video, or raise the limit with limits=Limits({name}=...) (--{name.replace('_', '-')})"
