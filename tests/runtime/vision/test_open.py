"""Which backend runs an engine folder: the reference runs its settings; what cannot run here says so in one line."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig
from runtime import trt
from runtime.checkpoint import describe
from runtime.choices import ENGINE_BACKENDS
from runtime.engine.manifest import Manifest, describe_files
from runtime.errors import EngineError
from runtime.video import load_clip
from runtime.vision import choose_backend, open_backend
from runtime.vision.torch import TorchVision
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")


def torch_vision(folder: Path, **changes: Any) -> TorchVision:
    manifest = Manifest.read(folder)
    config = dataclasses.replace(EarlyTomConfig.from_dict(manifest.earlytom), **changes)
    shape = (manifest.frames, 3, *manifest.model.preprocessing.size)
    checkpoint = describe(manifest.model.source)
    return TorchVision(checkpoint, config, shape, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def frames(engine: Path, drawn_clip: Path) -> Tensor:
    manifest = Manifest.read(engine)
    return load_clip(drawn_clip, manifest.frames, manifest.model.preprocessing.size).frames


@pytest.fixture(scope="module")
def torch_backend(engine: Path, one_thread: None) -> TorchVision:
    return torch_vision(engine)


@pytest.fixture
def compiled(engine: Path, tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """A copy of the engine whose manifest says, in good order, that a TensorRT flavour compiled it."""

    def make(**changes: Any) -> tuple[Path, Manifest]:
        place = tmp_path / "compiled"
        shutil.copytree(engine, place)
        (place / "vision.engine").write_bytes(b"not a plan")
        manifest = Manifest.read(engine).replace(**{"files": describe_files(place), **changes})
        manifest.write(place)
        return place, Manifest.read(place)

    return make


# PyTorch


@pytest.mark.parametrize("changes", [{"tau": 0.99}, {"merge_layers": ()}, {"retention_ratio": 0.2}])
def test_torch_runs_the_settings_it_is_given(
    torch_backend: TorchVision, engine: Path, frames: Tensor, changes: dict[str, Any]
) -> None:
    """Negative control: other settings than the engine's give other tokens."""
    got, wanted = torch_vision(engine, **changes).encode(frames)[0], torch_backend.encode(frames)[0]
    assert got.shape != wanted.shape or not torch.allclose(got, wanted, atol=1e-2)


def test_torch_closes_twice_and_is_closed_then(engine: Path, frames: Tensor) -> None:
    backend = torch_vision(engine)
    tokens, *_ = backend.encode(frames)
    backend.close()
    backend.close()
    assert bool(tokens.isfinite().all())  # what it returned before stays
    with pytest.raises(RuntimeError, match="closed"):
        backend.encode(frames)


# Which one


def test_opening_torch_takes_nothing_from_the_choice(engine: Path) -> None:
    """A module `torch` in this package must not stand in for torch itself, which the choice asks for a GPU."""
    code = (
        "import sys, runtime.vision.torch\n"
        "from runtime.vision import choose_backend\n"
        "from runtime.engine.manifest import Manifest\n"
        "import dataclasses\n"
        "manifest = Manifest.read(sys.argv[1])\n"
        "files = {**manifest.files, 'vision.engine': manifest.files['vision.onnx']}\n"
        "print(choose_backend('auto', manifest.replace(backend='tensorrt-rtx', files=files)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(engine)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("tensorrt-rtx" if torch.cuda.is_available() else "onnxruntime")


def test_torch_is_not_opened_from_a_folder(engine: Path) -> None:
    """It needs a checkpoint; asked for by name, or chosen for a bf16 graph."""
    manifest = Manifest.read(engine)
    for asked, made in (("torch", manifest), ("auto", manifest.replace(dtype="bf16"))):
        with pytest.raises(EngineError, match=r"in PyTorch.*Pipeline\.load"):
            open_backend(asked, engine, made)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_without_the_library(
    compiled: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    monkeypatch.setitem(sys.modules, trt.FLAVOURS[flavour].module, None)
    folder, manifest = compiled(backend=flavour, backend_version="1.2.3")
    with pytest.raises(EngineError, match=f"{flavour} is not installed: pip install .*{trt.FLAVOURS[flavour].extra}"):
        open_backend(flavour, folder, manifest)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu(
    compiled: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    """The version fits, the file is there, and no GPU is."""
    monkeypatch.setattr(trt, "load", lambda name: SimpleNamespace(__version__="11.0.0"))
    monkeypatch.setattr(trt, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder, manifest = compiled(backend=flavour, backend_version="11.0.0")
    with pytest.raises(EngineError, match="none was found: use --backend onnxruntime") as caught:
        open_backend(flavour, folder, manifest)
    assert "\n" not in str(caught.value)
    assert choose_backend("auto", manifest) == "onnxruntime"


@pytest.mark.parametrize("installed", ["1.7.1", "1.7.1.117", "1.8.0.1", "2.0"])
def test_another_version_is_refused(
    compiled: Callable[..., tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    monkeypatch.setattr(trt, "load", lambda name: SimpleNamespace(__version__=installed))
    folder, manifest = compiled(backend="tensorrt-rtx", backend_version="1.7.1.116")
    with pytest.raises(EngineError, match=r"1\.7\.1\.116 and .* is installed.*rebuild it"):
        open_backend("tensorrt-rtx", folder, manifest)


def test_every_engine_backend_is_one_a_manifest_can_name(engine: Path) -> None:
    manifest = Manifest.read(engine)
    files = {**manifest.files, "vision.engine": manifest.files["vision.onnx"]}
    for name in ENGINE_BACKENDS:
        backend = "onnx" if name == "onnxruntime" else name
        assert choose_backend(name, manifest.replace(backend=backend, files=files)) == name
