"""Somebody who waits, for the tests of many."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.processes import HANG_SECONDS


class Caller(threading.Thread):
    """A call in a thread of its own: its result or its error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._outcome = error

    def outcome(self) -> Any:
        """The result; an error is returned, too."""
        self.join(HANG_SECONDS)
        assert not self.is_alive()
        return self._outcome
