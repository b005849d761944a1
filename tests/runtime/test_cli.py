"""How commands fail and what they print."""

import argparse
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from earlytom.errors import UserError
from runtime import cli
from runtime.errors import EngineError

from ..processes import HANG_SECONDS


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
