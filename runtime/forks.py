"""Detects objects used in a fork of the process that made them: a fork copies locks as they are, but no threads.

    home = Home("this pipeline")
    home.check()  # in a fork: `Closed`, in one line

In a fork, a lock that another thread held is held for ever, and work of a thread never finishes. So `check` raises
before anything waits.
"""

from __future__ import annotations

import os

from runtime.errors import Closed


class Home:
    """The process that an object was made in; `what` names the object in messages."""

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
