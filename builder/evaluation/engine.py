"""A built engine among the methods: its graphs in ONNX Runtime, and its twin in PyTorch with the same settings.

The engine should give the same answers as its twin, up to the accuracy gate's tolerance for its precision.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from builder.build import build_engine
from builder.evaluation.options import AUTO
from builder.evaluation.passes import ClipPasses
from builder.evaluation.ways.row import Row, Visual
from builder.settings.config import BuildConfig
from builder.settings.options import parse_target
from earlytom.config import EarlyTomConfig
from earlytom.methods import method_of
from earlytom.micro.data.scene import FRAMES
from runtime.checkpoint import Checkpoint, describe
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.text.places import Placing
from runtime.vision import choose_backend, encode_one, open_backend
from runtime.vision.adaptive import Adaptive

ENGINE, TWIN = "engine", "engine-torch"
_BACKEND = "onnxruntime"


def built_engine(source: str, config: EarlyTomConfig, ratio: float, out: Path) -> Path:
    """The fp16 engine folder of one setting, built or found by `python -m builder.build`'s key."""
    method = EarlyTomConfig(
        retention_ratio=ratio,
        merge_layers=config.merge_layers,
        tau=config.tau,
        schedule="budget",
        frame_budget=config.frame_budget,
    )
    return build_engine(
        BuildConfig(
            checkpoint=describe(source),
            earlytom=method,
            frames=FRAMES,
            dtype="fp16",
            target=parse_target("a100"),
            backend="onnx",
            backend_version=onnx.__version__,
        ),
        out,
        say=lambda _: None,
    )


def check_engine(folder: Path, checkpoint: Checkpoint) -> Manifest:
    """The engine's manifest for the task's frame count, if it was built from this checkpoint."""
    manifest = Manifest.read(folder)
    choose_backend(_BACKEND, manifest)
    if manifest.model.digest != checkpoint.digest():
        raise EngineError(
            f"engine {manifest.name} was built from other weights than those of --model {checkpoint.source}: build one "
            f"with python -m builder.build --model {checkpoint.source}, or let --engine {AUTO} do it"
        )
    if FRAMES not in manifest.counts:
        raise EngineError(
            f"engine {manifest.name} takes {' or '.join(map(str, manifest.counts))} frames and the task's clips have "
            f"{FRAMES}: build one with --frames {FRAMES}, or let --engine {AUTO} do it"
        )
    return manifest.at(FRAMES)


def engine_methods(folder: str) -> list[Row]:
    """The engine in a folder that `check_engine` accepted, and its twin."""
    manifest = Manifest.read(folder).at(FRAMES)
    config = manifest.settings
    backend = open_backend(_BACKEND, folder, manifest)

    def engine(clip: ClipPasses, ratio: float) -> Visual:
        found = encode_one(backend, clip.frames)
        # Cloned, as the backend overwrites its outputs.
        stages = backend.frames_per_stage if isinstance(backend, Adaptive) else manifest.frames_per_stage
        tokens, place, bias = found.tokens.float().clone(), found.place.clone(), found.bias.clone()
        return Visual(tokens, stages, config.merge_layers, place, bias)

    def twin(clip: ClipPasses, ratio: float) -> Visual:
        method = method_of(config)
        done = clip.run(method)
        kept = done.choose(method)
        return Visual(kept.tokens, done.stages, config.merge_layers, kept.place, kept.bias)

    precision = manifest.dtype if manifest.int8 is None else f"int8 and {manifest.dtype}"
    what = f"{config.method}, {config.schedule} {config.retention_ratio:g}"
    told = Placing(config.original_positions, config.bias)
    return [
        Row(ENGINE, f"ONNX Runtime {precision}, {what}", "engine", False, engine, told),
        Row(TWIN, f"the same in PyTorch, {what}", "engine", False, twin, told),
    ]
