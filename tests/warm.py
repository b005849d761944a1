"""Processes whose imports are done: a new interpreter takes seconds for torch and transformers.

`WarmPopen([sys.executable, "-m", "builder.build", *words], ...)` is `subprocess.Popen` of a Python's `-m` or `-c`, with
its own streams, signals, children, exit and status. But it is a fork of one process that has imported `MODULES` and has
one thread. What is about starting, or about imports, starts a new interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

# None that a test starts by `-m`, as runpy warns of those that are there, and none that starts a thread (onnxruntime).
MODULES = (
    "builder.export.chain",
    "builder.inspection.page",
    "onnxscript.function_libs.torch_lib.registration",
    "runtime.decoder.eager",
    "runtime.drawing.clips",
    "runtime.measure.report",
    "runtime.pipeline",
    "runtime.serve.app",
    "runtime.serve.decoding.child",
    "runtime.video",
    "torch.onnx._internal.exporter._compat",
)
ROOT = Path(__file__).parents[1]
_SET_CHILD_SUBREAPER = 36
_MOST = 1 << 20  # bytes of a request
_UNUSED = 200  # a descriptor beyond those that anybody names


class WarmPopen(subprocess.Popen[Any]):
    def _execute_child(  # type: ignore[no-untyped-def]  # subprocess's own, of 23 parameters
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
    ) -> None:  # fmt: skip
        assert args[0] == sys.executable
        names = {0: p2cread, 1: c2pwrite, 2: errwrite} | {file: file for file in pass_fds}
        files = {name: file for name, file in names.items() if file != -1}
        about = {"words": args[1:], "env": dict(os.environ if env is None else env), "session": more[5]}
        about |= {"cwd": str(cwd or os.getcwd()), "names": list(files)}
        self.pid = _start(json.dumps(about).encode(), list(files.values()))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def run(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """What a process said."""
    with WarmPopen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _start(about: bytes, files: list[int]) -> int:
    """The id of a new process, a child of this one."""
    line, libc = _first(os.getpid()), ctypes.CDLL(None)
    libc.prctl(_SET_CHILD_SUBREAPER, 1)  # the fork's fork loses its parent, and gets this one
    try:
        socket.send_fds(line, [about], files)
        return int(line.recv(_MOST))
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, 0)


@functools.cache
def _first(pid: int) -> socket.socket:
    """The line to the process that is forked, for the process `pid`."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    with theirs:
        first = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    atexit.register(_end, pid, first)
    return mine


def _end(pid: int, first: subprocess.Popen[bytes]) -> None:
    if os.getpid() == pid:  # not in a fork of ours
        first.kill()
        first.wait()


def _serve(line: socket.socket) -> None:
    """Come back in every new process; in this one, when nobody wants another."""
    while (request := socket.recv_fds(line, _MOST, 16))[0]:
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            line.send(str(os.getpid()).encode())
            line.close()
            _become(json.loads(request[0]), request[1])
            return
        os.waitpid(between, 0)
        for file in request[1]:
            os.close(file)


def _become(about: dict[str, Any], files: list[int]) -> None:
    if about["session"]:
        os.setsid()
    moved = {name: os.dup2(file, _UNUSED + name) for name, file in zip(about["names"], files, strict=True)}
    for file in files:
        os.close(file)
    for name, file in moved.items():
        os.dup2(file, name)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(about["cwd"])
    os.environ.clear()
    os.environ.update(about["env"])
    words = about["words"]
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    how, what, *words = words
    sys.path[0] = about["cwd"]
    if how == "-m":
        sys.argv = [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert how == "-c"
        sys.argv = ["-c", *words]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    given = socket.socket(fileno=int(sys.argv[1]))
    for module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1
    _serve(given)
