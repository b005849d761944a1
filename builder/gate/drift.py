"""Where a graph drifts from the model: a table of every tap, for `python -m builder.verify ENGINE --layers`.

A tap is a value inside the graph: the hidden states after every encoder layer (at a merge layer before the merge), the
projector's output, pooled features, relevance (pooled received attention) and the tokens. The graph runs as in the
gate, in half precision with every result rounded; the reference runs in fp32 with the graph's decisions forced on it,
so that both have the same frames and tokens. For each tap:

    cosine         of all its values with the reference's. Large values dominate it: in a tower with outlier channels it
                   stays near 1 whatever happens to the other channels.
    channel error  root mean square error over standard deviation, of the median channel, which outliers do not hide.
    max error      the largest difference.
    ranges         smallest and largest value of the reference and of the graph.
    share          the graph's largest magnitude over the largest number of its dtype; near 1 it is about to overflow.

The engine folder's graph is not changed; a copy with more outputs lies beside it during the run. All taps are held in
memory, twice in fp32: 6 GB for 32 frames of the largest published tower, and B times that for B videos at once.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.exception import PolygraphyException
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER
from torch import Tensor

from builder.export.vision import VisionGraph, vision_graph
from builder.gate.batches import fill
from builder.gate.limits import GATES
from builder.gate.rules import rule_of
from builder.gate.runs import Arrays, run_tapped
from builder.precision import products
from builder.settings.config import BuildConfig
from builder.settings.options import parse_target
from earlytom.errors import UserError
from earlytom.numbers import shown
from runtime.checkpoint import describe
from runtime.drawing.clips import draw_clip
from runtime.engine import layout
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import REBUILD, Manifest
from runtime.engine.origin import source_of
from runtime.engine.records import cut
from runtime.errors import EngineError
from runtime.files.plain import MIB, open_plain
from runtime.trace import Trace
from runtime.video import load_clip

Range = tuple[float, float]


@dataclass(frozen=True)
class Tap:
    """One row of the table; see the top of the module.

    Attributes:
        nonfinite: number of infinite or NaN values of the graph. If there are any, the cosine and the errors are NaN,
            and `graph` is the range of the finite values.
    """

    name: str
    cosine: float
    channel_error: float
    max_error: float
    reference: Range
    graph: Range
    share: float
    nonfinite: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes null."""
        numbers = {"cosine": self.cosine, "channel_error": self.channel_error, "max_error": self.max_error}
        return {
            "tap": self.name,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "reference": list(self.reference),
            "graph": list(self.graph),
            "share": self.share,
            "nonfinite": self.nonfinite,
        }


def measure(
    onnx_path: Path | Sequence[Path], reference: VisionGraph, frames: Tensor, dtype: str, *, rounded: bool = True
) -> list[Tap]:
    """Run graph and reference on one clip, or on one batch of clips.

    Args:
        onnx_path: an exported graph, or those of a chain.
        reference: the same vision part in fp32.
        frames: uint8 [F, 3, H, W], or [B, F, 3, H, W] for B videos.
        dtype: of the graph.
        rounded: round every result of a half graph; else it runs as ONNX Runtime would, see
            `builder.precision.rounding`.
    """
    rule, kept = rule_of(reference.config), (reference.decisions, reference.every_layer)
    reference.every_layer = True
    try:
        clips = frames if frames.dim() == 5 else frames[None]
        names, feeds = reference.trace_names, [{layout.FRAMES: clip.numpy()} for clip in clips]
        half = rounded and dtype != "fp32"
        ((_, iterations),) = run_tapped(onnx_path, names, feeds, rounded=half, batch=len(clips))
        each: list[Arrays] = [{name: np.asarray(one[name]) for name in names} for one in iterations]
        found: list[dict[str, Tensor]] = []
        for clip, one in zip(clips, each, strict=True):
            # Decisions taken from NaN cannot be forced: the reference takes its own.
            sane = all(np.isfinite(one[f"weights_{layer}"]).all() for layer in rule.layers)
            reference.decisions = rule.forced(one) if sane else rule.own()
            found.append(reference(clip))
        got = {name: np.concatenate([one[name] for one in each]) for name in _taps(names)}
        wanted = {name: torch.cat([one[name] for one in found]) for name in _taps(names)}
    finally:
        reference.decisions, reference.every_layer = kept
    limit = torch.finfo(DTYPES[dtype]).max
    for name in wanted:
        if not wanted[name].isfinite().all():
            raise UserError(f"{name} of the fp32 reference is not finite: the checkpoint's weights are unusable")
    return [_compare(name, got[name], wanted[name].numpy(), limit) for name in wanted]


def _taps(names: Iterable[str]) -> list[str]:
    wanted = ("projected", "features", "relevance", "tokens")
    return [name for name in names if name.startswith("hidden_") or name in wanted]


def _compare(name: str, got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], limit: float) -> Tap:
    finite = np.isfinite(got)
    nonfinite = int(finite.size - finite.sum())
    cosine = channel_error = max_error = math.nan
    if not nonfinite:
        # In fp64: the squares of large fp32 values overflow fp32.
        a, b = (x.astype(np.float64).reshape(-1, 1 if name == "relevance" else x.shape[-1]) for x in (got, wanted))
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = float(np.vdot(a, b)) / norms if norms else float(np.array_equal(a, b))
        error = np.abs(a - b)
        max_error = float(error.max())
        spread = b.std(axis=0)
        moved = np.sqrt((error**2).mean(axis=0))[spread > 0] / spread[spread > 0]
        channel_error = float(np.median(moved)) if moved.size else math.nan
    held = got[finite]
    graph = (float(held.min()), float(held.max())) if held.size else (0.0, 0.0)
    share = max(map(abs, graph)) / limit
    return Tap(
        name, cosine, channel_error, max_error, (float(wanted.min()), float(wanted.max())), graph, share, nonfinite
    )


def first_bad(taps: Iterable[Tap], precision: str) -> Tap | None:
    """The first tap, in the order of computation, that is not finite, below the gate's cosine c, or whose channel error
    is above sqrt(2 (1 - c)): an independent error of e standard deviations gives a cosine of about 1 - e**2 / 2."""
    least, most = _limits(precision)
    return next((t for t in taps if t.nonfinite or not t.cosine >= least or t.channel_error > most), None)


def _limits(precision: str) -> tuple[float, float]:
    least = GATES[precision].cosine
    return least, math.sqrt(2 * (1 - least))


def report(
    engine: Path, trace: Trace, *, frames: int | None = None, video: Path | None = None, model: str | None = None
) -> dict[str, Any]:
    """Show the table of an engine folder; returns the record of the JSON line.

    Args:
        frames: which of its frame counts; default: the largest.
        video: the clip; default: the one that the engine was verified on, else a drawn one.
        model: where the checkpoint is; default: the recorded source.
    """
    manifest = Manifest.read(engine)
    manifest = manifest.at(manifest.frames if frames is None else frames)
    shown_frames, clip = frames_for(engine, manifest, video)
    reference = load_reference(manifest, model)
    trace.line(f"{manifest.name} against the PyTorch reference in fp32, on {clip}")
    paths = [engine / name for name in manifest.stage_files(layout.ONNX_FILE)]
    taps = measure(paths if manifest.in_stages else paths[0], reference, shown_frames, manifest.dtype)
    show(trace, taps, manifest.dtype, manifest.precision)
    bad = first_bad(taps, manifest.precision)
    record = {
        "engine": str(engine),
        "dtype": manifest.dtype,
        "precision": manifest.precision,
        "clip": clip,
        "frames": manifest.frames,
        "gate_cosine": GATES[manifest.precision].cosine,
    }
    return record | {"taps": [tap.to_dict() for tap in taps], "first_bad": bad and bad.name}


def load_reference(manifest: Manifest, source: str | None = None) -> VisionGraph:
    """The vision tower that an engine was built from, in fp32; `source` is where the checkpoint is, if it has moved."""
    checkpoint = describe(source_of(manifest, source))
    if checkpoint.family.any_size:
        checkpoint = checkpoint.sized(manifest.model.preprocessing.size)
    if checkpoint.digest() != manifest.model.digest:
        raise UserError(
            f"{checkpoint.source} is not the checkpoint that {manifest.name} was built from (its digest differs): "
            "name that one with --model, or build again"
        )
    config = BuildConfig(
        checkpoint=checkpoint,
        earlytom=manifest.settings,
        frames=manifest.frames,
        dtype=manifest.dtype,
        target=parse_target(manifest.target),
        backend=manifest.backend,
        backend_version=manifest.backend_version,
    )
    return vision_graph(config, torch.float32)


def frames_for(engine: Path, manifest: Manifest, video: Path | None = None) -> tuple[Tensor, str]:
    """Input frames for an engine, of `video` or of the clip it was verified on, and a description of them.

    uint8 [F, 3, H, W]; for B videos [B, F, 3, H, W], all but the first being its variants
    (`builder.gate.batches.fill`).
    """
    size, sampling = manifest.model.preprocessing.size, manifest.model.preprocessing.sampling
    saved = engine / manifest.file(layout.REFERENCE_INPUTS_FILE)
    if video is not None or not saved.is_file():  # not there: built with --no-verify
        with tempfile.TemporaryDirectory() as folder:
            path = video or draw_clip(Path(folder) / "drawn.mp4")
            frames = load_clip(path, manifest.frames, size, sampling=sampling).frames
        name = "a drawn clip" if video is None else str(video)
        if manifest.batch == 1:
            return frames, name
        clips = fill({name: frames}, manifest.batch)
        return torch.stack(list(clips.values())), "; ".join(clips)
    videos = (manifest.batch,) if manifest.batch > 1 else ()
    frames = _saved_frames(saved, (*videos, manifest.frames, 3, *size))
    return frames, "the frames that it was verified on"


def _saved_frames(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The frames saved by `kept_reference.save_reference`."""
    most = 2 * math.prod(shape) + MIB  # base64 has four characters for three bytes
    with open_plain(path, REBUILD) as file:
        size = os.fstat(file.fileno()).st_size
    try:
        if size > most:
            raise ValueError(f"{size} bytes")
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            (inputs,) = load_json(str(path))
        frames = inputs[layout.FRAMES]
        if (frames.dtype, frames.shape) != (np.uint8, shape):
            raise ValueError(f"{frames.dtype} {shown(frames.shape)}")
    except (AttributeError, LookupError, PolygraphyException, RecursionError, TypeError, ValueError) as error:
        raise EngineError(f"{path} holds no frames uint8 {list(shape)} ({cut(error)}): {REBUILD}") from error
    return torch.from_numpy(frames)


def show(trace: Trace, taps: list[Tap], dtype: str, precision: str | None = None) -> None:
    """Show the table, and a hint at what to keep wider; `precision` as in `builder.gate.accuracy.verify`."""
    rows = []
    for tap in taps:
        values = (f"{tap.cosine:.6f}", f"{tap.channel_error:.3%}", f"{tap.max_error:.3g}")
        ranges = (f"{low:.4g} .. {high:.4g}" for low, high in (tap.reference, tap.graph))
        rows.append((tap.name, *(values if not tap.nonfinite else ("-", "-", "-")), *ranges, _share(tap)))
    trace.table(("tap", "cosine", "channel error", "max error", "reference", "graph", f"of {dtype}'s largest"), rows)
    bad, (least, most) = first_bad(taps, precision or dtype), _limits(precision or dtype)
    if bad is None:
        trace.line(f"at every tap the cosine is at least {least:g}, and the median channel's error at most {most:.1%}")
        return
    what = f"cosine {bad.cosine:.6f} (at least {least:g}), channel error {bad.channel_error:.1%} (at most {most:.1%})"
    trace.line(f"{bad.name} is the first tap off: {f'{bad.nonfinite} values not finite' if bad.nonfinite else what}")
    if precision == "int8":
        trace.line(f"keep more out of int8 there: add to {products.OPTION}, of {_products(bad.name)}")
    if dtype != "fp32":
        trace.line(f"keep more in fp32 there: add to --islands, of {_near(bad.name)} (--islands list shows the cost)")


def _products(tap: str) -> str:
    """The products nearest before a tap."""
    layer = tap.removeprefix("hidden_")
    return ", ".join(f"{name}:{layer}" if layer.isdigit() else name for name in products.nearest(layer.isdigit()))


def _near(tap: str) -> str:
    """The islands nearest before a tap."""
    layer = tap.removeprefix("hidden_")
    if not layer.isdigit():
        return "projector, residual"
    return f"residual, mlp:{layer}, attention:{layer}" + (", embeddings" if layer == "0" else "")


def _share(tap: Tap) -> str:
    return f"{tap.nonfinite} not finite" if tap.nonfinite else f"{tap.share:.2%}"
