"""Common code of all commands: exit statuses, error messages, options and output.

Exit status 0 is success, 2 an error that the user can mend (one line `error: ...` on stderr), 130 Ctrl-C or SIGTERM,
141 a closed pipe. Other errors are our defects and keep their traceback. Text and tables are for people; one JSON line
at the end is for machines, and `--json` prints only that. Library code prints nothing: it logs to the logger `LOGGER`,
which `--verbose` shows on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from earlytom.errors import UserError

if TYPE_CHECKING:
    from runtime.show.progress import LiveLine

OK = 0
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

LOGGER = "runtime"  # the one name under which everything is logged

_REMEDIES = {
    errno.ENOSPC: ("no space is left on the disk", "free some space or choose a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose a folder on another disk"),
    errno.EFBIG: ("the file would be larger than allowed here", "raise the limit or choose another file system"),
    errno.EIO: ("the disk failed to read or write", "check the disk or choose a folder on another one"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission denied", "change its permissions or choose another path"),
    errno.EPERM: ("operation not permitted", "change its permissions or choose another path"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
}

_NO_MEMORY = "not enough memory ({}): close other programs, raise the limit (ulimit -v), or use fewer --frames"
# Messages of libraries, in errors of many types, when the system gives no memory or no thread (which needs memory).
_SAID_OF_MEMORY = (
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "unable to mmap",
    "bad_alloc",
    "bad allocation",
    "can't start new thread",
    "failed to map segment",
    "failed to allocate memory",
    "cannot create worker thread",
    "pthread_create failed",
    "thread creation failed",
    "memory allocation",
    "without exception set",  # Python's message when a library raised nothing
    "without setting an exception",
)
_SAID_OF_FILES = ("too many open files",)
_LIBRARIES = (RuntimeError, OSError, ImportError, SystemError)  # built-in errors that libraries raise

_stopped: list[int] = []  # signals received, see `stop_by_signal`
_typed: list[str] = []  # the console script's name, if one started the command

A = TypeVar("A")


def run(main: Callable[[A], int | None], args: A) -> int:
    """Call `main(args)` and return the command's exit status, for `sys.exit`.

    `args` is whatever `main` takes: parsed arguments, or the list that it parses itself.
    """
    _open_streams()
    try:
        status = main(args)
        sys.stdout.flush()  # here, so that a full disk or a closed pipe is reported as for any other write
    except KeyboardInterrupt:
        return _end_interrupted()
    except UserError as error:
        return _end_interrupted() if _comes_of_interrupt(error) else _fail(str(error))
    except BrokenPipeError:
        _silence(sys.stdout)
        return BROKEN_PIPE
    except Exception as error:
        if _comes_of_interrupt(error):
            return _end_interrupted()
        line = limit_reached(error) or (_explain(error) if isinstance(error, OSError) else None)
        if line is None:
            raise
        _settle(sys.stdout)
        return _fail(line)
    return OK if status is None else status


def run_module(name: str) -> None:
    """Run a command's module as `python -m` does, for a console script, whose name usage texts then have.

    Ends the process, as every command does.
    """
    _typed.append(os.path.basename(sys.argv[0]))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def stop_by_signal() -> None:
    """Make SIGTERM and Ctrl-C raise KeyboardInterrupt, and record them, as a library may turn it into another error."""

    def stop(number: int, frame: object) -> None:
        _stopped.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the parent had it ignored
        signal.signal(signal.SIGINT, stop)


def _open_streams() -> None:
    """Make standard output and error accept every text.

    Streams that the parent closed (`>&-`) are None in Python, and are replaced by /dev/null. Characters missing in
    standard output's encoding are escaped, as on standard error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _end_interrupted() -> int:
    exec("")  # clears the mark that a Ctrl-C left in another `exec`, by which Python would exit with the signal
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def _comes_of_interrupt(error: BaseException) -> bool:
    """Whether an error follows from an interrupt: a library's cleanup after one may fail (as torch.export's does)."""
    if _stopped:
        return True
    seen: list[BaseException] = []
    while error not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    return False


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return USER_ERROR


def limit_reached(error: BaseException) -> str | None:
    """One line for an error, or one in its chain, by which a machine's limit was reached (memory, GPU memory, files).

    None for every other. Of built-in errors only those that libraries raise are considered, not to hide our defects.
    """
    seen: list[BaseException] = []
    while error not in seen:
        if isinstance(error, MemoryError):
            return _NO_MEMORY.format(_first_line(error) or "an allocation failed")
        if isinstance(error, OSError) and (error.errno == errno.ENOMEM or _is_refused_process(error)):
            return _NO_MEMORY.format(error.strerror)
        if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, so that torch is not imported
            return f"not enough GPU memory ({_first_line(error)}): end what else runs there, or use fewer --frames"
        foreign = isinstance(error, _LIBRARIES) or type(error).__module__ != "builtins"
        said = str(error).lower() if foreign and not isinstance(error, UserError) else ""
        if any(text in said for text in _SAID_OF_MEMORY):
            return _NO_MEMORY.format(_first_line(error))
        if any(text in said for text in _SAID_OF_FILES):
            return "; ".join(_REMEDIES[errno.EMFILE])
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    return None


def _is_refused_process(error: OSError) -> bool:
    """Whether it is EAGAIN of a process that could not be started, not of a stream that would block."""
    return error.errno == errno.EAGAIN and not hasattr(error, "characters_written")


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if len(line) <= 120 else line[:117] + "..."


def _explain(error: OSError) -> str | None:
    """One line for an OSError that the user can mend; None for others."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    if error.errno in _REMEDIES:
        what, remedy = _REMEDIES[error.errno]
        return f"{where}{what}; {remedy}"
    if where and error.strerror:
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}; check the path"
    return None


def _settle(stream: TextIO) -> None:
    """Flush a stream, or drop its buffer: the flush at exit would fail again and change the exit status."""
    try:
        stream.flush()
    except OSError:
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null, so that the interpreter's flush at exit does not fail."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # replaced by something without a descriptor: nothing to flush at exit
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviated options, whose epilog keeps its lines, and whose errors are UserError of
    one line, without the usage text."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=_typed[-1] if _typed else prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--verbose", action=_Verbose, help="log what happens, on standard error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the options)")


class _Verbose(argparse.Action):
    """Shows log messages from here on; adds no attribute to the parsed options."""

    def __init__(self, option_strings: Sequence[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=how["help"])

    def __call__(self, *_: object) -> None:
        logger, shown = logging.getLogger(LOGGER), logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        for old in [one for one in logger.handlers if type(one) is logging.StreamHandler]:
            logger.removeHandler(old)
        logger.addHandler(shown)
        logger.setLevel(logging.DEBUG)


class Screen:
    """Output of a command.

    Args:
        json_only: print only `result`.
        stream: standard output by default.
    """

    def __init__(self, json_only: bool = False, stream: TextIO | None = None) -> None:
        self.json_only = json_only
        self.stream = stream if stream is not None else sys.stdout
        self._live: LiveLine | None = None

    def line(self, text: str = "") -> None:
        """One line for people."""
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Text for people, flushed at once and without a line end (a streamed answer)."""
        if self._live is not None:
            self._live.write(text)
        elif not self.json_only:
            self.stream.write(text)
            self.stream.flush()

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """On a terminal, show a live line with a clock while the block runs."""
        if self.json_only or self._live is not None or not self.stream.isatty():
            yield
            return
        from runtime.show.progress import LiveLine

        try:
            with LiveLine(self.stream, text) as self._live:
                yield
        finally:
            self._live = None

    def step(self, text: str, done: int = 0, steps: int = 0) -> None:
        """Update the line of `working`; with `steps` it shows a bar and the time left."""
        if self._live is not None:
            self._live.step(text, done, steps)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
        """A table for people, numbers right-aligned: drawn on a terminal, plain aligned text elsewhere.

        Floats have three significant digits, or none after the point from 100 on; format cells for other precision.
        """
        cells = [[_show(cell) for cell in row] for row in rows]
        right = [bool(rows) and all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]
        if self.json_only:
            return
        if self.stream.isatty() and self._live is None:
            self._draw(columns, cells, right, title)
        else:
            self.write(_plain_table(columns, cells, right, title))

    def result(self, record: Mapping[str, Any]) -> None:
        """The one JSON line for machines; always printed.

        Raises:
            ValueError: a value is NaN or infinite, which JSON lacks.
        """
        self.stream.write(json.dumps(record, allow_nan=False) + "\n")
        self.stream.flush()

    def _draw(self, columns: Sequence[str], cells: list[list[str]], right: list[bool], title: str | None) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title and Text(title), title_justify="left")
        for name, to_right in zip(columns, right, strict=True):
            table.add_column(Text(name), justify="right" if to_right else "left")
        for row in cells:
            table.add_row(*map(Text, row))  # Text: brackets in a path are no markup
        Console(file=self.stream).print(table)


def _plain_table(columns: Sequence[str], cells: list[list[str]], right: list[bool], title: str | None) -> str:
    from rich.cells import cell_len  # width on screen: Chinese characters take two columns

    grid = [list(columns), *cells]
    widths = [max(cell_len(row[i]) for row in grid) for i in range(len(columns))]
    lines = [title] if title else []
    for row in grid:
        padded = []
        for text, width, to_right in zip(row, widths, right, strict=True):
            space = " " * (width - cell_len(text))
            padded.append(space + text if to_right else text + space)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _is_figure(cell: object) -> bool:
    """Whether it is a number, or a formatted one, perhaps with a unit."""
    if isinstance(cell, str):
        return re.fullmatch(r"[-+]?\d[\d.,]*(e[-+]?\d+)?x?( ?%| \w+)?", cell) is not None
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _show(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)
