"""Serve an engine to OpenAI's clients: `python -m runtime.serve ENGINE`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from runtime import cli
from runtime.engine.folder import newest_engine
from runtime.engine.manifest import Manifest
from runtime.serve.settings import Flag, Settings, flags, option

EXAMPLES = """
examples:
  python -m runtime.serve engines
      answers on http://127.0.0.1:8000/v1 whoever is on this machine; a page to try it is at http://127.0.0.1:8000/
  python -m runtime.serve engines/NAME --host 0.0.0.0 --api-key-file keys.txt
      for others: each line of keys.txt is a key
  python -m runtime.serve engines/NAME --allow-domain videos.example.org --allow-domain "*.example.com"
      clients may give addresses of videos there; without it they send videos themselves
  python -m runtime.serve engines/NAME --ray --replicas 4
      four engines behind one address; a video's questions go to the one that has read it

Clients need to know nothing but OpenAI's chat completions: a message has a part {"type": "video_url", "video_url":
{"url": "data:video/mp4;base64,..."}} and a text. Further questions about a video find it read by its content.

SIGTERM and Ctrl-C stop it: what is in line is answered, /ready says no, new requests get 503. The exit status is 0
then, and 2 when something asked for cannot be done.
"""
MANIFEST = "manifest.json"
LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "multipart", "PIL")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 once the server has been stopped; every failure is raised (see `runtime.cli.run`)."""
    settings = settings_of(parser().parse_args(argv))
    if not (settings.engine / MANIFEST).exists() and any(settings.engine.glob(f"*/{MANIFEST}")):
        settings = dataclasses.replace(settings, engine=newest_engine(settings.engine))
    Manifest.read(settings.engine, verify_files=False)  # what is no engine is refused before PyTorch is imported
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} is not installed, which a server needs: pip install -e ".[serve]"')
    from runtime.serve.http.server import serve

    if settings.ray:
        if importlib.util.find_spec("ray") is None:
            raise UserError('ray is not installed, which --ray answers with: pip install -e ".[ray]"')
        from runtime.serve.ray import on_this_machine

        serve(settings, cli.Screen(), on_this_machine)
    else:
        serve(settings, cli.Screen())
    return 0


def parser() -> argparse.ArgumentParser:
    """The options, with a help text that teaches."""
    p = cli.Parser(
        prog="python -m runtime.serve",
        description="Answer questions about videos as OpenAI's chat completions do, with an engine that "
        "python -m builder.build made.",
        epilog=EXAMPLES,
    )
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder, or a folder of them: the newest")
    for name, (default, flag) in flags().items():
        if isinstance(default, bool):
            action = "store_false" if default else "store_true"
            p.add_argument(option(name), dest=name, action=action, help=flag.help)
        elif flag.kind is bool:
            p.add_argument(option(name), action=argparse.BooleanOptionalAction, help=flag.help)
        elif flag.several:
            p.add_argument(option(name), dest=name, action="append", metavar=flag.metavar, help=flag.help)
        else:
            known = "" if default is None or "default" in flag.help else f" (default: {_shown(name, default)})"
            p.add_argument(
                option(name),
                type=_reader(flag),
                default=default,
                metavar=flag.metavar,
                choices=flag.choices,
                help=flag.help + known,
            )
    return p


def settings_of(options: argparse.Namespace) -> Settings:
    """What the options ask for. Raises UserError, by the flag, for what makes no sense."""
    values: dict[str, Any] = {
        name: tuple(value or ()) if _several(name) else value for name, value in vars(options).items()
    }
    return Settings(**values)


def _reader(flag: Flag) -> Callable[[str], Any]:
    """What reads a value, and says of one that it cannot read why."""

    def read(text: str) -> Any:
        try:
            return flag.kind(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    read.__name__ = flag.kind.__name__  # what argparse calls a value that is none
    return read


def _several(name: str) -> bool:
    found = flags().get(name)
    return found is not None and found[1].several


def _shown(name: str, default: object) -> str:
    sizes = name in ("max_body", "max_video", "watch_bytes")
    return f"{int(str(default)) >> 20}MiB" if sizes else f"{default}"


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
