"""Ends a child process when its parent ends, in whatever way.

The child watches a pipe whose other end only the parent holds: the system closes that end when the parent is gone. Two
watchers: SIGIO, which ends the process even while a library call holds the interpreter lock, and a reading thread for
systems that send no such signal. (PR_SET_PDEATHSIG would fire when the parent's *thread* that started the child ends.)
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading


def end_with_parent(descriptor: int) -> None:
    """End this process when the other end of the pipe `descriptor` is closed; no-op if it is no pipe but a file."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # SIGIO's default action ends the process
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_wait, args=(descriptor,), name="parent", daemon=True).start()


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)
