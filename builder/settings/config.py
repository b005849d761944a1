"""A build's configuration, checked before any work starts, and its cache key.

A `BuildConfig` is frozen and made once, by the command line or a caller, for one checkpoint. Builds with equal keys
produce the same folder, so the key covers all that changes it: the checkpoint, the method's settings, precision,
target, backend and its version, calibration clips, code and libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.plugins import triton_version
from builder.precision import products
from builder.precision.islands import DEFAULT, Costs, Islands
from builder.precision.products import Product
from builder.settings.key import code_digest
from builder.settings.options import (
    WORKSPACE_GIB,
    check_batch,
    check_clips,
    check_counts,
    check_one_video,
    check_rounds,
    check_shapes,
)
from earlytom import flops
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, Geometry, family_of
from earlytom.methods import METHODS, method_of
from earlytom.settings import MethodSettings
from earlytom.spans import check_watched
from runtime.checkpoint import Checkpoint
from runtime.engine.dtypes import DTYPES
from runtime.engine.layout import Layout, Sizes, count_file

DISTRIBUTION = "earlytom-engine-builder"
# Libraries whose version may change the exported graph.
EXPORTERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def project_version() -> str:
    """Version of the installed project."""
    return metadata.version(DISTRIBUTION)


@dataclass(frozen=True)
class BuildConfig:
    """One build.

    Attributes:
        checkpoint: the model, described but not loaded.
        earlytom: the settings of the method, whichever it is.
        frames: F, frames of a clip; of several frame counts the largest.
        dtype: "fp16", "bf16" or "fp32".
        target: compute capability, (major, minor).
        backend: "onnx", "tensorrt" or "tensorrt-rtx", already resolved.
        backend_version: version of the library that compiles.
        hardware_compatible, workspace_gib: see `builder.compile.engine.compile_engine`.
        compression: "plugin" or "native", already resolved.
        calibration: video files for the gate; none: the drawn clip. With int8 the scales come from some and the gate
            runs on the others.
        islands: the fp32 islands of a half-precision graph.
        int8: products kept wider than int8, as in `--int8-keep`: ("auto",) to choose by clips, () for none; None
            without int8.
        batch: B, videos at once; counts and flops are those of one.
        frame_counts: the frame counts, ascending, if there are several; each gets its own graph and engine. `at`
            returns the build of one of them; the properties below are about `frames`.
        chunk: C, frames of a chunk, or None for whole clips.
    """

    checkpoint: Checkpoint
    earlytom: MethodSettings
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
    int8: tuple[str, ...] | None = None
    batch: int = 1
    frame_counts: tuple[int, ...] | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_counts((*self.counts, self.frames))
        if list(self.counts) != sorted(set(self.counts)) or self.frames != self.counts[-1]:
            raise UserError(f"frame counts must be ascending, the last being {self.frames}, got {self.counts}")
        check_batch(self.batch)
        method = self.earlytom
        check_shapes(
            method.schedule,
            method.frame_budget,
            self.frames,
            self.frame_counts,
            batch=self.batch,
            chunk=self.chunk,
        )
        check_one_video(method.method, batch=self.batch, chunk=self.chunk)
        if isinstance(method, CellsConfig):
            check_rounds(method.schedule, method.rounds, self.backend)
        if self.int8 is not None and family_of(self.model) is not DEFAULT_FAMILY:
            title = family_of(self.model).title
            raise UserError(f"--int8 knows the products of {DEFAULT_FAMILY.title}, not of {title}: leave it out")
        check_clips(self.int8 is not None, len(self.calibration))
        if self.adaptive and self.compression == "plugin":
            raise UserError("the plugins have static shapes: build --schedule adaptive with --compression native")
        if self.earlytom.merges_inside:
            raise UserError(
                "an engine holds the vision part, so inner merging is not part of a build: give "
                f"--inner-layer {self.earlytom.inner_layer} to python -m runtime.ask"
            )
        self.earlytom.check_layers(self.depth)
        self._check_family()
        _ = self.stages  # checks the frame budget
        for frames in self.counts[:-1]:
            self.at(frames)  # runs these checks

    def _check_family(self) -> None:
        """Raise UserError for settings that engines of this family do not support."""
        frame, title = self.geometry, family_of(self.model).title
        if any(count % frame.step for count in self.counts):
            raise UserError(
                f"{title} takes {frame.step} pictures for a frame: --frames must be a multiple, got "
                f"{','.join(map(str, self.counts))}"
            )
        if (frame.step > 1 or frame.streams) and (self.adaptive or self.chunk is not None):
            what = "--schedule adaptive" if self.adaptive else "--chunk"
            raise UserError(f"{what} does not know {title}'s frames: build with --schedule budget and without --chunk")
        if (frame.step > 1 or frame.streams) and not METHODS[self.earlytom.method].streams:
            raise UserError(f"method {self.earlytom.method!r} does not know {title}'s tokens: use earlytom or cells")
        check_watched(method_of(self.earlytom).watched(self.depth), frame.full)

    @property
    def counts(self) -> tuple[int, ...]:
        """The frame counts of clips that the engine takes, ascending."""
        return self.frame_counts or (self.frames,)

    def at(self, frames: int) -> BuildConfig:
        """The build of one of the frame counts; its file names have the count (`file`)."""
        return self if self.counts == (frames,) else replace(self, frames=frames, frame_counts=(frames,))

    @property
    def each(self) -> tuple[BuildConfig, ...]:
        """The build of every frame count."""
        return tuple(map(self.at, self.counts))

    def file(self, name: str) -> str:
        """A file's name: `name`, with the frame count if there are several."""
        return name if self.frame_counts is None else count_file(name, self.frames)

    @property
    def layout(self) -> Layout:
        """The engine's graphs, tensors and counts."""
        frame = self.geometry
        sizes = Sizes(frame.tokens_per_frame, frame.size, frame.token_width, frame.depth, frame.step)
        return Layout(self.earlytom, self.frames, self.batch, self.chunk, self.dtype, sizes, self.frame_counts)

    @property
    def model(self) -> Any:
        """The checkpoint's transformers configuration, with vision_config and text_config."""
        return self.checkpoint.config

    @property
    def geometry(self) -> Geometry:
        """The geometry of the family's frames."""
        return family_of(self.model).geometry(self.model)

    @property
    def depth(self) -> int:
        """Number of encoder layers that run."""
        return self.geometry.depth

    @property
    def adaptive(self) -> bool:
        """Whether frame counts depend on the video, so that the engine is a chain of stages."""
        return self.layout.adaptive

    @property
    def in_stages(self) -> bool:
        """Whether a clip runs through several graphs: a chain, or head and rest of a chunked engine."""
        return self.layout.in_stages

    @property
    def stages(self) -> tuple[int, ...]:
        """Frames before the first merge and after each one; adaptive schedule: the maxima, which are all frames."""
        return self.layout.stages

    @property
    def tokens_per_frame(self) -> int:
        """P, tokens of a whole frame after pooling."""
        return self.geometry.tokens_per_frame

    @property
    def tokens(self) -> int:
        """N, tokens that reach the LLM; adaptive schedule: the maximum."""
        return self.layout.tokens

    def tokens_of(self, frames_left: int) -> int:
        """Tokens that reach the LLM of `frames_left` dynamic frames."""
        return self.layout.tokens_of(frames_left)

    @property
    def flops(self) -> dict[str, int]:
        """`flops_of` the kept frames and tokens; adaptive schedule: of the maxima."""
        return self.flops_of(self.stages, self.tokens)

    def flops_of(self, stages: tuple[int, ...], tokens: int) -> dict[str, int]:
        """Flops of vision (tower and projector) and prefill, full and compressed, see `earlytom.flops`.

        Args:
            stages: frames before the first merge and after each one.
            tokens: that reach the LLM.
        """
        config, family = self.model, family_of(self.model)
        text = config.text_config
        return {
            "vision_full": family.vision_flops(config, (self.layout.steps,), ()),
            "vision": family.vision_flops(config, stages, self.earlytom.merge_layers),
            "prefill_full": flops.prefill(text, self.layout.tokens_full),
            "prefill": flops.prefill(text, tokens),
        }

    @property
    def expected_bytes(self) -> dict[str, int]:
        """Bytes, from shapes: weights of the vision part, input and output of one call (B videos)."""
        size, (height, width) = self.itemsize, self.geometry.size
        wider = 0 if size == 4 else Costs(self).total(self.islands).weight_bytes
        if self.int8 is not None:  # with "auto" as if all products were int8
            wider -= (size - 1) * sum(products.elements_of(Costs(self), product) for product in self.narrow())
        return {
            "weights": size * family_of(self.model).vision_weights(self.model) + wider,
            "input": self.batch * self.frames * 3 * height * width,
            "output": self.batch * self.tokens * (self.geometry.token_width * size + 8),
        }

    @property
    def half_share(self) -> float:
        """Share of matrix product flops in half precision, for a half graph with these islands."""
        return Costs(self).half_share(self.islands)

    @property
    def stage_half_shares(self) -> tuple[float, ...]:
        """`half_share` of every stage; a dynamic number of frames counts as one, as in layer lists."""
        if self.chunk is not None:
            return Costs(self).chunk_shares(self.islands)
        stages = (self.layout.steps, *([1] * len(self.earlytom.merge_layers)))
        return Costs(self, stages).stage_shares(self.islands)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the graph's dtype."""
        return DTYPES[self.dtype].itemsize

    @property
    def precision(self) -> str:
        """The key of the gate's limits: "int8" or the dtype."""
        return self.dtype if self.int8 is None else "int8"

    @property
    def may_be_int8(self) -> tuple[Product, ...]:
        """The products that can be int8, in execution order."""
        return products.every(self.depth, DEFAULT if self.dtype == "fp32" else self.islands)

    def narrow(self, kept: Collection[Product] | None = None) -> tuple[Product, ...]:
        """The products that are int8; `kept`: those kept wider, as chosen by clips for "auto"."""
        if self.int8 is None:
            return ()
        if kept is None:
            kept = (
                ()
                if self.int8 == (products.AUTO,)
                else products.parse(",".join(self.int8) or products.NONE, self.depth)
            )
        return tuple(product for product in self.may_be_int8 if product not in kept)

    def int8_share(self, kept: Collection[Product] | None = None) -> float:
        """Share of matrix product flops in int8; `kept` as in `narrow`."""
        return products.share(Costs(self), self.narrow(kept))

    def stage_int8_shares(self, kept: Collection[Product] | None = None) -> tuple[float, ...]:
        """`int8_share` of every stage, counted as `stage_half_shares` is."""
        ends = self.earlytom.merge_layers
        if self.chunk is not None:
            costs = Costs(self)
            found, ends = costs.chunk_products(self.islands), ends[:1] or (self.depth - 1,)
        else:
            costs = Costs(self, (self.frames, *([1] * len(ends))))
            found = costs.stage_products(self.islands)
        return products.part_shares(costs, self.narrow(kept), [whole for whole, _ in found], ends)

    def key_parts(self) -> dict[str, Any]:
        """All that changes the built folder, in plain JSON types; stored in report.json."""
        return {
            "model": self.checkpoint.digest(),
            "answers": self.checkpoint.answers_digest(),
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
            "code": code_digest(),
            "libraries": {name: metadata.version(name) for name in EXPORTERS},
            "triton": triton_version() if self.compression == "plugin" else None,
            # Only if not the default, so that engines built before the option existed are still found.
            **({} if self.earlytom.method == EarlyTomConfig.method else {"method": self.earlytom.method}),
            **({} if self.islands == DEFAULT else {"islands": list(self.islands.words)}),
            **({} if self.int8 is None else {"int8_keep": list(self.int8)}),
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
            *([] if self.int8 is None else ["int8"]),
            *([] if self.earlytom.method == EarlyTomConfig.method else [self.earlytom.method]),
            f"r{ratio}",
            f"f{'+'.join(map(str, self.counts))}",
            *([f"b{self.batch}"] if self.batch > 1 else []),
            *([f"c{self.chunk}"] if self.chunk is not None else []),
            *(["adaptive"] if self.adaptive else []),
            key[:10],
        ]
        return "-".join(words)
