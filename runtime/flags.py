"""Options of a command as the fields of its settings: each says once what it is, how it is given, what help says of it.

@dataclass(frozen=True)
class Settings:
    clips: int = option(2000, "default: 2000", "N", type=int)

add_options(parser, Settings)
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from runtime.choices import METHOD_OPTIONS, add_method_options


def option(default: Any, help: str, metavar: str | None = None, *, group: str = "", **how: Any) -> Any:
    """A field that an option sets; `default` where it is not given.

    Args:
        group: its part of the help text.
        how: what argparse takes beside the help text.
    """
    given = {"default": list(default) if isinstance(default, tuple) else default, "help": help, **how}
    if metavar is not None:
        given["metavar"] = metavar
    return dataclasses.field(default=default, metadata={"group": group, "how": given})


def method_option(group: str) -> Any:
    """A field that one of `METHOD_OPTIONS` sets."""
    return dataclasses.field(default=None, metadata={"group": group})


def flag(name: str) -> str:
    """How a field's option is typed."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, settings: type, *names: str) -> None:
    """The options of the fields of `settings` that have one; of those named, if any are."""
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
