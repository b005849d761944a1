"""The measurements of the accuracy gate: an exported graph against the model it came from.

Polygraphy runs the graph in ONNX Runtime and the fp32 PyTorch reference on the same real frames. Merging and token
selection are discrete decisions; half precision may decide near-ties differently without harm, and then all later
outputs differ. So there are four steps:

1. hidden:    the hidden states that each decision is taken from (cosine, mean error), with equal decisions before them
2. decisions: overlap of the frames and tokens kept with those that the reference keeps by itself; and, exactly, that
              the reference's rule applied to the graph's own values gives the graph's decisions
3. tokens:    the outputs, element by element, against the reference with the graph's decisions forced on it; positions
              exactly
4. text:      the decoder's next tokens along the reference's answer (where the decoder is loaded)

Half graphs are run with fp32 arithmetic and every result rounded (`builder.precision.rounding`): ONNX Runtime on a CPU
leaves out roundings of fp16, and with them the overflows of a GPU, and has no bf16 kernels.

`builder.gate.runners` runs the reference; `builder.gate.limits` has each precision's limits. Nothing is printed and
nothing stays in the folder: the report has the measurements, and `builder.gate.kept_reference` saves the reference's
outputs and makes the command line that repeats step 3 in CI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER
from torch import Tensor

from builder.export.vision import VisionGraph
from builder.gate import checks
from builder.gate.limits import GATES, STEPS
from builder.gate.next_tokens import SeenTokens
from builder.gate.report import Check, Report
from builder.gate.rules import Rule, rule_of
from builder.gate.runners import TorchRunner
from builder.gate.runs import Arrays, run_tapped
from earlytom.errors import UserError
from earlytom.method import Method
from earlytom.spans import trace_names
from runtime.engine import layout


def verify(
    onnx_path: Path | Sequence[Path],
    reference: VisionGraph,
    clips: dict[str, Tensor],
    dtype: str,
    *,
    precision: str | None = None,
    batch: int = 1,
    text: Callable[[SeenTokens, SeenTokens], float] | None = None,
    text_with_equal_decisions: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Report, RunResults]:
    """Run the gate.

    Args:
        onnx_path: the exported graph, or those of a chain; a temporary copy with more outputs is written beside it.
        reference: the same vision part in fp32.
        clips: name to uint8 frames [F, 3, H, W]; real frames, never noise (on noise all decisions are near-ties).
        dtype: of the graph.
        precision: which of `builder.gate.limits.GATES` applies; default: that of `dtype`.
        batch: B of the graph; `clips` must then fill whole batches (`builder.gate.batches.fill`).
        text: maps the engine's and the reference's tokens of a clip to the share of next tokens that agree; None skips
            the step, which the report notes.
        text_with_equal_decisions: compare with the reference under the graph's decisions, not its own. For untrained
            decoders, which are chaotic: one differently chosen token changes half of the text.
        say: progress, one line at a time.

    Returns:
        The report, and the reference's outputs under the graph's decisions (for `builder.gate.kept_reference`).
    """
    rule, gate, half = rule_of(reference.config), GATES[precision or dtype], dtype != "fp32"
    names = trace_names(reference.config)
    feeds = [{layout.FRAMES: frames.numpy()} for frames in clips.values()]
    say(f"running the graph in ONNX Runtime{', every result rounded' if half else ''}")
    got = run_tapped(onnx_path, names, feeds, rounded=half, batch=batch)
    outputs = _values(got)
    say("running the PyTorch reference")
    wanted = _run_reference(reference, [rule.own()] * len(feeds), feeds)
    own = _values(wanted)
    if not _same(rule, outputs, own):
        say("running the PyTorch reference with the graph's decisions")
        wanted = _run_reference(reference, [rule.forced(out) for out in outputs], feeds)
    tolerance = gate.error * _root_mean_square([out[layout.TOKENS] for out in own])

    found = checks.compare_values(got, wanted, reference.config, gate, tolerance)
    found += checks.compare_decisions(rule, outputs, own, gate)
    if reference.config.schedule == "adaptive":
        found += checks.compare_counts(rule, outputs, own, gate, exact=precision in (None, dtype) and not half)
    steps = len(feeds[0][layout.FRAMES]) // reference.tower.step
    found += checks.repeat_decisions(rule, outputs, steps, reference.vision)
    if batch > 1:
        found += checks.compare_videos(rule, outputs, _values(wanted), batch)
    notes = [f"{dtype}: each operator in fp32, each result rounded to {dtype}, as on a GPU"] if half else []
    if text is None:
        notes.append("step text was not run: the decoder was not loaded (--verify-text runs it)")
    else:
        say("comparing the decoder's next tokens")
        against = _values(wanted) if text_with_equal_decisions else own
        share = gate.of_clips([text(_seen(out), _seen(ref)) for out, ref in zip(outputs, against, strict=True)])
        found.append(Check.at_least("text", "share of next tokens that agree", share, gate.text))
    if dtype == "fp16" and isinstance(onnx_path, Path):
        # Polygraphy's command line will run the graph without added rounding, which may decide near-ties differently.
        say("running the graph in ONNX Runtime as it is")
        plain = _values(run_tapped(onnx_path, names, feeds[:batch], rounded=False, batch=batch))
        if not _same(rule, plain, outputs[:batch]):
            say("running the PyTorch reference with those decisions")
            again = _run_reference(reference, [rule.forced(out) for out in plain], feeds[:batch])
            wanted = RunResults([(wanted[0][0], [*again[0][1], *wanted[0][1][batch:]])])
    found.sort(key=lambda check: STEPS.index(check.step))
    return Report(tuple(found), tuple(clips), tuple(notes), tolerance), wanted


def _run_reference(reference: VisionGraph, decisions: Sequence[Method], feeds: list[Arrays]) -> RunResults:
    """Run the PyTorch model on every clip; `decisions` has the deciding method of each."""
    runner = TorchRunner(reference, decisions, feeds[0][layout.FRAMES].shape, "reference")
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        return Comparator.run([runner], data_loader=feeds)


def _values(run: RunResults) -> list[Arrays]:
    """The values of a single runner's run, for each clip."""
    return [{name: np.asarray(iteration[name]) for name in iteration} for iteration in run[0][1]]


def _same(rule: Rule, some: list[Arrays], others: list[Arrays]) -> bool:
    """Whether two runs took the same decisions on every clip."""
    return all(rule.same(a, b) for a, b in zip(some, others, strict=True))


def _root_mean_square(tokens: Sequence[NDArray[Any]]) -> float:
    scale = float(np.sqrt(np.mean([np.mean(one.astype(np.float64) ** 2) for one in tokens])))
    if not np.isfinite(scale) or scale == 0:
        raise UserError("the reference's tokens are not finite or all zero: the checkpoint's weights are unusable")
    return scale


def _seen(out: Arrays) -> SeenTokens:
    tokens, positions, sources = (
        torch.from_numpy(out[name]) for name in (layout.TOKENS, layout.POSITIONS, layout.SOURCES)
    )
    return SeenTokens(tokens.float(), positions, sources)
