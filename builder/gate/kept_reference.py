"""The reference of a verified engine: saved in its folder, and copied out for regression tests in CI.

`save_reference` writes the inputs and outputs that the gate (`builder.gate`) measured against, `polygraphy_command`
makes the command that compares a graph with them, `keep_reference` copies them out of an engine folder together with
that command as a script. This module runs neither the graph nor the model.

**Polygraphy in CI.** Inputs and reference outputs of step 3 (first clip) are saved in Polygraphy's format, and the
manifest holds the `polygraphy run` line that repeats the step. The gate of a build compares the graph and the
reference of the same sources, so it cannot see that both changed; a reference that was kept can. Keep that of an
engine you accept under version control, and let CI build and hold what it built against it:

    python -m builder.verify engines/NAME --polygraphy reference

    python -m builder.build --ratio 0.3 --fp16 --out built
    sh reference/compare.sh built/*/vision.onnx

`compare.sh` is that line. It exits with 1 on a regression (the build, where its gate fails, with 2). It compares what
the gate justifies: tokens, element by element, with the reference under the graph's decisions, within the gate's
`error` (absolute: a relative one says nothing near zero), and positions exactly, since a graph repeats its decisions.
End to end nothing could be asked of single elements: one choice that half precision takes otherwise, which step 2
allows, moves every row after it. In the bundled model any weight matrix that is off by a tenth is noticed; a bias whose
effect stays within `error` is not. The price: where an update of ONNX Runtime or another CPU moves a near-tie,
positions differ although the build's gate passes; then read its step 2 and keep the new reference.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER
from torch import Tensor

from builder.gate import COMPARE_FILE
from builder.gate.limits import SOURCES_TOLERANCE
from earlytom.errors import UserError
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.files.partial import partial

_SCRIPT = """\
#!/bin/sh
# Compares a graph with the reference of {manifest.name}, built {manifest.created}.
[ $# -eq 1 ] && [ -f "$1" ] || {{ echo "usage: sh $0 VISION.ONNX (one file, got: $*)" >&2; exit 2; }}
exec {line}
"""


def save_reference(inputs: Path, outputs: Path, clips: Sequence[Tensor], wanted: RunResults, batch: int = 1) -> None:
    """Write what the graph takes and the reference's outputs, of the first `batch` clips, in Polygraphy's format.

    Args:
        inputs, outputs: the files to write.
        clips: uint8 frames [F, 3, H, W] of each clip.
        wanted: the reference's outputs for each.
    """
    name, iterations = wanted[0]
    frames = torch.stack(list(clips[:batch])).numpy()
    values = {key: np.stack([np.asarray(one[key]) for one in iterations[:batch]]) for key in layout.OUTPUTS}
    if batch == 1:  # graphs of one video know no batch
        frames, values = frames[0], {key: value[0] for key, value in values.items()}
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([{layout.FRAMES: frames}], str(inputs))
        RunResults([(name, [IterationResult(values, runner_name=name)])]).save(str(outputs))


def polygraphy_command(tolerance: float, bias: float, file: Callable[[str], str] = str) -> str:
    """The command that repeats the gate's step 3 in the engine's folder.

    Args:
        tolerance: largest absolute error of a token's element.
        bias: mean error of the tokens' bias.
        file: maps a file name to that of the frame count.
    """
    words = ["polygraphy", "run", file(layout.ONNX_FILE), "--onnxrt"]
    words += ["--onnx-outputs", *layout.OUTPUTS]  # or an output that the graph lost would silently not be compared
    saved = (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE)
    words += ["--load-inputs", file(saved[0]), "--load-outputs", file(saved[1])]
    words += ["--check-error-stat", "max", f"{layout.BIAS}:mean"]
    limits = {layout.TOKENS: tolerance, layout.POSITIONS: 0.0, layout.PLACE: 0.0, layout.BIAS: bias}
    limits[layout.SOURCES] = SOURCES_TOLERANCE
    words += ["--atol", *(f"{name}:{limit:.6g}" for name, limit in limits.items())]
    words += ["--rtol", "0", "--validate"]
    return shlex.join(words)


def keep_reference(engine: Path, place: Path, frames: int | None = None) -> Path:
    """Copy an engine's reference to `place`, with a script that compares any graph with it; returns the script.

    `frames` chooses one of several frame counts; default: the largest.
    """
    manifest = Manifest.read(engine)
    manifest = manifest.at(manifest.frames if frames is None else frames)
    if manifest.verification is None:
        raise UserError(f"{engine} was not verified, so it has no reference: build it without --no-verify")
    if manifest.in_stages:
        remedy = "without --chunk" if manifest.chunk else "with --schedule budget"
        raise UserError(f"{engine} is a chain of graphs, and Polygraphy runs one: build {remedy}")
    if not manifest.polygraphy:
        raise UserError(f"{engine} is in {manifest.dtype}, which ONNX Runtime cannot run on a CPU: build with --fp16")
    if place.resolve() == engine.resolve():
        raise UserError(f"{place} is the engine itself: name another folder with --polygraphy")
    place.mkdir(parents=True, exist_ok=True)
    line = manifest.polygraphy.replace(manifest.file(layout.ONNX_FILE), '"$1"')
    for name in map(manifest.file, (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE)):
        with partial(place / name) as copy:
            shutil.copyfile(engine / name, copy)
        line = line.replace(name, f'"$(dirname "$0")/{name}"')
    script = place / COMPARE_FILE
    with partial(script) as text:
        text.write_text(_SCRIPT.format(manifest=manifest, line=line), encoding="utf-8")
    return script
