"""What is shown while something runs: on a terminal that it does, and elsewhere nothing. And what is logged."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import cli
from runtime.cli import LOGGER, Parser, Screen
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def bare(text: str) -> str:
    """Without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_on_a_terminal_it_is_shown_that_something_runs() -> None:
    stream = Terminal()
    screen = Screen(stream=stream)
    with screen.working("compile [red]: an engine"):
        screen.line("a line [bold]meanwhile[/bold]")
        screen.step("Parsing", 3, 10)
    screen.line("done")
    shown = bare(stream.getvalue())
    assert "compile [red]: an engine" in shown
    assert "compile [red]: Parsing" in shown
    assert "a line [bold]meanwhile[/bold]\n" in shown
    assert shown.endswith("done\n")
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is there again


def test_time_left_is_told_where_steps_are_known() -> None:
    from rich.progress import ProgressSample, Task, TaskID

    from runtime.show.progress import _KnownSteps, _TimeLeft

    known, unknown = (Task(TaskID(0), "", total, 4.0, _get_time=lambda: 2.0) for total in (10.0, None))
    for one in (known, unknown):
        one.start_time = 0.0
        one._progress.extend([ProgressSample(0.0, 0.0), ProgressSample(2.0, 4.0)])
    assert (str(_TimeLeft().render(known)), str(_TimeLeft().render(unknown))) == ("3 s left", "")
    assert str(_KnownSteps().render(unknown)) == ""


@pytest.mark.parametrize("json_only", [False, True])
def test_elsewhere_nothing_is(json_only: bool) -> None:
    """Negative control, and for a command's --json even on a terminal."""
    stream = Terminal() if json_only else io.StringIO()
    screen = Screen(json_only=json_only, stream=stream)
    with screen.working("compile"):
        screen.step("Parsing", 3, 10)
    assert stream.getvalue() == ""


def test_what_fails_meanwhile_leaves_the_screen_in_order() -> None:
    stream = Terminal()
    screen = Screen(stream=stream)
    with pytest.raises(ValueError, match="x"), screen.working("compile"):
        raise ValueError("x")
    screen.line("after")
    assert bare(stream.getvalue()).endswith("after\n")
    assert "\x1b[?25h" in stream.getvalue()


# Logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    one = logging.getLogger(LOGGER)
    before, level = list(one.handlers), one.level
    yield one
    one.handlers[:] = before
    one.setLevel(level)


def test_verbose_shows_what_is_logged(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    options = Parser(prog="p", description="d").parse_args(["--verbose"])
    assert vars(options) == {}
    for _ in range(2):
        Parser(prog="p", description="d").parse_args(["--verbose"])  # again: still one line for each
    logging.getLogger("runtime.pipeline").debug("loaded %s", "it")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("runtime.pipeline DEBUG loaded it\n")


def test_without_it_nothing_is(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    Parser(prog="p", description="d").parse_args([])
    logging.getLogger("runtime.pipeline").info("loaded %s", "it")
    assert capsys.readouterr() == ("", "")


def test_every_logger_of_ours_has_that_name() -> None:
    """In the runtime; names of other libraries are those whose chatter is silenced."""
    theirs = {"transformers", "huggingface_hub", "ray.serve"}
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        for name in re.findall(r"getLogger\(([^)]*)\)", path.read_text("utf-8")):
            assert name in ("__name__", "LOGGER", f'"{cli.LOGGER}"') or name.strip('"') in theirs, (path, name)
    assert cli.LOGGER == "runtime"


def test_libraries_print_nothing() -> None:
    """An engine is described and refused in a process whose standard streams stay empty."""
    code = """
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from builder.settings.config import BuildConfig
import runtime.pipeline
try:
    Manifest.read("nowhere")
except EngineError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
