"""Who may import whom: `earlytom <- runtime <- builder`, one module for TensorRT, nothing optional needed to import.

The sources are parsed, not run, so an import inside a function counts as well. The last tests do import the packages,
in a process where the optional libraries cannot be found.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("earlytom", "runtime", "builder")
FORBIDDEN = {"earlytom": {"runtime", "builder"}, "runtime": {"builder"}, "builder": set()}
TENSORRT = {"tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_libs", "tensorrt_rtx_bindings"}
TENSORRT_MODULE = "runtime/trt.py"
TENSORRT_NAMES = ("tensorrt", "tensorrt_rtx", "torch_tensorrt")
OPTIONAL = (*TENSORRT_NAMES, "onnxruntime", "onnx", "onnx_ir", "onnxscript", "polygraphy", "triton")
# What only the server imports, and nobody else. transformers needs httpcore2 by itself, so it is always there.
SERVING = {"fastapi", "starlette", "uvicorn", "prometheus_client", "multipart", "PIL", "httpcore2", "pydantic"}
SERVING_ROOM = "runtime/serve/"


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, by statement or by `importlib.import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def reads_environment(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (
                node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv", "putenv")
            )


def violations(path: str, source: str) -> list[str]:
    """What a source file (its path from the root, with slashes) does that the rules forbid."""
    tree = ast.parse(source)
    package = path.split("/")[0]
    found = []
    for line, name in imported(tree, ".".join(path.split("/")[:-1])):
        top = name.split(".")[0]
        if top in FORBIDDEN[package]:
            found.append(f"{path}:{line}: {package} imports {name}")
        if top in TENSORRT and path != TENSORRT_MODULE:
            found.append(f"{path}:{line}: only {TENSORRT_MODULE} may import {name}")
        if top in SERVING and not path.startswith(SERVING_ROOM):
            found.append(f"{path}:{line}: only {SERVING_ROOM} may import {name}")
    if package == "earlytom":
        found += [f"{path}:{line}: reads an environment variable" for line in reads_environment(tree)]
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_keep_to_the_rules(package: str) -> None:
    files = sources(package)
    assert files
    found = [v for file in files for v in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("earlytom/x.py", "import runtime"),
        ("earlytom/x.py", "from runtime.errors import EngineError"),
        ("earlytom/deep/x.py", "def f():\n    import builder.cache as c"),
        ("earlytom/x.py", "import importlib\nimportlib.import_module('runtime.video')"),
        ("runtime/x.py", "from builder import cache"),
        ("runtime/vision/x.py", "import tensorrt"),
        ("runtime/vision/x.py", "def f():\n    from tensorrt_rtx import Builder"),
        ("builder/x.py", "import tensorrt as trt"),
        ("runtime/pipeline.py", "def f():\n    from fastapi import FastAPI"),
        ("builder/x.py", "import uvicorn"),
        ("earlytom/x.py", "import os\nos.environ['TAU']"),
        ("earlytom/x.py", "import os\ntau = os.getenv('TAU', 1)"),
        ("earlytom/x.py", "from os import environ"),
    ],
)
def test_a_made_up_violation_is_found(path: str, source: str) -> None:
    """Negative control."""
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("builder/x.py", "import runtime.trt, earlytom\nfrom runtime.engine import layout"),
        ("runtime/x.py", "from earlytom.errors import UserError\nfrom runtime.trt import load"),
        ("runtime/vision/x.py", "from . import torch\nfrom ..trt import seam\nfrom ..engine import layout"),
        ("runtime/trt.py", "def f():\n    import tensorrt_rtx\n    import tensorrt"),
        ("runtime/x.py", "import os\nos.environ.get('HOME')"),
        ("earlytom/x.py", "import runtime_checks, os.path  # a name that only begins alike\n'import builder'"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert not violations(path, source)


def test_tensorrt_is_imported_where_it_is_used_only() -> None:
    """Inside functions: importing `runtime.trt` itself must not need the library."""
    tree = ast.parse((ROOT / TENSORRT_MODULE).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not [name for _, name in imported(node, "runtime") if name.split(".")[0] in TENSORRT]


BLOCKED = """
import sys

class Without:
    # A finder that does not find the optional libraries, as if they were not installed.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {optional!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
{statement}
"""


def run_blocked(statement: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(optional=(*OPTIONAL, *(SERVING - {"httpcore2"})), statement=statement)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


def test_importing_needs_no_optional_library() -> None:
    done = run_blocked("import earlytom, runtime, builder")
    assert done.returncode == 0, done.stderr


def test_no_module_of_the_reference_or_the_runtime_needs_one_until_it_is_used() -> None:
    """But for the kernels: they are written in Triton, and imported where they are used. The server's libraries are
    those of an extra too: of its room the command and its settings alone do without."""
    files = [*sources("earlytom"), *sources("runtime")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    names = [name for name in names if not name.startswith("earlytom.kernels.")]
    light = ("runtime.serve", "runtime.serve.__main__", "runtime.serve.settings", "runtime.serve.errors")
    names = [name for name in names if not name.startswith("runtime.serve") or name in light]
    done = run_blocked(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_import_hook_does_block() -> None:
    """Negative control."""
    done = run_blocked("import onnxruntime")
    assert done.returncode != 0
    assert "No module named 'onnxruntime'" in done.stderr
