"""Which engines get plugins, and what is said where there are none."""

from __future__ import annotations

import pytest

from builder import plugins
from builder.plugins import choose
from earlytom.errors import UserError


@pytest.mark.parametrize(
    ("asked", "backend", "target", "chosen"),
    [
        ("auto", "tensorrt", (8, 0), "plugin"),
        ("auto", "tensorrt", (7, 5), "native"),
        ("auto", "tensorrt-rtx", (8, 0), "native"),
        ("auto", "onnx", (8, 0), "native"),
        ("plugin", "tensorrt", (9, 0), "plugin"),
        ("native", "tensorrt", (8, 0), "native"),
        ("native", "tensorrt-rtx", (8, 0), "native"),
        ("native", "onnx", (7, 5), "native"),
    ],
)
def test_which_of_both(
    monkeypatch: pytest.MonkeyPatch, asked: str, backend: str, target: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(plugins.importlib.util, "find_spec", lambda name: object())
    choice = choose(asked, backend, target)
    assert choice.compression == chosen
    assert choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(
    ("backend", "target", "message"),
    [
        ("tensorrt-rtx", (8, 0), r"tensorrt-rtx has no plugins.*parser.*--compression native, or --backend tensorrt"),
        ("onnx", (8, 0), r"ONNX file holds no kernels.*--compression native, or --backend tensorrt"),
        ("tensorrt", (7, 5), r"8\.0, .*not for 7\.5; use --compression native$"),
    ],
)
def test_plugins_that_there_are_none(backend: str, target: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        choose("plugin", backend, target)
    assert "\n" not in str(error.value)


def test_the_adaptive_schedule_has_no_plugins() -> None:
    assert choose("auto", "tensorrt", (8, 0), "adaptive").compression == "native"
    with pytest.raises(UserError, match=r"static shapes, and --schedule adaptive has not; use --compression native$"):
        choose("plugin", "tensorrt", (8, 0), "adaptive")


@pytest.mark.parametrize("asked", ["auto", "plugin"])
def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(plugins.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs Triton: pip install "earlytom-engine-builder\[plugin\]"') as error:
        choose(asked, "tensorrt", (8, 0))
    assert "--compression native" in str(error.value)
    monkeypatch.setattr(plugins.metadata, "packages_distributions", dict)
    with pytest.raises(UserError, match="needs Triton"):
        plugins.triton_version()


def test_an_unknown_word() -> None:
    with pytest.raises(UserError, match="'fast': expected one of auto, plugin, native"):
        choose("fast", "tensorrt", (8, 0))


def test_a_hardware_compatible_engine_has_kernels_for_the_oldest_gpu() -> None:
    assert plugins.kernel_target((9, 0), True) == (8, 0)
    assert plugins.kernel_target((9, 0), False) == (9, 0)
