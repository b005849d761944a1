"""The floors of the house: a file imports its own room and the floors below, no files import each other in a circle, no
two classes share a name, no folder overflows, nothing imports a command, and one room knows the model families.

The sources are parsed, not run: an import inside a function counts, one for type checkers alone does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; rooms on one floor do not know each other. A room is a module or a folder of a package; a module
# of a folder that lies lower than the rest of it is named with both.
FLOORS: dict[str, tuple[str, ...]] = {
    "earlytom": (
        "errors",
        "numbers attention transfers restorable density ranking scenes",
        "bipartite",
        "config budget",
        "cells/config untouched",
        "settings",
        "spans merge select flops inner standing",
        "cells holitom tempme vqtoken bvllm visionzip dycoke fastvid unicomp flashvid pooled",
        "kernels",
        "ops",
        "inner_decoder towers",
        "families",
        "micro method",
        "encoder methods",
        "model",
    ),
    "runtime": (
        "errors choices trace show",
        "cli files gpu trt forks checkpoint",
        "drawing engine video text",
        "decoder vision",
        "options",
        "service",
        "parts",
        "pipeline",
        "serve",
        "measure",
        "ask bench clip extract_decoder scripts",
    ),
    "builder": (
        "cache micro settings/options trace",
        "show",
        "precision",
        "export",
        "plugins",
        "settings source",
        "clips compile",
        "gate",
        "record",
        "inspection stages",
        "build verify inspect",
        "evaluation operators",
        "doctor",
        "evaluate kernels scripts",
    ),
}
COMMANDS = {
    "builder/build.py", "builder/verify.py", "builder/inspect.py", "builder/evaluate.py", "builder/kernels.py",
    "builder/plugins/__main__.py", "builder/doctor/__main__.py", "builder/micro/train.py", "runtime/ask.py",
    "runtime/bench.py", "runtime/clip.py", "runtime/serve/__main__.py", "runtime/extract_decoder.py",
}  # fmt: skip
MOST_FILES = 14  # of a folder, `__init__` not counted
METHOD = "earlytom"  # its own floor plan is a file a floor

FAMILIES = "earlytom/families/"
FAMILY_WORDS = re.compile(
    "llava|siglip|image_newline|multi_modal_projector|<video>|qwen3.?vl|qwen2.?5|deepstack", re.IGNORECASE
)
# Names that a help text shows, of a checkpoint that exists or might: an example must name one.
EXAMPLES = {
    "builder/settings/parser.py": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "random:llava-onevision-qwen2-7b-ov"),
    "builder/kernels.py": ("LLaVA-OneVision-7B",),
    "builder/plugins/__main__.py": ("LLaVA-OneVision-7B",),
    "runtime/ask.py": ("/models/llava-onevision",),
    "runtime/measure/arguments.py": ("random:siglip-base-qwen2-0.5b", "random:llava-onevision-qwen2-7b-ov"),
}

Sources = Mapping[str, str]  # path from the root, with slashes -> source


def sources() -> dict[str, str]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_text("utf-8")
        for package in FLOORS
        for file in sorted((ROOT / package).rglob("*.py"))
    }


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and module of everything of ours that a file imports when it runs."""
    tree = ast.parse(source)
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            here = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{full}.{alias.name}"
                if name in modules or full in modules:
                    yield node.lineno, name if name in modules else full


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor_of(module: str, floors: Mapping[str, tuple[str, ...]] = FLOORS) -> int:
    """The floor of a module's room; -1 for a package itself.

    Raises:
        KeyError: a room that is in no floor.
    """
    package, *parts = module.split(".")
    if not parts:
        return -1
    for name in ("/".join(parts[:2]), parts[0]):
        for floor, rooms in enumerate(floors[package]):
            if name in rooms.split():
                return floor
    raise KeyError(f"{module}: no floor has the room {parts[0]!r}")


def upward(files: Sources) -> list[str]:
    """Imports that leave their room and do not go down."""
    modules = {module_of(path) for path in files}
    found = []
    for path, source in files.items():
        me = module_of(path)
        for line, name in imports(path, source, modules):
            if me.split(".")[0] != name.split(".")[0] or room_of(me) == room_of(name):
                continue  # between packages `test_dependencies` holds the rule
            if floor_of(name) >= floor_of(me) and room_of(me):
                found.append(f"{path}:{line}: {room_of(me)} imports {name}")
    return found


def circles(files: Sources) -> list[list[str]]:
    """Files that import each other, however far around."""
    modules = {module_of(path): path for path in files}
    edges = {
        module_of(path): {name for _, name in imports(path, source, set(modules)) if name != module_of(path)}
        for path, source in files.items()
    }
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting.extend(edges[one])
        reach[start] = seen
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in reach if a in reach[a]}
    return [list(circle) for circle in sorted(found)]


def twins(files: Sources) -> list[str]:
    """Class names that exist more than once."""
    where: dict[str, list[str]] = {}
    for path, source in files.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(where.items()) if len(paths) > 1]


def crowded(files: Sources) -> list[str]:
    counts: dict[str, int] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        counts[folder] = counts.get(folder, 0) + (name != "__init__.py")
    return [f"{folder}: {n} files" for folder, n in counts.items() if n > MOST_FILES and folder != METHOD]


def commanded(files: Sources) -> list[str]:
    """Imports of a command, but by its own folder; what several need of one is a library's. `builder.build` is both:
    its `build_engine` is the builder's face."""
    modules = {module_of(path) for path in files}
    commands = {module_of(path) for path in COMMANDS} - {"builder.build"}
    return [
        f"{path}:{line}: imports {name}"
        for path, source in files.items()
        for line, name in imports(path, source, modules)
        if name in commands
    ]


def parsed_arguments(files: Sources) -> list[str]:
    """Functions that take a command's parsed arguments, or its screen, and are neither in one nor in a module about
    arguments."""
    return [
        f"{path}:{node.lineno}: {node.name}"
        for path, source in files.items()
        if path not in COMMANDS and not path.endswith("/arguments.py")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if one.annotation and re.search(r"\b(Namespace|Screen)\b", ast.unparse(one.annotation))
    ]


def family_words(files: Sources) -> list[str]:
    """Words of one model family outside the room of the families, but for the names that are allowed there."""
    found = []
    for path, source in files.items():
        for name in sorted(EXAMPLES.get(path, ()), key=len, reverse=True):
            source = source.replace(name, "")
        if not path.startswith(FAMILIES):
            lines = enumerate(source.splitlines(), start=1)
            found += [f"{path}:{number}: {word[0]}" for number, line in lines if (word := FAMILY_WORDS.search(line))]
    return found


@pytest.mark.parametrize("check", [upward, circles, twins, crowded, commanded, parsed_arguments, family_words])
def test_the_house_stands(check: Callable[[Sources], list[Any]]) -> None:
    assert not (found := check(sources())), "\n".join(map(str, found))


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in EXAMPLES.items() for name in names])
def test_no_exception_has_outlived_its_reason(path: str, name: str) -> None:
    assert name in sources()[path]


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    rooms = {
        package: {room_of(module_of(path)) for path in sources() if path.startswith(package)} for package in FLOORS
    }
    for package, floors in FLOORS.items():
        named = {name.partition("/")[0] for names in floors for name in names.split()}
        assert named == rooms[package] - {""}


@pytest.mark.parametrize(
    ("check", "files"),
    [
        (upward, {"runtime/engine/x.py": "from runtime.service import y", "runtime/service/y.py": ""}),
        (upward, {"runtime/video/x.py": "def f():\n    import runtime.text.y", "runtime/text/y.py": ""}),
        (upward, {"builder/precision/x.py": "from ..settings import config", "builder/settings/config.py": ""}),
        (circles, {"runtime/a.py": "from runtime import b", "runtime/b.py": "def f():\n    from runtime.a import x"}),
        (twins, {"earlytom/a.py": "class Prompt: ...", "runtime/b.py": "class Prompt: ..."}),
        (crowded, {f"runtime/engine/{n}.py": "" for n in range(MOST_FILES + 1)}),
        (commanded, {"builder/gate/x.py": "from builder import verify", "builder/verify.py": ""}),
        (family_words, {"runtime/engine/x.py": 'KEY = "model.Image_Newline"'}),
        (family_words, {"runtime/ask.py": '"""For /models/llava-onevision and any other LLaVA."""'}),
        (parsed_arguments, {"builder/gate/x.py": "def f(options: argparse.Namespace) -> None: ..."}),
        (parsed_arguments, {"runtime/measure/x.py": "def f(*, out: cli.Screen | None = None) -> None: ..."}),
    ],
)
def test_a_made_up_violation_is_found(check: Callable[[Sources], list[Any]], files: Sources) -> None:
    """Negative control."""
    assert len(check(files)) == 1


@pytest.mark.parametrize(
    ("check", "files"),
    [
        (upward, {"runtime/service/x.py": "from runtime.engine import y", "runtime/engine/y.py": ""}),
        (
            upward,
            {"builder/precision/x.py": "from builder.settings.options import y", "builder/settings/options.py": ""},
        ),
        (upward, {"runtime/engine/x.py": "if TYPE_CHECKING:\n    import runtime.pipeline", "runtime/pipeline.py": ""}),
        (circles, {"runtime/a.py": "from runtime import b", "runtime/b.py": "import earlytom"}),
        (parsed_arguments, {"runtime/ask.py": "def f(options: argparse.Namespace, out: cli.Screen) -> None: ..."}),
        (family_words, {"earlytom/families/x.py": "class Siglip: ..."}),
        (family_words, {"runtime/ask.py": '"""For /models/llava-onevision."""'}),
        (commanded, {"builder/gate/x.py": "from builder.build import build_engine", "builder/build.py": ""}),
    ],
)
def test_what_is_allowed_is_not_reported(check: Callable[[Sources], list[Any]], files: Sources) -> None:
    assert not check(files)
