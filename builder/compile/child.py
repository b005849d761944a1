"""A child process that ends when its parent does, however the parent ends.

The child reads from a pipe of which the parent alone has the other end, and nothing more is written to it: the system
closes that end when the parent is gone. (A signal on the parent's death, PR_SET_PDEATHSIG, would come when the thread
ends that started the child.) The system is asked for a signal, which ends a process that is inside a library and lets
no other thread run, too; a thread waits as well, where there is no such signal.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading


def end_with_parent(descriptor: int) -> None:
    """End this process when the pipe `descriptor`, which it reads from, has no other end any more.

    Where it is no pipe, as when a request comes from a file, nothing is watched.
    """
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_wait, args=(descriptor,), name="parent", daemon=True).start()


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)
