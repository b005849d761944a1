"""How commands fail and what they print."""

import argparse
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from earlytom.errors import UserError
from runtime import cli
from runtime.errors import EngineError
from tests.processes import HANG_SECONDS


def failing(error: BaseException) -> Callable[[object], int]:
    def main(args: object) -> int:
        raise error

    return main


def test_success_is_zero_and_a_status_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda args: None, argparse.Namespace()) == 0
    assert cli.run(lambda args: len(args), ["a", "b", "c"]) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [UserError("ratio is 1.5: set --ratio"), EngineError("ratio is 1.5:\n set --ratio")])
def test_a_user_error_is_one_line_and_status_2(error: UserError, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(failing(error), None) == 2
    assert capsys.readouterr() == ("", "error: ratio is 1.5: set --ratio\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "not permitted"),
    ],
)
@pytest.mark.parametrize("name", ["engines/a", b"engines/a", None])
def test_the_disk_s_refusals_are_one_line_with_a_remedy(
    number: int, words: str, name: str | bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(failing(OSError(number, os.strerror(number), name)), None) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: " if name is None else "error: engines/a: ")
    assert words in line
    assert "choose" in line
    assert line.count("\n") == 1


def test_another_os_error_that_names_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda path: open(path).close(), "/no/such/file") == 2
    assert capsys.readouterr().err == "error: /no/such/file: no such file or directory; check the path\n"


@pytest.mark.parametrize("error", [OSError("a defect"), ValueError("a defect"), RuntimeError("a defect")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    """Negative control: only what the user can mend is turned into a line."""
    with pytest.raises(type(error), match="a defect"):
        cli.run(failing(error), None)


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(failing(KeyboardInterrupt()), None) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("kind", [UserError, AssertionError, OSError])
def test_what_fails_because_of_an_interrupt_is_one(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    """torch.export, interrupted, fails as it cleans up."""

    def main(args: object) -> None:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise AssertionError("empty mode stack")
        except AssertionError as error:
            raise kind("could not be exported") from error

    assert cli.run(main, None) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


SWALLOWED = """
import os, signal, sys
from runtime import cli
def main(number):
    if sys.argv[2] == "imported":
        exec("os.kill(os.getpid(), number)")
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass
    raise cli.UserError("a library said so")
if sys.argv[2] != "unknown":
    cli.stop_by_signal()
sys.exit(cli.run(main, int(sys.argv[1])))
"""


@pytest.mark.parametrize("how", ["known", "imported"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_known_where_a_library_forgets_it(number: signal.Signals, how: str, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(SWALLOWED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "command", str(int(number)), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_every_command_knows_its_signals() -> None:
    """They run exporters and compilers, which forget them, or leave files half-written; the server has its own way."""
    top = Path(__file__).parents[2]
    paths = [*(top / "builder").rglob("*.py"), *(top / "runtime").glob("*.py")]
    commands = [source for path in paths if "cli.run(main" in (source := path.read_text("utf-8"))]
    assert len(commands) >= 11
    assert all("cli.stop_by_signal()" in source for source in commands)


def test_without_that_it_would_be_the_library_s_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, str(int(signal.SIGINT)), "unknown"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: a library said so\n")


def test_argparse_keeps_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.run(lambda argv: argparse.ArgumentParser().parse_args(argv) and 0, ["--nonsense"])
    assert status.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


PROGRAM = """
import sys
from runtime import cli
def main(lines):
    for number in range(lines):
        print(number)
sys.exit(cli.run(main, int(sys.argv[1])))
"""


def test_a_closed_pipe_is_quiet() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "0\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(HANG_SECONDS) == cli.BROKEN_PIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a file that is always full, is a Linux device")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "3"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no space is left")


# What is printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [("decode", 0.1234, "12.5 ms"), ("/a/[b]", 1234.5, "1.00 ms")]


def test_a_plain_table_is_aligned() -> None:
    stream = io.StringIO()
    cli.Screen(stream=stream).table(("stage", "s", "time"), ROWS, title="times")
    assert stream.getvalue().splitlines() == [
        "times",
        "stage       s     time",
        "decode  0.123  12.5 ms",
        "/a/[b]   1234  1.00 ms",
    ]


def test_a_plain_table_counts_columns_not_characters() -> None:
    stream = io.StringIO()
    cli.Screen(stream=stream).table(("word", "n"), [("日本", 1), ("abcd", 22)])
    assert stream.getvalue() == "word   n\n日本   1\nabcd  22\n"


def test_a_table_without_rows_shows_its_columns() -> None:
    stream = io.StringIO()
    cli.Screen(stream=stream).table(("word", "n"), [])
    assert stream.getvalue() == "word  n\n"


def test_a_terminal_gets_a_drawn_table_with_the_same_cells() -> None:
    stream = Terminal()
    cli.Screen(stream=stream).table(("stage", "s", "time"), ROWS, title="[bold]times")
    shown = stream.getvalue()
    assert all(text in shown for text in ("[bold]times", "/a/[b]", "0.123", "1234", "12.5 ms"))
    assert "─" in shown


def test_json_only_shows_one_json_line() -> None:
    stream = io.StringIO()
    screen = cli.Screen(json_only=True, stream=stream)
    screen.line("the model is untrained")
    screen.write("a cat")
    screen.table(("stage", "s"), [("decode", 1)])
    screen.result({"answer": "日本", "ttft": 0.5})
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == {"answer": "日本", "ttft": 0.5}


def test_people_get_everything_and_the_json_line_last() -> None:
    stream = io.StringIO()
    screen = cli.Screen(stream=stream)
    screen.write("a ")
    screen.line("cat")
    screen.result({"n": 1})
    assert stream.getvalue() == 'a cat\n{"n": 1}\n'


def test_json_never_says_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        cli.Screen(stream=io.StringIO()).result({"ttft": float("nan")})


def test_output_goes_to_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.Screen().line(str(tmp_path))
    assert capsys.readouterr().out == f"{tmp_path}\n"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_stream_that_was_closed_takes_everything(descriptor: int) -> None:
    code = (
        "import sys; from runtime import cli; from earlytom import UserError\n"
        "def main(args):\n    cli.Screen().line('text'); raise UserError('got 0: give 1')\n"
        "sys.exit(cli.run(main, None))"
    )
    command = f'exec "{sys.executable}" -c "$0" {descriptor}>&-'
    done = subprocess.run(
        ["sh", "-c", command, code], capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    said = {1: ("", "error: got 0: give 1\n"), 2: ("text\n", "")}[descriptor]
    assert (done.returncode, done.stdout, done.stderr) == (2, *said)


def test_what_standard_output_cannot_encode_is_escaped() -> None:
    code = "import sys; from runtime import cli; sys.exit(cli.run(lambda args: cli.Screen().line('caf\\u00e9'), None))"
    said = []
    for encoding in ("ascii", "utf-8"):
        given = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=given, check=False, timeout=HANG_SECONDS
        )
        assert (done.returncode, done.stderr) == (0, b"")
        said.append(done.stdout.decode())
    assert said == ["caf\\xe9\n", "café\n"]


# Limits of the machine


class Foreign(Exception):  # noqa: N818
    """An error of a library that derives from none of Python's, as safetensors' and onnxruntime's do."""


Foreign.__module__ = "library"


def cause(error: BaseException, reason: BaseException) -> BaseException:
    error.__cause__ = reason
    return error


LIMITS = [
    (MemoryError(), "an allocation failed"),
    (MemoryError("std::bad_alloc"), "std::bad_alloc"),
    (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB"),
    (RuntimeError("unable to mmap 829 bytes from file <model.safetensors>: Cannot allocate memory (12)"), "mmap"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"), ""),
    (RuntimeError("can't start new thread"), "new thread"),
    (RuntimeError("std::bad_alloc"), "bad_alloc"),
    (SystemError("error return without exception set"), "without exception set"),
    (Foreign("Error while deserializing header: Cannot allocate memory (os error 12)"), "os error 12"),
    (Foreign("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"), ""),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "libtorch_cpu.so"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
    (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "Resource temporarily unavailable"),
    (cause(ValueError("no model"), MemoryError()), "an allocation failed"),
    (RuntimeError("x" * 10_000 + " bad_alloc\nat some line"), "xxx"),
]


@pytest.mark.parametrize(("error", "says"), LIMITS)
def test_low_memory_is_one_line(error: BaseException, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: None) -> None:
        raise error

    assert cli.run(main, None) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: not enough memory (")
    assert says in err
    assert "ulimit -v" in err
    assert len(err) < 300


def test_a_gpu_s_memory_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    assert cli.run(main, None) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: not enough GPU memory (CUDA out of memory. Tried to allocate 2 GiB.)")


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files", "f"), Foreign("x: Too many open files (os error 24)")]
)
def test_too_many_files_are_one_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: None) -> None:
        raise error

    assert cli.run(main, None) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "too many files are open; raise the limit (ulimit -n)" in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough memory for this bad_alloc"),
        KeyError("cannot allocate memory"),
        AssertionError("bad_alloc"),
        RuntimeError("the size of tensor a must match"),
        ImportError("cannot import name 'x'"),
        cause(ValueError("a defect"), KeyError("memory")),
    ],
)
def test_a_defect_of_ours_keeps_its_traceback(error: BaseException) -> None:
    def main(_: None) -> None:
        raise error

    with pytest.raises(type(error)):
        cli.run(main, None)


def test_an_error_that_is_its_own_context_comes_to_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one

    assert cli.limit_reached(one) is None


REAL = """
import resource, sys
from runtime import cli
def main(_):
    resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
    {body}
sys.exit(cli.run(main, None))
"""


@pytest.mark.parametrize(
    ("limit", "value", "body", "says"),
    [
        ("RLIMIT_AS", 2**20, "bytearray(2**30)", "not enough memory"),
        ("RLIMIT_AS", 2**20, "import torch; torch.empty(2**30)", "not enough memory"),
        ("RLIMIT_AS", 2**20, "import threading; threading.Thread(target=print).start()", "not enough memory"),
        ("RLIMIT_AS", 2**20, "import onnxruntime", "not enough memory"),
        ("RLIMIT_NOFILE", 5, "[open('/dev/null') for _ in range(9)]", "too many files are open"),
    ],
)
def test_real_limits(limit: str, value: int, body: str, says: str) -> None:
    """Of memory, what is there already stays: nothing more is given."""
    words = [sys.executable, "-c", REAL.format(body=body), limit, str(value)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
