"""A family whose language model keeps states beside keys and values, from a folder to an answer: Qwen3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder import build
from earlytom import UserError
from earlytom.cells.config import CellsConfig
from runtime import bench, cli
from runtime.decoder.eager import InnerMerge
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.video import sample_indices
from tests.runtime.checkpoint.family_folders import family_folder
from tests.runtime.test_on_axes import CELLS, OFF, ON, QUESTION, STEPS, F, built, clip_of, given, greedy, said, video

__all__ = ["video"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_folder(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")[0]


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the gate, its text too."""
    return built(folder, tmp_path_factory.mktemp("engines"), *ON, "--verify-text")


def test_with_all_tokens_an_engine_answers_as_transformers_do(folder: Path, tmp_path: Path, video: Any) -> None:
    with Pipeline.load(built(folder, tmp_path / "off", *OFF, "--no-verify")) as pipeline:
        wanted = greedy(folder, video)
        assert said(folder, pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)) == wanted
        with pipeline.watch(clip_of(video)) as watched:
            for _ in range(2):
                assert said(folder, watched.ask(QUESTION, max_new_tokens=12)) == wanted
        assert pipeline.ask(clip_of(video, 0.5), QUESTION, max_new_tokens=1).prompt_tokens == len(
            given(folder, clip_of(video), sample_indices(21, F, "nearest").tolist(), 0.5)["input_ids"][0]
        )


def test_an_engine_answers_as_the_model_does_with_earlytom(folder: Path, engine: Path, video: Any) -> None:
    manifest = Manifest.read(engine)
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert (manifest.model.family, manifest.dim, manifest.tokens_full) == ("qwen3_5", 32, STEPS * CELLS)
    wanted = greedy(folder, video, manifest.settings)
    assert wanted != greedy(folder, video)  # negative control
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)
        assert said(folder, answer) == wanted
        assert reference.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens == answer.tokens
        with pytest.raises(UserError, match=r"a prompt of Qwen3\.5 is more than embeddings"):
            pipeline.embed(clip_of(video), QUESTION)
        with pipeline.watch(clip_of(video)) as watched:
            other = watched.ask("Who is it?", max_new_tokens=12)
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert (seen.tokens, seen.cached_tokens > 0) == (answer.tokens, True)
        assert other.tokens == pipeline.ask(clip_of(video), "Who is it?", max_new_tokens=12).tokens


def test_cells_are_asked_without_a_bias(folder: Path, tmp_path: Path, video: Any) -> None:
    engine = built(folder, tmp_path / "cells", "--method", "cells", *ON)
    with pytest.raises(UserError, match=r"has others .*: use --no-bias"):
        Pipeline.load(engine)
    with Pipeline.load(engine, bias=False, positions="consecutive") as plain:
        wanted = greedy(folder, video, CellsConfig(retention_ratio=0.5, merge_layers=(0, 1)))
        assert said(folder, plain.ask(clip_of(video), QUESTION, max_new_tokens=12)) == wanted


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--frames", "7"], "Qwen3.5 takes 2 pictures for a frame: --frames must be a multiple, got 7"),
        (["--schedule", "adaptive"], "--schedule adaptive does not know Qwen3.5's frames"),
        (["--chunk", "4"], "--chunk does not know Qwen3.5's frames"),
        (["--method", "tome"], "method 'tome' does not know Qwen3.5's tokens"),
        (["--int8"], "--int8 knows the products of LLaVA-OneVision, not of Qwen3.5"),
    ],
)
def test_a_build_that_cannot_be_is_refused(folder: Path, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build.main(["--model", str(folder), "--frames", str(F), "--backend", "onnx", "--dry-run", *words])


@pytest.mark.parametrize("how", [{"decoder": "http://127.0.0.1:1/v1"}, {"inner": InnerMerge(1, 0.5)}])
def test_decoders_that_do_not_know_it_are_refused(engine: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="use --decoder torch, without --inner-layer"):
        Pipeline.load(engine, **how)


def test_the_bench_takes_it(folder: Path, engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--engine", str(engine), "--video", str(drawn_clip)]
    words += f"--frames {F} --device cpu --ratio 0.5 --merge-layers 0,1 --requests 1 --warmup 0".split()
    words += f"--concurrency none --repeats 1 --scale-repeats 1 --max-new-tokens {CELLS} --json".split()
    assert cli.run(bench.main, words) == 0
    assert "budget" in capsys.readouterr().out
