"""Things that belong to the process that made them: threads stay behind when it forks, and a lock is copied as it was.

    home = Home("this pipeline")
    home.check()  # in a fork: `Closed`, in one line

A lock that some thread held at that moment is held for ever in the copy, and what a thread was to finish never ends. So
whoever would wait is told at once instead, before a lock is touched.
"""

from __future__ import annotations

import os

from runtime.errors import Closed


class Home:
    """The process that something was made in; `what` is what its user calls it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is a fork of that process."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise `Closed` in a fork."""
        if self.left:
            raise Closed(
                f"{self._what} was made before the process forked, which copies no threads: load a pipeline after it"
            )
