"""Parts that build engines and compare them with the PyTorch reference in fp32.

An engine must meet the gate's limits for its dtype: the share of the reference's tokens that it keeps, and the cosine
of the tokens kept by both. It gets frames on the host and, on a GPU, on the device from another stream; clips
alternate, so that a CUDA graph with a stale input shows. With chunks it also gets frames one by one.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.build import build_engine
from builder.doctor.isolated import NotPossible, Wrong
from builder.gate.limits import GATES
from builder.settings.arguments import parse
from runtime.checkpoint import describe
from runtime.drawing.clips import write_test_clip
from runtime.engine.manifest import Manifest
from runtime.measure.clock import timed
from runtime.video import load_clip
from runtime.vision import VisionBackend, encode_one, open_backend
from runtime.vision.chunked import ChunkedVision
from runtime.vision.live import LiveClip
from runtime.vision.protocol import BatchedVision, Encoded
from runtime.vision.tensorrt import TensorRTRunner
from runtime.vision.torch import open_torch
from runtime.vision.whole import Whole

CLIPS = (3, 5)  # of the bundled model's test set
_REPEATS = 20  # timed calls


def build(words: Sequence[str], out: str, *, verify: bool = False) -> dict[str, Any]:
    """Build an engine as `python -m builder.build` does with `words`; returns its folder and figures."""
    _, config, _ = parse([*words, "--out", out])
    folder = build_engine(config, Path(out), verify=verify)
    manifest = Manifest.read(folder)
    figures: dict[str, Any] = {"folder": str(folder), "backend": f"{manifest.backend} {manifest.backend_version}"}
    figures |= {name: round(value, 2) for name, value in manifest.figures.items() if name.endswith("_seconds")}
    figures["bytes"] = sum(file.bytes for file in manifest.files.values())
    if manifest.plugins:
        figures["plugins"] = len(manifest.plugins)
    return figures


def run(folder: str, backend: str) -> dict[str, Any]:
    """Run an engine folder in a backend, compare it with the reference, and time it."""
    manifest = Manifest.read(folder)
    clips = [_clip(Path(folder).parent, index, manifest) for index in CLIPS]
    figures: dict[str, Any] = {}
    for count in manifest.counts:
        one = manifest.at(count)
        reference = open_torch(describe(None), one, device=torch.device("cpu"), dtype=torch.float32)
        vision = open_backend(backend, folder, manifest, frames=[count])
        try:
            shown = [clip[:: len(clip) // count][:count] for clip in clips]
            found = _compare(vision, reference, shown, one.dtype) | _elsewhere(vision, shown)
            if isinstance(vision, ChunkedVision):
                _as_they_come(vision, shown[0])
            found["encode_ms"] = round(1000 * _median(vision, shown[0]), 3)
            found |= _captured(vision)
        finally:
            vision.close()
            reference.close()
        figures |= found if len(manifest.counts) == 1 else {f"{name} ({count} frames)": v for name, v in found.items()}
    return figures


def _clip(place: Path, index: int, manifest: Manifest) -> Tensor:
    """Frames uint8 [F, 3, H, W] of a test clip, at the engine's largest frame count."""
    path = place / f"clip-{index}.mp4"
    if not path.is_file():
        write_test_clip(path, index)
    prepared = manifest.model.preprocessing
    return load_clip(path, manifest.frames, prepared.size, sampling=prepared.sampling).frames


def _compare(vision: VisionBackend, reference: VisionBackend, clips: Sequence[Tensor], dtype: str) -> dict[str, Any]:
    """The least share of tokens kept by both, and the least cosine of these, over the clips."""
    gate, shares, cosines, answers = GATES[dtype], [], [], []
    for clip in clips:
        wanted, got = _copied(encode_one(reference, clip)), _copied(encode_one(vision, clip))
        answers.append(got)
        share, cosine = agreement(got, wanted)
        shares.append(share)
        cosines.append(cosine)
    least, nearest = min(shares), min(cosines)
    if not (least >= gate.tokens and nearest >= gate.cosine):
        raise Wrong(
            f"{least:.1%} of the tokens are those of the reference (at least {gate.tokens:.0%}), their cosine is "
            f"{nearest:.6f} (at least {gate.cosine})"
        )
    if vision.batch > 1:
        several: BatchedVision = vision  # type: ignore[assignment]
        together = [_copied(one) for one in several.encode_several(list(clips))]
        if not all(agreement(a, b)[0] >= gate.tokens for a, b in zip(together, answers, strict=True)):
            raise Wrong("of two videos at once each has other tokens than alone")
    if torch.equal(answers[0].place, answers[1].place) and torch.equal(answers[0].tokens, answers[1].tokens):
        raise Wrong("two clips have the same tokens: the engine does not follow its input")
    return {"tokens_equal": round(least, 4), "cosine": round(nearest, 6)}


def agreement(got: Encoded, wanted: Encoded) -> tuple[float, float]:
    """The share of `wanted`'s places that `got` has, too, and the cosine of the tokens at these places (-1 if none)."""
    ours, theirs = torch.isin(got.place, wanted.place), torch.isin(wanted.place, got.place)
    share = float(ours.sum()) / max(len(wanted.place), 1)
    a, b = (_by_place(one, mask) for one, mask in ((got, ours), (wanted, theirs)))
    if a.shape != b.shape or not len(a):
        return share, -1.0
    cosine = float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return share, cosine if cosine == cosine else -1.0


def _by_place(one: Encoded, mask: Tensor) -> Tensor:
    return one.tokens.float()[mask][one.place[mask].argsort()]


def _copied(encoded: Encoded) -> Encoded:
    """A copy on the host that the backend does not overwrite."""
    return Encoded(*(value.detach().to("cpu", copy=True) for value in encoded))


def _elsewhere(vision: VisionBackend, clips: Sequence[Tensor]) -> dict[str, Any]:
    """On a GPU: frames on the device, from another stream, give bit-identical results."""
    if vision.device.type != "cuda":
        return {}
    for clip in (*clips, *clips):
        here = _copied(encode_one(vision, clip))
        with torch.cuda.stream(torch.cuda.Stream()):
            there = _copied(encode_one(vision, clip.to(vision.device, non_blocking=True)))
        if not all(torch.equal(a, b) for a, b in zip(here, there, strict=True)):
            raise Wrong("frames on the GPU, on a stream of their own, give other tokens than frames of the host")
    return {"streams": "equal"}


def _as_they_come(vision: ChunkedVision, clip: Tensor) -> None:
    """Frames one by one give results bit-identical to the whole clip's."""
    wanted = _copied(vision.encode(clip))
    for total in (len(clip), None):
        with LiveClip(vision, total=total, limit=len(clip)) as live:
            for frame in clip:
                live.push(frame)
            got = _copied(live.finish()[0])
        if not (torch.equal(got.tokens, wanted.tokens) and torch.equal(got.positions, wanted.positions)):
            raise Wrong("frames as they come give other tokens than the whole clip")


def _median(vision: VisionBackend, clip: Tensor) -> float:
    """Median seconds of a call, frames on the host."""
    call: Callable[[], Any] = lambda: encode_one(vision, clip)  # noqa: E731
    return statistics.median(timed(vision.device, call)[1] for _ in range(_REPEATS))


def _captured(vision: VisionBackend) -> dict[str, Any]:
    """Whether the engine runs as a CUDA graph, or why not; nothing for other backends."""
    if not (isinstance(vision, Whole) and isinstance(vision.runner, TensorRTRunner)):
        return {}
    return {"cuda_graph": vision.runner.unreplayed or "replayed"}


def polygraphy(folder: str) -> dict[str, Any]:
    """The comparison by the Polygraphy command in the manifest."""
    manifest = Manifest.read(folder)
    if not manifest.polygraphy:
        raise NotPossible(f"Polygraphy cannot run engine {manifest.name}")
    _, *words = shlex.split(manifest.polygraphy)
    start = "import sys; from polygraphy.tools import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Wrong(f"polygraphy ended with status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    return {"exit_status": 0}
