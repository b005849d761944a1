"""Engines of the method "cells" from the command line: every mode, what the runtime makes of them, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from builder import build, inspect, verify
from builder.clips import frames_kept
from builder.export.vision import vision_graph
from builder.gate import accuracy
from builder.gate.rules import CellsRule, ForcedCells
from builder.settings.arguments import parse
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.methods.cells import Cells
from runtime import ask, cli
from runtime.checkpoint import describe
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.engine.origin import checkpoint_of
from runtime.parts import placing_of
from runtime.text.places import Placing
from runtime.video import load_clip
from runtime.vision import Encoded, encode_one, open_backend
from runtime.vision.torch import open_torch
from tests.builder.conftest import FRAMES, SMALL

MODES = {
    "whole": [],
    "greedy": ["--rounds", "greedy"],
    "chunks": ["--chunk", "4"],
    "chunks, one merge": ["--chunk", "4", "--merge-layers", "1"],
    "several videos": ["--batch", "2"],
    "several counts": ["--frames", f"4,{FRAMES}"],
    "one frame": ["--frames", "1"],
    "no merge": ["--merge-layers", "none"],
    "half": ["--fp16"],
    "everything": ["--ratio", "1"],
}
ADAPTIVE = {"adaptive": ["--schedule", "adaptive", "--threshold", "0.2"]}
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, videos: tuple[Path, ...]) -> Build:
    """`built("chunks")`: the folder that the command builds and verifies."""
    out, done = tmp_path_factory.mktemp("cells"), dict[str, Path]()

    def make(mode: str) -> Path:
        if mode not in done:
            usual = ["--ratio", "0.2", "--frames", str(FRAMES), "--fp32", "--no-verify-text"]
            own = (MODES | ADAPTIVE)[mode]
            words = [*usual[: -2 if "--fp16" in own else None], *own]
            words = [word for word in words if word != "--fp32"] if "--fp16" in words else words
            clips = ["--calibration", *map(str, videos[:2])]
            command = ["--model", str(small_checkpoint), "--method", "cells", "--backend", "onnx", *words, *clips]
            assert build.main([*command, "--out", str(out / mode)]) == 0
            (done[mode],) = (out / mode).iterdir()
        return done[mode]

    return make


def both_say(folder: Path, manifest: Manifest, videos: tuple[Path, ...]) -> Iterator[tuple[Encoded, Encoded]]:
    """Of each video: what the engine gives, and what PyTorch does."""
    reference = open_torch(describe(manifest.model.source), manifest, device=torch.device("cpu"), dtype=torch.float32)
    engine = open_backend("onnxruntime", folder, manifest)
    for video in videos[:2]:
        frames = load_clip(video, manifest.frames, manifest.model.preprocessing.size).frames
        wanted = Encoded(*(value.clone() for value in encode_one(reference, frames)))
        yield encode_one(engine, frames), wanted
    engine.close()


def assert_alike(found: Encoded, wanted: Encoded) -> None:
    for name, mine, theirs in zip(layout.OUTPUTS, found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-3, err_msg=name)


def said(folder: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The answers of its backends."""
    capsys.readouterr()
    answers = set()
    for backend in ("auto", "torch"):
        words = [str(video), "What happens?", "--engine", str(folder), "--max-new-tokens", "2", "--json"]
        assert cli.run(ask.main, [*words, "--backend", backend, "--device", "cpu"]) == 0
        answers.add(json.loads(capsys.readouterr().out)["answer"])
    return answers


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_says_what_pytorch_says(built: Build, videos: tuple[Path, ...], mode: str) -> None:
    folder = built(mode)
    manifest = Manifest.read(folder)
    assert (manifest.method, type(manifest.settings)) == ("cells", CellsConfig)
    assert "-cells-" in folder.name
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    for found, wanted in both_say(folder, manifest, videos):
        assert found.sources.shape == (manifest.frames_per_stage[-1], manifest.frames)
        assert len(found.tokens) == manifest.tokens
        if mode == "half":  # near-ties may fall otherwise
            assert len(set(found.place.tolist()) & set(wanted.place.tolist())) > 0.85 * manifest.tokens
        else:
            assert_alike(found, wanted)


def test_no_attention_is_written_out(built: Build) -> None:
    """So a compiler can fuse every layer's."""
    graph = onnx.load(str(built("whole") / layout.ONNX_FILE)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Attention") == SMALL[0]
    assert "Softmax" not in kinds
    head, _ = Manifest.read(built("chunks, one merge")).layout.graphs
    assert [tensor.name for tensor in head.outputs] == [layout.HIDDEN]  # and no received attention goes along


def test_the_folder_answers_and_is_found_again(
    built: Build, small_checkpoint: Path, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built("whole")
    assert len(said(folder, videos[0], capsys)) == 1
    words = ["--ratio", "0.2", "--frames", str(FRAMES), "--fp32", "--no-verify-text", "--method", "cells"]
    clips = ["--calibration", *map(str, videos[:2]), "--backend", "onnx", "--json", "--out", str(folder.parent)]
    build.main(["--model", str(small_checkpoint), *words, *clips])
    assert json.loads(capsys.readouterr().out)["cached"]
    assert verify.main([str(folder), "--layers"]) == 0
    assert inspect.main([str(folder)]) == 0
    assert "cells" in capsys.readouterr().out


def test_the_adaptive_schedule_from_the_command_line(
    built: Build, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built("adaptive")
    manifest = Manifest.read(folder)
    assert manifest.adaptive
    assert {"vision.0.onnx", "vision.1.onnx", "vision.2.onnx"} < manifest.files.keys()
    assert (manifest.earlytom["schedule"], manifest.earlytom["threshold"]) == ("adaptive", 0.2)
    assert manifest.frames_per_stage == (FRAMES,) * 3
    assert manifest.frames_kept is not None
    assert manifest.frames_kept[-1][2] < FRAMES
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    for found, wanted in both_say(folder, manifest, videos):
        assert len(found.tokens) == manifest.layout.tokens_of(len(found.sources)) < manifest.tokens
        assert_alike(found, wanted)
    assert len(said(folder, videos[0], capsys)) == 1
    assert verify.main([str(folder), "--layers", "--json"]) == 0
    assert {tap["tap"] for tap in json.loads(capsys.readouterr().out)["taps"]} >= {f"hidden_{n}" for n in range(4)}
    assert inspect.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["attention_fused"] == SMALL[0]  # no attention is received


def test_what_the_decoder_is_told_comes_of_the_method(built: Build) -> None:
    cells = Manifest.read(built("whole"))
    published = EarlyTomConfig(merge_layers=(1, 2), schedule="budget").to_dict()
    model = checkpoint_of(cells, None)
    most = model.frames * cells.tokens_per_frame
    assert placing_of(cells, model, None, None) == Placing(original=True, bias=True, most=most)
    assert placing_of(cells, model, False, "consecutive") == Placing(most=most)
    assert (published["schedule"], EarlyTomConfig.bias, EarlyTomConfig.original_positions) == ("budget", False, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule adaptive --batch 2", "--batch 2 needs equal numbers"),
        ("--schedule adaptive --chunk 4", "build with --schedule budget, not adaptive"),
        ("--schedule adaptive --frames 4,8", "an adaptive engine takes one frame count"),
        ("--schedule adaptive --frame-budget 0.5", "--frame-budget is for --schedule budget"),
        (
            "--schedule adaptive --rounds greedy --backend tensorrt-rtx",
            "--rounds greedy and --schedule adaptive are a loop that tensorrt-rtx cannot compile: give --rounds",
        ),
        ("--threshold 0.1", "--threshold is for --schedule adaptive and --frame-budget auto"),
        ("--frame-budget auto --threshold 4", "--threshold must be in [0, 3], got 4"),
        ("--method earlytom --threshold 0.1", "--threshold is for --method cells, not earlytom"),
        ("--tau 0.5", "--tau is for --method earlytom, not cells"),
        ("--preset videomme", "--preset is for --method earlytom, not cells"),
        ("--rounds 0", "--rounds must be"),
        ("--rounds some", "--rounds 'some': give a whole number, or greedy"),
        ("--power 65", "--power must be in"),
        ("--method earlytom --power 3", "--power is for --method cells, not earlytom"),
        ("--method earlytom --rounds greedy", "--rounds is for --method cells, not earlytom"),
        ("--backend onnx --compression plugin", "an ONNX file holds no kernels"),
    ],
)
def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert cli.run(build.main, ["--method", "cells", "--dry-run", *words.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_auto_budget_is_what_the_clips_keep(
    small_checkpoint: Path, videos: tuple[Path, ...], clips: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the rule of cells, whose threshold moves it; the engine has static shapes all the same."""
    words = f"--method cells --frames {FRAMES} --ratio 0.3 --fp32 --backend onnx".split()
    command = ["--model", str(small_checkpoint), *words]

    def dry_run(*more: str) -> dict[str, Any]:
        assert build.main([*command, "--dry-run", "--json", "--calibration", *map(str, videos), *more]) == 0
        record: dict[str, Any] = json.loads(capsys.readouterr().out)
        return record

    found = {}
    for threshold in (None, 0.2):
        own = [] if threshold is None else ["--threshold", str(threshold)]
        _, config, _ = parse([*command, *own, "--frame-budget", "auto"])
        method = Cells(config.earlytom.replace(schedule="adaptive"))  # type: ignore[arg-type]
        graph = vision_graph(config, torch.float32)
        counts = [encode(graph.vision, graph.pixels(clip), method, depth=3).frames_per_stage for clip in clips.values()]
        found[threshold] = tuple(max(column) for column in zip(*counts, strict=True))  # 90 % of two are both
        assert frames_kept(graph, clips).clips == dict(zip(clips, counts, strict=True))
        assert tuple(dry_run("--frame-budget", "auto", *own)["frames_per_stage"]) == found[threshold]
    assert FRAMES > found[None][-1] > found[0.2][-1] >= 1
    given = dry_run("--frame-budget", ",".join(map(str, found[None][1:])))
    assert dry_run("--frame-budget", "auto")["key"] == given["key"]  # which holds the numbers


def test_inner_merging_and_a_bias_are_refused(
    built: Build, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(videos[0]), "?", "--engine", str(built("whole")), "--inner-layer", "1", "--device", "cpu"]
    assert cli.run(ask.main, words) == 2
    assert "--no-bias" in capsys.readouterr().err


# The gate


def small_change(name: str) -> Callable[[onnx.ModelProto], None]:
    """One decision of the graph is another than its own rule would take."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if name in node.output)
        node.output[list(node.output).index(name)] = "raw"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "share"))
        after = [onnx.helper.make_node("Mul", ["raw", "share"], ["less"])]
        after.append(onnx.helper.make_node("Add", ["less", "half"], [name]))
        shape = [d.dim_value for v in model.graph.value_info if v.name == name for d in v.type.tensor_type.shape.dim]
        half = np.full(shape, 0.5 / shape[-1], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(half, "half"))
        index = list(model.graph.node).index(node)
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: index + 1], *after, *nodes[index + 1 :]])

    return change


def test_the_gate_sees_other_weights(exported: Any, clips: dict[str, Any], tmp_path: Path) -> None:
    """Negative control: still convex, and not those of the rule."""
    made = exported("--method", "cells", "--ratio", "0.2", "--fp32")
    report, _ = accuracy.verify(made.path, made.reference, clips, "fp32")
    report.require()
    model = onnx.load(made.path)
    small_change("weights_1")(model)
    onnx.save(model, tmp_path / "vision.onnx")
    report, _ = accuracy.verify(tmp_path / "vision.onnx", made.reference, clips, "fp32")
    failed = {check.what for check in report.checks if not check.passed}
    assert "frame plans repeated: largest difference" in failed


def test_forced_decisions_are_taken(exported: Any, clips: dict[str, Any]) -> None:
    made = exported("--method", "cells", "--ratio", "0.2", "--fp32")
    rule = CellsRule(made.reference.config)
    frames = next(iter(clips.values()))
    own = {name: value.numpy() for name, value in made.reference(frames).items()}
    other = own | {layout.POSITIONS: own[layout.POSITIONS][::-1].copy()}
    forced = rule.forced(other)
    assert isinstance(forced, ForcedCells)
    made.reference.decisions, kept = forced, made.reference.decisions
    try:
        found = made.reference(frames)
    finally:
        made.reference.decisions = kept
    assert np.array_equal(found[layout.POSITIONS].numpy(), other[layout.POSITIONS])
    assert not rule.same(own, other)
    assert rule.same(own, dict(own))
