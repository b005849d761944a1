"""Which sources an engine's key goes by: those that decide what it contains, and no others.

A copy of the sources is edited, module by module.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.settings import key

ROOT = Path(__file__).parents[3]
PACKAGES = ("earlytom", "runtime", "builder")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources again, to be edited."""
    root = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    return root


def changes(root: Path, path: str) -> bool:
    """Whether another comment in a source, by its path from the root, changes the digest."""
    before, file = key.code_digest(root), root / path
    kept = file.read_bytes()
    file.write_bytes(kept + b"# edited\n")
    try:
        return key.code_digest(root) != before
    finally:
        file.write_bytes(kept)


def sources(root: Path, *names: str) -> list[str]:
    """The files of modules ("runtime/video") or packages, by their paths from the root."""
    found = [path for name in names for path in (root / f"{name}.py", *(root / name).rglob("*.py")) if path.is_file()]
    return [path.relative_to(root).as_posix() for path in found]


def test_a_copy_has_the_digest_of_these_sources(tree: Path) -> None:
    assert key.code_digest(tree) == key.code_digest()


@pytest.mark.parametrize(
    "module",
    [
        "builder/export",
        "builder/precision",
        "builder/compile",
        "builder/plugins/ptx",
        "builder/plugins/registry",
        "builder/gate/accuracy",
        "builder/gate/runs",
        "builder/settings/config",
        "builder/clips",
        "builder/stages",
        "earlytom/encoder",
        "earlytom/merge",
        "earlytom/kernels",
        "earlytom/micro/data",
        "earlytom/micro/weights",
        "runtime/video",
        "runtime/drawing",
        "runtime/checkpoint",
        "runtime/engine",
    ],
)
def test_what_decides_an_engine_changes_its_key(tree: Path, module: str) -> None:
    found = sources(tree, module)
    assert found
    for path in found:
        assert changes(tree, path), path


@pytest.mark.parametrize(
    "module",
    [
        "builder/settings/arguments",
        "builder/settings/parser",
        "builder/build",
        "builder/cache",
        "builder/gate/drift",
        "builder/operators",
        "builder/evaluate",
        "builder/evaluation",
        "builder/inspect",
        "builder/inspection",
        "builder/kernels",
        "builder/plugins/__main__",
        "builder/show",
        "builder/verify",
        "builder/micro",
        "earlytom/families/bundled",
        "runtime/ask",
        "runtime/measure",
        "runtime/cli",
        "runtime/clip",
        "runtime/pipeline",
    ],
)
def test_commands_screens_and_what_looks_at_engines_do_not(tree: Path, module: str) -> None:
    found = sources(tree, module)
    assert found
    for path in found:
        assert not changes(tree, path), path


def test_a_new_source_of_the_builder_counts(tree: Path) -> None:
    """Forgetting to name one builds an engine too many; the other way round a stale one would be taken."""
    before, path = key.code_digest(tree), tree / "builder" / "fusion.py"
    path.write_text("")
    try:
        assert key.code_digest(tree) != before
    finally:
        path.unlink()


def imported(path: Path) -> Iterator[Path]:
    """The sources of this project that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


# Imported by what counts, and decides nothing: words and limits that the key holds the outcome of, errors, screens; the
# decoder, which says what the gate's last step thinks of an engine; ONNX Runtime's sessions, which the gate's runs are;
# the world of the test clips.
HARMLESS = (
    "builder/settings/__init__",
    "builder/settings/options",
    "builder/show",
    "earlytom/micro",
    "runtime/__init__",
    "runtime/cli",
    "runtime/decoder",
    "runtime/errors",
    "runtime/gpu",
    "runtime/files",
    "runtime/choices",
    "runtime/show",
    "runtime/text",
    "runtime/trace",
    "runtime/vision/onnxruntime",
    "runtime/vision/runner",
)


def test_everything_that_the_stages_import_counts_or_is_known_not_to() -> None:
    """A module that is split, or a new one that frames come through, cannot fall out of the key unnoticed."""
    todo, reached = [ROOT / "builder" / "stages.py"], set[Path]()
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo.extend(imported(path))
    names = {path.relative_to(ROOT).as_posix() for path in reached}
    assert {"builder/export/vision.py", "earlytom/merge.py"} < names
    missing = names - set(key.code_digest()) - set(sources(ROOT, *HARMLESS))
    assert not missing, "name them in builder/settings/key.py, or here as harmless"
