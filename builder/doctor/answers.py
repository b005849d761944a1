"""Parts that answer questions: an engine and a decoder together, against the reference in PyTorch on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from builder.doctor.isolated import Wrong
from runtime.drawing.clips import write_test_clip
from runtime.pipeline import Answer, Pipeline

CLIPS = (3, 5, 8)  # of the bundled model's test set


def ask(folder: str, backend: str, device: str, decoder: str = "torch", *, half: bool = False) -> dict[str, Any]:
    """Ask about test clips and compare the answers with the reference's; ask again about a watched clip.

    At least half of the answers must be right.

    Args:
        half: the decoder runs in its default precision, in which a near-tie may fall the other way: one answer in four
            may differ from the reference's, and answers about the watched clip need not equal the first ones.
    """
    asked = [(path, q.text, q.answer) for path, questions in _clips(Path(folder).parent) for q in questions]
    wanted = [one.text for one in _answers(folder, asked, backend="torch", device="cpu")]
    dtype = None if half else torch.float32
    with Pipeline.load(folder, backend=backend, device=device, decoder=decoder, dtype=dtype) as pipeline:
        got = [pipeline.ask(path, question, max_new_tokens=8) for path, question, _ in asked]
        first = str(asked[0][0])
        with pipeline.watch(first) as watched:
            again = [watched.ask(q, max_new_tokens=8).text for path, q, _ in asked if str(path) == first]
        replayed = device != "cpu" and decoder == "torch" and pipeline.decoder is not None
        graphs = {"decode_graphs": pipeline.decoder.replay.reason or "replayed"} if replayed else {}  # type: ignore[union-attr]
    texts = [one.text for one in got]
    differing = sum(a != b for a, b in zip(texts, wanted, strict=True))
    if differing > (len(asked) // 4 if half else 0):
        raise Wrong(f"{differing} of {len(asked)} answers are not those of the reference")
    if not half and again != texts[: len(again)]:
        raise Wrong("questions about a watched video have other answers than about the video")
    right = sum(text == answer for text, (_, _, answer) in zip(texts, asked, strict=True))
    if right < len(asked) / 2:
        raise Wrong(f"{right} of {len(asked)} answers are right")
    return {"answers": len(asked), "right": right, "as_reference": len(asked) - differing, **_times(got), **graphs}


def _clips(place: Path) -> list[tuple[Path, Any]]:
    return [write_test_clip(place / f"asked-{index}.mp4", index) for index in CLIPS]


def _answers(folder: str, asked: Sequence[tuple[Path, str, str]], **how: Any) -> list[Answer]:
    with Pipeline.load(folder, dtype=torch.float32, **how) as pipeline:
        return [pipeline.ask(path, question, max_new_tokens=8) for path, question, _ in asked]


def _times(answers: Sequence[Answer]) -> dict[str, float]:
    """Medians in milliseconds."""
    names = ("decode", "preprocess", "vision", "prefill", "first_token", "per_token")
    rows = {name: sorted(getattr(one.timings, name) for one in answers) for name in names}
    return {f"{name}_ms": round(1000 * row[len(row) // 2], 2) for name, row in rows.items()}


def bench(words: Sequence[str]) -> dict[str, Any]:
    """The main figures of `python -m runtime.bench` with `words`: medians in milliseconds, by variant."""
    record = command(["runtime.bench", "--json", *words])
    figures: dict[str, Any] = {}
    for one in record["variants"]:
        stages = {name: round(1000 * one["stages"][name]["p50"], 2) for name in ("vision", "prefill")}
        figures[one["name"]] = {
            "tokens": one["visual_tokens"],
            "ttft_ms": round(1000 * one["ttft"]["p50"], 2),
            **{f"{name}_ms": value for name, value in stages.items()},
            "vision_of_peak": round(one["of_peak"]["vision"], 3),
        }
    return figures


def service(folder: str, device: str) -> dict[str, Any]:
    """The figures of `python -m runtime.bench --service`: fresh, watched and live videos, and many callers."""
    record = command(["runtime.bench", "--json", "--service", "--engine", folder, "--device", device, *_FEW])
    return {name: value for name, value in record.items() if isinstance(value, int | float | str | dict)}


_FEW = ("--repeats", "3", "--warmup", "1", "--requests", "4", "--concurrency", "1,4")


def command(words: Sequence[str]) -> dict[str, Any]:
    """Run one of this project's commands; returns the JSON of its last line."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    sys.stdout.write(done.stdout)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Wrong(lines[-1].removeprefix("error: ") if lines else f"it ended with status {done.returncode}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
