"""What a test sees of a warm process is what it sees of a new interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS
from tests.warm import WarmPopen, run

SHOWN = "import os, sys; print(sys.argv, os.getppid(), os.environ['HERE'], os.getcwd()); print('so', file=sys.stderr)"
BOTH = (subprocess.Popen, WarmPopen)


def said(popen: type[subprocess.Popen[str]], *words: str, **options: object) -> tuple[int, str, str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with popen([sys.executable, *words], text=True, **pipes, **options) as process:  # type: ignore[call-overload]
        out, err = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, out, err.splitlines()[-1] if err else ""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("1 / 0", 1),
        ("import threading; threading.Timer(0.1, lambda: print('late')).start()", 0),
        ("import atexit; atexit.register(print, 'last')", 0),
    ],
)
def test_it_ends_as_one(code: str, status: int) -> None:
    assert said(WarmPopen, "-c", code) == said(subprocess.Popen, "-c", code)
    assert said(WarmPopen, "-c", code)[0] == status


def test_it_gets_what_one_gets(tmp_path: Path) -> None:
    given = {"cwd": tmp_path, "env": os.environ | {"HERE": "there"}}
    new, warm = (said(popen, "-c", SHOWN, "a b", **given) for popen in BOTH)
    assert new == warm == (0, f"{['-c', 'a b']} {os.getpid()} there {tmp_path}\n", "so")


def test_files_and_a_session_of_its_own() -> None:
    reader, writer = os.pipe()
    code = f"import os; os.write({writer}, str(os.getsid(0)).encode())"
    with WarmPopen([sys.executable, "-c", code], pass_fds=[writer], start_new_session=True) as process:
        assert int(os.read(reader, 100)) == process.pid
    os.close(reader)
    os.close(writer)


def test_its_imports_are_done() -> None:
    code = "import sys; print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    assert run([sys.executable, "-c", code], HANG_SECONDS).stdout == "True False\n"
