"""What the tests of the whole path share: engines of the bundled model and a clip, each made once a session."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runtime.clip import draw_clip


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_engine("--fp32")`: the folder that the builder's own command makes of the bundled model for ONNX Runtime,
    unverified, as the gate has its own tests."""
    from builder import build

    out = tmp_path_factory.mktemp("whole") / "engines"

    def make(*words: str) -> Path:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            build.main([*words, "--backend", "onnx", "--out", str(out), "--no-verify", "--json"])
        return Path(json.loads(printed.getvalue())["folder"])

    return make


@pytest.fixture(scope="session")
def engine(build_engine: Callable[..., Path]) -> Path:
    """Engine folder of the bundled model in fp32, ratio 0.3. Read only: copy it to change it."""
    return build_engine("--ratio", "0.3", "--fp32")


@pytest.fixture(scope="session")
def half_engine(build_engine: Callable[..., Path]) -> Path:
    """The same in fp16, as the README's first command builds it."""
    return build_engine("--ratio", "0.3", "--fp16")


@pytest.fixture(scope="session")
def drawn_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's clip: 6 seconds of 320x240."""
    return draw_clip(tmp_path_factory.mktemp("clips") / "drawn.mp4")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The bundled model is so small that a second thread only waits for the first, at length on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
