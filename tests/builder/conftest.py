"""Shared by the builder's tests: exported graphs and one built engine, each made once a session, and real frames.

`exported(...)` and `small_checkpoint` keep the whole suite to a few exports: an export takes seconds however small the
model is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from builder import build, stages
from builder.export.vision import ExportedGraph, VisionGraph, vision_graph
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom import encode_video
from earlytom.encoder import VisualTokens
from runtime.drawing.clips import draw_clip
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.video import load_clip
from tests.conftest import SMALL as SMALL
from tests.shared import Shared

# Of the exported graphs and the engine. With this many frames of a drawn clip and this threshold frames are dropped,
# folded and static, so that every rule takes part.
FRAMES = 12
TAU = "0.5"


@dataclass(frozen=True)
class Exported:
    """An exported graph, what was asked for, and the same vision part in fp32 in PyTorch."""

    config: BuildConfig
    graph: ExportedGraph
    reference: VisionGraph

    @property
    def path(self) -> Path:
        return self.graph.path


@dataclass(frozen=True)
class Chain:
    """An exported chain, and the same vision part in fp32 in PyTorch."""

    config: BuildConfig
    folder: Path
    reference: VisionGraph

    @property
    def paths(self) -> list[Path]:
        return [self.folder / layout.stage_file(layout.ONNX_FILE, n) for n in range(len(self.config.stages))]

    def encode(self, frames: Tensor) -> VisualTokens:
        return reference_of(self.reference, frames)


def reference_of(graph: VisionGraph, frames: Tensor) -> VisualTokens:
    pixels = graph.pixels(frames)
    return encode_video(graph.vision_tower, graph.projector, pixels, graph.config, depth=graph.layers)


@pytest.fixture(scope="session", autouse=True)
def _each_export_once(each_export_once: None) -> None:
    """Every build of this folder's tests."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Callable[..., Exported]:
    """`exported("--ratio", "0.3", "--fp16")`: that graph of the small checkpoint; equal arguments share one export."""
    made: dict[tuple[str, ...], Exported] = {}

    def export(*arguments: str) -> Exported:
        if arguments not in made:
            words = ["--model", str(small_checkpoint), "--frames", str(FRAMES), "--backend", "onnx"]
            own = [] if "--method" in arguments else ["--tau", TAU]  # of EarlyTom alone
            _, config, _ = parse([*words, *own, *arguments])
            graph = stages.export(config, tmp_path_factory.mktemp("export"))
            made[arguments] = Exported(config, graph, vision_graph(config, torch.float32))
        return made[arguments]

    return export


@pytest.fixture(scope="session")
def chain_of(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Callable[..., Chain]:
    """`chain_of("--fp16")`: that chain of the small checkpoint; equal arguments share one export."""
    made: dict[tuple[str, ...], Chain] = {}

    def export(*arguments: str) -> Chain:
        if arguments not in made:
            words = ["--model", str(small_checkpoint), "--frames", str(FRAMES), "--backend", "onnx"]
            own = [] if "--method" in arguments else ["--tau", TAU]  # of EarlyTom alone
            _, config, _ = parse([*words, *own, "--ratio", "0.3", "--schedule", "adaptive", *arguments])
            folder = tmp_path_factory.mktemp("chain")
            stages.export_stages(config, folder)
            made[arguments] = Chain(config, folder, vision_graph(config, torch.float32))
        return made[arguments]

    return export


@pytest.fixture(scope="session")
def chain(chain_of: Callable[..., Chain]) -> Chain:
    return chain_of("--fp32")


@pytest.fixture(scope="session")
def videos(shared: Shared) -> tuple[Path, ...]:
    """Two drawn clips as files."""
    names = {seed: f"drawn{seed}.mp4" for seed in range(2)}
    folder = shared("videos", lambda place: [draw_clip(place / name, seed=seed) for seed, name in names.items()])
    return tuple(folder / name for name in names.values())


@pytest.fixture(scope="session")
def clips(videos: tuple[Path, ...]) -> dict[str, Tensor]:
    """uint8 frames [FRAMES, 3, 72, 72] of each drawn clip."""
    return {path.name: load_clip(path, FRAMES, (72, 72)).frames for path in videos}


@pytest.fixture(scope="session")
def build_arguments(small_checkpoint: Path) -> list[str]:
    """The command line of the session's engine, without --out."""
    words = f"--frames {FRAMES} --ratio 0.3 --tau {TAU} --backend onnx".split()
    return ["--model", str(small_checkpoint), *words]


@pytest.fixture(scope="session")
def engine(shared: Shared, build_arguments: list[str]) -> Path:
    """The folder of an engine built by the command, for reading only."""

    def build_it(out: Path) -> None:
        assert build.main([*build_arguments, "--out", str(out), "--verify-text"]) == 0

    (folder,) = shared.copy("small-engine", build_it).iterdir()
    Manifest.read(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every module of this folder runs on one thread."""
