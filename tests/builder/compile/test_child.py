"""A child process ends with its parent, however that ends, whatever the child is doing."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from builder import cache
from tests.processes import HANG_SECONDS

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

# A library call that keeps every other Python thread out: a lock that is never free, waited for without the interpreter
# being let go.
STUCK = "import ctypes; ctypes.PyDLL(None).pause()"
IDLE = "import threading; threading.Event().wait()"
CHILD = """
import sys
from builder.compile.child import end_with_parent
end_with_parent(0)
print("watching", flush=True)
{body}
"""
# Starts the child from a thread that ends, says what the child says, and waits for its own end.
PARENT = """
import subprocess, sys, threading
def start():
    pipe = subprocess.PIPE
    children.append(subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=pipe, stdout=pipe, text=True))
children = []
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(children[0].pid, children[0].stdout.readline().strip(), flush=True)
sys.stdin.read()
"""


def ends(pid: int) -> bool:
    """Whether a process that is not our child ends."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], HANG_SECONDS)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("body", [IDLE, STUCK], ids=["idle", "inside a library"])
def test_it_ends_when_its_parent_is_killed(body: str) -> None:
    words = [sys.executable, "-c", PARENT, CHILD.format(body=body)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        assert parent.stdout is not None
        pid, said = parent.stdout.readline().split()
        assert said == "watching"
        os.kill(int(pid), 0)  # it outlives the thread that started it
        parent.kill()
    assert ends(int(pid))


def test_a_request_from_a_file_is_served_to_its_end(tmp_path: Path) -> None:
    with open(os.devnull) as nothing:
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(body="print('done')")],
            stdin=nothing,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=ENVIRONMENT,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "watching\ndone\n", "")


# A build whose compiler says one thing and then works for ever: `compile_engine` with a stand-in for the interpreter.
BUILD = """
import sys
from pathlib import Path
from builder import cache
from builder.compile import engine as compiler
compiler.check_target = lambda *words: None
compiler.sys.executable = sys.argv[2]
with cache.staging(Path(sys.argv[1]) / "engine", lambda: None) as place:
    (place / "vision.onnx").touch()
    compiler.compile_engine(
        place / "vision.onnx", place / "vision.engine", flavour="tensorrt-rtx", dtype="fp16", compression="native",
        progress=lambda state: print(state.phase, flush=True),
    )
"""
COMPILER = """#!{python}
import json, os, sys, threading
from builder.compile.child import end_with_parent
request = json.loads(sys.stdin.readline())
end_with_parent(0)
open(request["engine"], "wb").write(b"half")
print(json.dumps({{"phase": f"pid {{os.getpid()}}", "done": 0, "steps": 0}}), flush=True)
threading.Event().wait()
"""


def test_the_compiler_ends_with_a_killed_build_and_the_next_clears_it(tmp_path: Path) -> None:
    out, compiler = tmp_path / "out", tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable))
    compiler.chmod(0o700)
    words = [sys.executable, "-c", BUILD, str(out), str(compiler)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as build:
        assert build.stdout is not None
        phase = build.stdout.readline()
        while not phase.startswith("pid "):
            assert phase
            phase = build.stdout.readline()
        build.kill()
    assert ends(int(phase.split()[1]))
    left = {path.name for path in (out / ".building-engine").iterdir()}
    assert "vision.onnx" in left
    assert any(name.endswith(".partial") for name in left)
    with cache.staging(out / "another", lambda: None):
        assert not (out / ".building-engine").exists()
    assert os.listdir(out) == []


# An evaluation whose workers measure for ever.
EVALUATION = """
import os, threading
from builder.evaluation import bench
class Stuck:
    def __init__(self, job): os.write(1, f"{os.getpid()}\\n".encode())
    def measure(self, chunk): threading.Event().wait()
bench.EvaluationBench = Stuck
if __name__ == "__main__":
    list(bench._parts(None, [range(1), range(1, 2)], 2, None))
"""


def test_the_workers_of_an_evaluation_end_with_it(tmp_path: Path) -> None:
    program = tmp_path / "evaluation.py"
    program.write_text(EVALUATION)
    words = [sys.executable, str(program)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as evaluation:
        assert evaluation.stdout is not None
        workers = [int(evaluation.stdout.readline()) for _ in range(2)]
        evaluation.kill()
        evaluation.stdout.close()
    assert [ends(worker) for worker in workers] == [True, True]
