"""Engine folders to look into: copies that tests change, one that looks compiled, and the command that shows them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import inspect
from builder.compile.layers import Layer, LayerTensor, summarise
from runtime import cli
from runtime.engine import layout
from runtime.engine.manifest import Manifest, describe_files

Command = Callable[..., tuple[int, str, str]]


def inspect_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `builder.inspect` in this process: status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(inspect.main, list(map(str, words)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def copy_of(engine: Path, place: Path) -> Path:
    """An engine folder to be changed."""
    return Path(shutil.copytree(engine, place / "engines" / engine.name))


def seal(folder: Path, **changes: Any) -> None:
    """A manifest that fits what is in the folder now."""
    old = Manifest.read(folder, verify_files=False)
    old.replace(**{"files": describe_files(folder), **changes}).write(folder)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def tensor(name: str, *shape: int, dtype: str = "fp16") -> LayerTensor:
    return LayerTensor(name, shape, dtype, "")


def layer(name: str, kind: str, work: str, flops: int, *constants: LayerTensor, precision: str = "fp16") -> Layer:
    x = (tensor("x", 4, 4, dtype=precision),)
    return Layer(name, kind, work, precision, flops, "", x, constants, x, (name.removesuffix("_0"),))


SHARED = tensor("w", 10, 10)
LAYERS = (
    layer("small", "gemm", "product", 100, SHARED),
    layer("large", "gemm", "product", 700, SHARED, tensor("b", 50, dtype="fp32"), tensor("i", 9, dtype="int64")),
    layer("attention_0", "kgen", "attention", 150),
    layer("norm", "kgen", "other", 0, tensor("n", 5, dtype="fp32"), precision="fp32"),
    layer("island", "gemm", "product", 50, precision="fp32"),
    Layer("wait", "signal", "other", "", 0, "", (), (), (), ()),
)


def drop(*path: str) -> Callable[[dict[str, Any]], object]:
    def edit(values: dict[str, Any]) -> None:
        for name in path[:-1]:
            values = values[name]
        del values[path[-1]]

    return edit


def look_compiled(folder: Path) -> Path:
    """Make a folder like that of a compiled engine; its layers are made up."""
    (folder / layout.ENGINE_FILE).write_bytes(b"not an engine at all")
    document = {
        "source": "build log",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1",
        "summary": summarise(LAYERS, ("attention", "lost")).to_dict(),
        "layers": [dataclasses.asdict(one) for one in LAYERS],
    }
    (folder / layout.LAYERS_FILE).write_text(json.dumps(document))
    report = {"flavour": "tensorrt-rtx", "warnings": ["the sun is shining"], "layers": {}, "seconds": {"total": 1.0}}
    edit_json(folder / layout.REPORT_FILE, lambda values: values.update(compile=report))
    seal(folder, backend="tensorrt-rtx", backend_version="1.7.1")
    return folder
