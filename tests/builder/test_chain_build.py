"""The adaptive schedule from the command line: one folder, which the other commands take, and its compiled stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from builder import build, inspect, verify
from builder.clips import frames_kept
from builder.compile.engine import compile_engine
from builder.gate import accuracy
from earlytom.budget import most_tokens
from earlytom.errors import UserError
from runtime import ask, cli
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.builder.conftest import FRAMES, TAU, Chain
from tests.builder.needed import needs_rtx

STAGES = [layout.stage_file(layout.ONNX_FILE, stage) for stage in range(3)]


# The commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, videos: tuple[Path, ...]) -> Path:
    """An engine folder, as the command builds it."""
    out = tmp_path_factory.mktemp("engines")
    words = f"--frames {FRAMES} --ratio 0.3 --tau {TAU} --fp32 --backend onnx --schedule adaptive --verify-text".split()
    clips = ["--calibration", *map(str, videos)]
    assert build.main(["--model", str(small_checkpoint), *words, *clips, "--out", str(out)]) == 0
    (made,) = out.iterdir()
    return made


def test_the_command_builds_one_folder_with_one_manifest(folder: Path, chain: Chain, videos: tuple[Path, ...]) -> None:
    manifest = Manifest.read(folder)
    assert manifest.adaptive
    assert set(STAGES) <= manifest.files.keys()
    assert layout.ONNX_FILE not in manifest.files
    assert manifest.verification is not None
    assert set(manifest.verification["steps"]) == set(accuracy.STEPS)
    assert manifest.frames_per_stage == (FRAMES,) * 3
    assert manifest.tokens == most_tokens(FRAMES, 25, 0.3, merges=len(STAGES) - 1)
    measured = json.loads((folder / layout.REPORT_FILE).read_text())["frames_kept"]
    assert set(measured["clips"]) == {path.name for path in videos}
    assert manifest.frames_kept is not None
    for stage, row in enumerate(manifest.frames_kept):
        assert row == tuple(measured[name][stage] for name in ("minimum", "median", "maximum"))
    usual = tuple(median for _, median, _ in manifest.frames_kept)
    assert manifest.figures["flops_vision"] == chain.config.flops_of(usual, chain.config.tokens_of(usual[-1]))["vision"]
    assert "adaptive" in folder.name


def test_the_finished_folder_answers_and_is_found_again(
    folder: Path, small_checkpoint: Path, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()
    for video in videos:
        for backend in ("auto", "torch"):
            words = [str(video), "What happens?", "--engine", str(folder), "--max-new-tokens", "2", "--json"]
            assert cli.run(ask.main, [*words, "--backend", backend, "--device", "cpu"]) == 0
            record = json.loads(capsys.readouterr().out)
            seen.add((video, record["answer"], record["visual_tokens"]))
    assert len(seen) == len(videos)  # both backends say the same
    words = f"--frames {FRAMES} --ratio 0.3 --tau {TAU} --fp32 --backend onnx --schedule adaptive --json".split()
    clips = ["--calibration", *map(str, videos)]
    build.main(["--model", str(small_checkpoint), *words, *clips, "--out", str(folder.parent)])
    assert json.loads(capsys.readouterr().out)["cached"]


def test_other_commands_take_the_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    low, usual, high = (Manifest.read(folder).frames_kept or ())[1]
    assert f"{usual} ({low} to {high})" in shown
    assert "at most" in shown
    record = inspect.describe(folder)
    assert record["layers"]["attention_fused"] == 3  # of four layers; received attention is taken of one
    assert verify.main([str(folder), "--layers", "--json"]) == 0
    assert {tap["tap"] for tap in json.loads(capsys.readouterr().out)["taps"]} >= {f"hidden_{n}" for n in range(4)}
    assert cli.run(verify.main, [str(folder), "--polygraphy", str(tmp_path / "reference")]) == 2
    assert "--schedule budget" in capsys.readouterr().err


def test_layers_of_a_chain_add_up(folder: Path, chain: Chain) -> None:
    """Flops at the median clip: those counted from shapes, and the similarity and merging, which they leave out."""
    usual = tuple(median for _, median, _ in Manifest.read(folder).frames_kept or ())
    exact = chain.config.flops_of(usual, 1)["vision"]
    record = inspect.describe(folder)["layers"]
    assert exact < record["matrix_flops"] < 1.1 * exact
    assert record["weight_bytes"] == pytest.approx(4 * sum(p.numel() for p in chain.reference.parameters()), rel=0.02)


def test_auto_budget_is_what_the_clips_keep(
    small_checkpoint: Path, videos: tuple[Path, ...], clips: dict[str, Tensor], chain: Chain, capsys: Any
) -> None:
    words = f"--frames {FRAMES} --ratio 0.3 --tau {TAU} --fp32 --backend onnx --dry-run --json".split()
    found = frames_kept(chain.reference, clips).budget()

    def dry_run(*more: str) -> dict[str, Any]:
        build.main(["--model", str(small_checkpoint), *words, *more])
        record: dict[str, Any] = json.loads(capsys.readouterr().out)
        return record

    clip_words = ["--calibration", *map(str, videos)]
    auto = dry_run("--frame-budget", "auto", *clip_words)
    assert auto["frames_per_stage"] == [FRAMES, *found]
    # The key holds the numbers, wherever they came from.
    assert auto["key"] == dry_run("--frame-budget", ",".join(map(str, found)), *clip_words)["key"]
    assert auto["key"] != dry_run(*clip_words)["key"]
    assert (
        auto["frames_per_stage"] != dry_run("--frame-budget", "auto", "--tau", "0.95", *clip_words)["frames_per_stage"]
    )


# The compiler


@needs_rtx
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_stage_compiles(chain_of: Callable[..., Chain], tmp_path: Path, dtype: str) -> None:
    made = chain_of(f"--{dtype}")
    for stage, path in list(enumerate(made.paths))[0 if dtype == "fp16" else 2 :]:
        report = compile_engine(
            path,
            tmp_path / layout.stage_file(layout.ENGINE_FILE, stage),
            flavour="tensorrt-rtx",
            dtype=dtype,
            profile=(1, 7, FRAMES),
            expected_share=made.config.stage_half_shares[stage] if dtype == "fp16" else 1.0,
            layers_path=tmp_path / layout.stage_file(layout.LAYERS_FILE, stage),
        )
        assert report.engine_bytes > 100_000
        assert not (report.layers.attention_unfused and dtype == "fp16")


@needs_rtx
def test_without_a_profile_a_stage_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'hidden' of vision.1.onnx has dynamic shape \(-1, 81, 128\)"):
        compile_engine(chain.paths[1], tmp_path / "vision.engine", flavour="tensorrt-rtx", dtype="fp32")
    assert not list(tmp_path.iterdir())
