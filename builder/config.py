"""What a build is asked for, checked before any work starts, and the key that names its result.

A `BuildConfig` is made once from the command line (or by a caller), against the checkpoint it is for, and is frozen.
Two builds with equal keys would produce the same folder, so the key covers everything that changes it: the weights that
the vision engine depends on, the method's settings, precision, target, backend and its version, the clips it is checked
on, and the code that builds it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.compile import WORKSPACE_GIB
from builder.islands import DEFAULT, Costs, Islands
from builder.plugins import triton_version
from earlytom import flops
from earlytom.budget import pooled_side
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.model import feature_depth
from runtime.checkpoint import Checkpoint
from runtime.engine.dtypes import DTYPES
from runtime.engine.layout import Layout, Sizes, count_file

DISTRIBUTION = "earlytom-engine-builder"
TARGETS = {"a100": (8, 0)}
MAX_FRAMES = 128
MAX_BATCH = 64
# Libraries whose version may change the exported graph.
EXPORTERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def parse_target(text: str) -> tuple[int, int]:
    """A GPU name or a compute capability: "a100" or "8.0" to (8, 0)."""
    if text.lower() in TARGETS:
        return TARGETS[text.lower()]
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if match is None:
        raise UserError(f"--target {text!r} is neither {', '.join(TARGETS)} nor a compute capability such as 8.0")
    return int(match[1]), int(match[2])


def project_version() -> str:
    """Version of the installed project."""
    return metadata.version(DISTRIBUTION)


@dataclass(frozen=True)
class BuildConfig:
    """One build.

    Attributes:
        checkpoint: the model, described but not loaded.
        earlytom: the method's settings.
        frames: F, frames of a clip; where the engine takes one of several counts, the most.
        dtype: "fp16", "bf16" or "fp32".
        target: compute capability the engine is for.
        backend: "onnx", "tensorrt" or "tensorrt-rtx", already resolved.
        backend_version: version of the library that compiles.
        hardware_compatible, workspace_gib: see `builder.compile.compile_engine`.
        compression: "plugin" or "native", already resolved.
        calibration: video files whose frames the gate runs on; none means the drawn clip.
        islands: what stays fp32 in half precision.
        batch: B, videos at once; counts, flops and costs are those of one.
        frame_counts: the frame counts, ascending, if there are several; each gets a graph and an engine of its own.
            What `at` returns has one of them, and the properties below are about `frames`.
        chunk: C, frames of a chunk, if clips come in chunks.
    """

    checkpoint: Checkpoint
    earlytom: EarlyTomConfig
    frames: int
    dtype: str
    target: tuple[int, int]
    backend: str
    backend_version: str
    hardware_compatible: bool = False
    workspace_gib: float = WORKSPACE_GIB
    compression: str = "native"
    calibration: tuple[Path, ...] = ()
    islands: Islands = DEFAULT
    batch: int = 1
    frame_counts: tuple[int, ...] | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for frames in (*self.counts, self.frames):
            if not 1 <= frames <= MAX_FRAMES:
                raise UserError(f"the number of frames must be between 1 and {MAX_FRAMES}, got {frames}: set --frames")
        if list(self.counts) != sorted(set(self.counts)) or self.frames != self.counts[-1]:
            raise UserError(f"frame counts must be ascending, the last being {self.frames}, got {self.counts}")
        if not 1 <= self.batch <= MAX_BATCH:
            raise UserError(f"the number of videos must be between 1 and {MAX_BATCH}, got {self.batch}: set --batch")
        self._check_shapes()
        if self.adaptive and self.compression == "plugin":
            raise UserError("the plugins have static shapes: build --schedule adaptive with --compression native")
        if self.earlytom.merges_inside:
            raise UserError(
                "an engine holds the vision part, so inner merging is not part of a build: give "
                f"--inner-layer {self.earlytom.inner_layer} to python -m runtime.ask"
            )
        self.earlytom.check_layers(self.depth)
        _ = self.stages  # a frame budget that does not fit is refused
        for frames in self.counts[:-1]:
            self.at(frames)  # checks it as this did the most

    def _check_shapes(self) -> None:
        """What several videos, or several frame counts, do not go together with."""
        if self.adaptive and self.batch > 1:
            raise UserError(
                f"in the adaptive schedule each video decides how many frames it keeps, and --batch {self.batch} needs "
                "equal numbers: build with --schedule budget"
            )
        if self.adaptive and self.frame_counts is not None:
            raise UserError(
                f"an adaptive engine takes one frame count, got {_words(self.counts)}: build with --schedule budget, "
                "or give --frames one number"
            )
        if self.frame_counts is not None and isinstance(self.earlytom.frame_budget, tuple):
            raise UserError(
                f"the frame budget {_words(self.earlytom.frame_budget)} fits one frame count, got "
                f"{_words(self.counts)}: give --frame-budget a share such as 0.75, or --frames one number"
            )

        if self.chunk is not None:
            check_chunk(self.chunk, self.frames, self.earlytom.schedule)
            if self.batch > 1 or self.frame_counts is not None:
                what = f"--batch {self.batch}" if self.batch > 1 else f"--frames {_words(self.counts)}"
                raise UserError(
                    f"--chunk {self.chunk} is for one video of one frame count at a time, got {what}: leave out one of "
                    "the two"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """The frame counts of clips that the engine takes, ascending."""
        return self.frame_counts or (self.frames,)

    def at(self, frames: int) -> BuildConfig:
        """The build of one of the frame counts; its files have that in their names (`file`)."""
        return self if self.counts == (frames,) else replace(self, frames=frames, frame_counts=(frames,))

    @property
    def each(self) -> tuple[BuildConfig, ...]:
        """The build of every frame count."""
        return tuple(map(self.at, self.counts))

    def file(self, name: str) -> str:
        """The name that a file gets: `name`, with the frame count in it where there are several."""
        return name if self.frame_counts is None else count_file(name, self.frames)

    @property
    def layout(self) -> Layout:
        """What the engine is: its graphs, tensors and counts."""
        config, side = self.model, self.model.vision_config.image_size
        sizes = Sizes(self.tokens_per_frame, (side, side), config.text_config.hidden_size, self.depth)
        return Layout(self.earlytom, self.frames, self.batch, self.chunk, self.dtype, sizes, self.frame_counts)

    @property
    def model(self) -> Any:
        """The checkpoint's own configuration, its parts (vision_config, text_config) filled in."""
        return self.checkpoint.config

    @property
    def depth(self) -> int:
        """Encoder layers that run."""
        return feature_depth(self.model)

    @property
    def adaptive(self) -> bool:
        """Whether the video decides how many frames stay, so that the engine is a chain of stages."""
        return self.layout.adaptive

    @property
    def in_stages(self) -> bool:
        """Whether a clip runs through several graphs: a chain, or a graph for its chunks and one for the rest."""
        return self.layout.in_stages

    @property
    def stages(self) -> tuple[int, ...]:
        """Frames before the first merge and after each one; adaptive schedule: the most, which is all of them."""
        return self.layout.stages

    @property
    def tokens_per_frame(self) -> int:
        """P, tokens of a whole frame after pooling."""
        vision = self.model.vision_config
        return pooled_side(vision.image_size // vision.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """N, tokens that reach the LLM; adaptive schedule: the most that any video gives."""
        return self.layout.tokens

    def tokens_of(self, frames_left: int) -> int:
        """Tokens that reach the LLM of so many frames, none of them static."""
        return self.layout.tokens_of(frames_left)

    @property
    def flops(self) -> dict[str, int]:
        """`flops_of` what stays; adaptive schedule: of the most that can."""
        return self.flops_of(self.stages, self.tokens)

    def flops_of(self, stages: tuple[int, ...], tokens: int) -> dict[str, int]:
        """Exact counts, see `earlytom.flops`: vision (tower and projector) and prefill, full and compressed.

        Args:
            stages: frames before the first merge and after each one.
            tokens: that reach the LLM.
        """
        config, layers = self.model, self.earlytom.merge_layers
        vision, text = config.vision_config, config.text_config
        return {
            "vision_full": flops.vision_encoder(vision, (self.frames,), (), self.depth)
            + flops.projector(config, self.frames),
            "vision": flops.vision_encoder(vision, stages, layers, self.depth) + flops.projector(config, stages[-1]),
            "prefill_full": flops.prefill(text, self.frames * self.tokens_per_frame),
            "prefill": flops.prefill(text, tokens),
        }

    @property
    def expected_bytes(self) -> dict[str, int]:
        """Sizes that follow from the shapes: weights of the vision part, input and output of one call (B videos)."""
        config = self.model
        vision, width = config.vision_config, config.text_config.hidden_size
        size = DTYPES[self.dtype].itemsize
        hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
        layer = 4 * hidden * hidden + 2 * hidden * inner + 9 * hidden + inner  # products, biases, two layer norms
        grid = vision.image_size // patch
        embeddings = hidden * (3 * patch * patch + 1 + grid * grid)
        projector = width * (hidden + width + 2)
        wider = 0 if size == 4 else Costs(self).total(self.islands).weight_bytes
        return {
            "weights": size * (self.depth * layer + embeddings + projector) + wider,
            "input": self.batch * self.frames * 3 * vision.image_size**2,
            "output": self.batch * self.tokens * (width * size + 8),
        }

    @property
    def half_share(self) -> float:
        """Share of the flops of matrix products that a half graph with these islands has in half."""
        return Costs(self).half_share(self.islands)

    @property
    def stage_half_shares(self) -> tuple[float, ...]:
        """`half_share` of every stage, as its layer list has it: of one frame where they are dynamic."""
        if self.chunk is not None:
            return Costs(self).chunk_shares(self.islands)
        stages = (self.frames, *([1] * len(self.earlytom.merge_layers)))
        return Costs(self, stages).stage_shares(self.islands)

    def key_parts(self) -> dict[str, Any]:
        """Everything that changes the folder that is built, in plain JSON types; report.json keeps it."""
        return {
            "model": self.checkpoint.digest(),
            "earlytom": self.earlytom.to_dict(),
            "frames": self.frames,
            "dtype": self.dtype,
            "target": ".".join(map(str, self.target)),
            "backend": self.backend,
            "backend_version": self.backend_version,
            "hardware_compatible": self.hardware_compatible,
            "workspace_gib": self.workspace_gib,
            "compression": self.compression,
            "calibration": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.calibration],
            "code": _code_digest(),
            "libraries": {name: metadata.version(name) for name in EXPORTERS},
            "triton": triton_version() if self.compression == "plugin" else None,
            # Only where it is another than usual, so that what was built before there was a choice is still found.
            **({} if self.islands == DEFAULT else {"islands": list(self.islands.words)}),
            **({} if self.batch == 1 else {"batch": self.batch}),
            **({} if self.frame_counts is None else {"frame_counts": list(self.frame_counts)}),
            **({} if self.chunk is None else {"chunk": self.chunk}),
        }

    def key(self) -> str:
        """SHA-256 over `key_parts`."""
        return hashlib.sha256(json.dumps(self.key_parts(), sort_keys=True).encode()).hexdigest()

    def name(self, key: str) -> str:
        """Name of the engine folder."""
        major, minor = self.target
        ratio = f"{self.earlytom.retention_ratio:g}"
        words = [
            self.checkpoint.name,
            f"sm{major}{minor}",
            self.backend,
            self.dtype,
            f"r{ratio}",
            f"f{'+'.join(map(str, self.counts))}",
            *([f"b{self.batch}"] if self.batch > 1 else []),
            *([f"c{self.chunk}"] if self.chunk is not None else []),
            *(["adaptive"] if self.adaptive else []),
            key[:10],
        ]
        return "-".join(words)


def check_chunk(chunk: int, frames: int, schedule: str) -> None:
    """Raise UserError unless chunks of `chunk` frames fill a clip of `frames`, and the schedule can be cut."""
    if schedule != "budget":
        raise UserError(f"--chunk cuts an engine of static shapes in two: build with --schedule budget, not {schedule}")
    if chunk < 1 or frames % chunk:
        divisors = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise UserError(f"--chunk {chunk} does not divide the {frames} frames of a clip: give one of {divisors}")


def _words(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _code_digest() -> dict[str, str]:
    """SHA-256 of every source that decides what an engine contains; their tests and the bundled weights do not."""
    root = Path(__file__).resolve().parent.parent
    others = ("drift.py", "evaluate.py", "inspect.py")  # they look at engines, as builder/evaluation and inspection do
    paths = [path for path in (root / "builder").glob("*.py") if path.name not in others]
    paths += [
        path for folder in ("builder/plugins", "earlytom", "earlytom/kernels") for path in (root / folder).glob("*.py")
    ]
    runtime = ("checkpoint", "checkpoint_files", "engine/dtypes", "engine/layout", "trt")
    paths += [root / "runtime" / f"{name}.py" for name in runtime]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
