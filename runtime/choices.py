"""Names and defaults that commands and library share, and options from dataclass fields.

The module holds words and numbers only, so that a command's parser needs no heavy imports.
`METHOD_OPTIONS` is the one table of options for a method's settings, by setting: flag, help text and parsing. Other
options of a command can be fields of its settings dataclass (`option`).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError

# Backends that run a file of an engine folder; the torch backend runs a checkpoint.
ENGINE_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
BACKENDS = ("auto", *ENGINE_BACKENDS, "torch")
DECODERS = ("torch", "torch-tensorrt")
NARROW_DTYPES = ("int8",)  # of the decoder's weights
POSITIONS = ("original", "consecutive")  # of visual tokens
MAX_NEW_TOKENS = 128
MIN_FRAMES = 2  # the method compares neighbouring frames, so one frame is not a video
GREEDY = "greedy"


def number(text: str) -> float:
    """argparse's type for numbers."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def layers(text: str) -> tuple[int, ...]:
    """Parse "6,14,20" or "none". Like `budget` and `rounds`, raises ValueError for anything else."""
    return () if text.lower() == "none" else tuple(int(word) for word in text.split(","))


def budget(text: str) -> float | tuple[int, ...]:
    """Parse a share, or frame counts."""
    counts = "," in text or (text.isdecimal() and int(text) > 1)  # "13" is one count
    return tuple(int(word) for word in text.split(",")) if counts else float(text)


def rounds(text: str) -> int | None:
    """Parse a number of rounds, or "greedy" to None."""
    return None if text == GREEDY else int(text)


@dataclass(frozen=True)
class MethodOption:
    """An option for a method's setting.

    Attributes:
        method: the only method that has it; None if several have.
        read: parses the option's text, which looks like `example`; None for a number, which argparse parses.
    """

    flag: str
    metavar: str
    help: str
    method: str | None = None
    read: Callable[[str], Any] | None = None
    example: str = ""

    @property
    def name(self) -> str:
        """Its attribute in argparse's namespace."""
        return self.flag[2:].replace("-", "_")

    def value(self, words: str) -> Any:
        """The value of the option's text. Raises UserError for an invalid one."""
        assert self.read is not None
        try:
            return self.read(words)
        except ValueError as error:
            raise UserError(f"{self.flag} {words!r}: give {self.example}") from error


_CELLS, _EARLYTOM = CellsConfig.method, EarlyTomConfig.method
METHOD_OPTIONS = {
    "retention_ratio": MethodOption(
        "--ratio", "R", f"share of the visual tokens KEPT, in (0, 1] (default: {EarlyTomConfig.retention_ratio:g})"
    ),
    "merge_layers": MethodOption(
        "--merge-layers",
        "L,L,L",
        "encoder layers after which frames are merged, or 'none' (default: 6,14,20, scaled to the tower's depth)",
        read=layers,
        example="layer numbers such as 6,14,20, or none",
    ),
    "tau": MethodOption(
        "--tau",
        "T",
        f"earlytom: similarity below which a new segment starts (default: {EarlyTomConfig.tau:g})",
        method=_EARLYTOM,
    ),
    "frame_budget": MethodOption(
        "--frame-budget",
        "SHARE|N,N,N",
        "budget schedule: frames kept at each merge layer, as a share or as one count per layer "
        f"(default: {EarlyTomConfig.frame_budget})",
        read=budget,
        example="a share such as 0.75, or one count per merge layer",
    ),
    "power": MethodOption(
        "--power",
        "P",
        "cells: how far a cell of a merged frame prefers the member that differs; 0 averages "
        f"(default: {CellsConfig.power:g})",
        method=_CELLS,
    ),
    "rounds": MethodOption(
        "--rounds",
        "R|greedy",
        f"cells: in how many rounds tokens are taken; greedy: one after the other (default: {CellsConfig.rounds})",
        method=_CELLS,
        read=rounds,
        example="a whole number, or greedy",
    ),
    "threshold": MethodOption(
        "--threshold",
        "T",
        "cells, where the video decides: a frame that changes by so much starts a group; 0 keeps all frames "
        f"(default: {CellsConfig.threshold:g})",
        method=_CELLS,
    ),
}
_SETTING = re.compile(rf"(?<!-)\b({'|'.join(METHOD_OPTIONS)})\b")


def add_method_options(group: Any, *settings: str) -> None:
    """Add the options of these settings to a parser or group. Defaults are None, but for --ratio."""
    for name in settings:
        option = METHOD_OPTIONS[name]
        default = EarlyTomConfig.retention_ratio if name == "retention_ratio" else None
        kind = number if option.read is None else str
        group.add_argument(option.flag, type=kind, default=default, metavar=option.metavar, help=option.help)


def given_settings(options: Any, *settings: str) -> dict[str, Any]:
    """The values of those of these settings that were given. Raises UserError for an invalid one."""
    given = {name: getattr(options, METHOD_OPTIONS[name].name) for name in settings}
    return {
        name: METHOD_OPTIONS[name].value(value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


def in_options(error: UserError) -> UserError:
    """The error with settings' names replaced by their options."""
    return UserError(_SETTING.sub(lambda match: METHOD_OPTIONS[match[0]].flag, str(error)))


def option(default: Any, help: str, metavar: str | None = None, *, group: str = "", **how: Any) -> Any:
    """A dataclass field with an option, of that default.

    Args:
        group: the option's group in the help text.
        how: further arguments of argparse's `add_argument`.
    """
    given = {"default": list(default) if isinstance(default, tuple) else default, "help": help, **how}
    if metavar is not None:
        given["metavar"] = metavar
    return dataclasses.field(default=default, metadata={"group": group, "how": given})


def method_option(group: str) -> Any:
    """A dataclass field whose option is in `METHOD_OPTIONS`."""
    return dataclasses.field(default=None, metadata={"group": group})


def flag(name: str) -> str:
    """The flag of a field's option."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, settings: type, *names: str) -> None:
    """Add the options of the dataclass `settings`; with `names` only those fields'."""
    groups: dict[str | None, Any] = {group.title: group for group in parser._action_groups}
    for field in dataclasses.fields(settings):
        if not field.metadata or (names and field.name not in names):
            continue
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        place = groups[title] if title else parser
        if "how" in field.metadata:
            place.add_argument(flag(field.name), **field.metadata["how"])
        else:
            add_method_options(place, next(name for name, one in METHOD_OPTIONS.items() if one.name == field.name))
