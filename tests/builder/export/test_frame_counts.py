"""Several frame counts in one folder: each is what it would be alone, the weights are there once, tools take one.

The file of weights itself: test_shared_weights.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
import torch
from torch import Tensor

from builder import build, inspect, stages, verify
from builder.compile.engine import CompileReport, compile_engine
from builder.compile.layers import summarise
from builder.export.vision import ExportedGraph, vision_graph
from builder.gate import drift
from builder.gate.kept_reference import COMPARE_FILE, keep_reference
from builder.inspection.comparison import compare
from builder.record import StagesDone, write_report
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom.budget import frames_per_stage, token_count
from earlytom.errors import UserError
from runtime import ask, cli
from runtime.checkpoint import describe
from runtime.engine import layout
from runtime.engine.manifest import Manifest, describe_files
from runtime.errors import EngineError
from runtime.measure.variants import read_engine
from runtime.pipeline import Pipeline
from runtime.video import load_clip
from runtime.vision import choose_backend, open_backend
from runtime.vision.by_frames import ByFrames
from runtime.vision.torch import open_torch
from runtime.vision.whole import Whole
from tests.builder.conftest import TAU
from tests.builder.gate.shell import shell
from tests.builder.needed import needs_rtx
from tests.runtime.engine.test_manifest import PLUGIN
from tests.runtime.vision.opened import open_whole

COUNTS = (4, 8)
WORDS = f"--ratio 0.3 --tau {TAU} --backend onnx --frames 8,4".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """An engine folder for two frame counts, as the command builds it."""
    out = tmp_path_factory.mktemp("engines")
    words = ["--model", str(small_checkpoint), *WORDS, "--out", str(out), "--no-verify-text"]
    assert build.main(words) == 0
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.read(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> dict[int, Path]:
    """The graph of each count, exported by itself."""
    graphs = {}
    for frames in COUNTS:
        config = config_of(small_checkpoint, "--frames", str(frames))
        graphs[frames] = stages.export(config, tmp_path_factory.mktemp("alone")).path
    return graphs


def config_of(checkpoint: Path, *words: str) -> BuildConfig:
    return parse(["--model", str(checkpoint), *WORDS, *words])[1]


def names(*files: str) -> set[str]:
    return {layout.count_file(name, frames) for name in files for frames in COUNTS}


# The folder


def test_the_folder_has_files_for_every_count_and_weights_once(folder: Path, manifest: Manifest) -> None:
    references = (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE)
    expected = names(layout.ONNX_FILE, *references) | {layout.DATA_FILE, layout.REPORT_FILE}
    assert set(manifest.files) == expected
    weights = manifest.files[layout.DATA_FILE].bytes
    for frames in COUNTS:
        assert manifest.files[layout.count_file(layout.ONNX_FILE, frames)].bytes < 0.15 * weights
    parameters = 2 * sum(value.numel() for value in vision_graph(config_at(manifest), torch.float32).parameters())
    assert weights == pytest.approx(parameters, rel=0.05)
    assert "-f4+8-" in folder.name


def config_at(manifest: Manifest) -> BuildConfig:
    return config_of(Path(manifest.model.source), "--frames", str(manifest.frames))


def test_the_manifest_has_a_view_for_every_count(folder: Path, manifest: Manifest, engine: Path) -> None:
    assert (manifest.frames, manifest.counts, manifest.frame_counts) == (8, COUNTS, COUNTS)
    assert manifest.to_dict()["frame_counts"] == [4, 8]
    single = Manifest.read(engine)
    assert "frame_counts" not in single.to_dict()
    assert single.at(single.frames) is single
    assert single.file(layout.ONNX_FILE) == layout.ONNX_FILE
    for frames in COUNTS:
        one = manifest.at(frames)
        assert (one.frames, one.counts) == (frames, (frames,))
        assert one.frames_per_stage == frames_per_stage(frames, merges=2)
        assert one.tokens == token_count(frames, 25, 0.3, merges=2)
        assert one.tokens_full == 25 * frames
        assert one.stage_files(layout.ONNX_FILE) == (f"vision.f{frames}.onnx",)
        assert one.at(frames) is one
        assert f"vision.f{frames}.onnx" in one.polygraphy
        assert "&&" not in one.polygraphy
    assert manifest.stage_files(layout.ONNX_FILE) == ("vision.f8.onnx",)
    assert " && ".join(manifest.at(frames).polygraphy for frames in COUNTS) == manifest.polygraphy
    with pytest.raises(EngineError, match=r"takes 4 or 8 frames, not 6: .*--frames 4,6,8"):
        manifest.at(6)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"frame_counts": (4, 16)}, "frames is 8, of frame_counts"),
        ({"frame_counts": (8, 4)}, "ascending frame counts"),
        ({"frame_counts": (4, 4, 8)}, "ascending frame counts"),
        ({"frame_counts": ()}, "frame_counts: expected `array` of length >= 1"),
        ({"frame_counts": (2, 4, 8)}, r"lists no vision.f2.onnx"),
        ({"frame_counts": None}, r"lists no vision.onnx"),
        ({"batch": 0}, r"batch: expected `int` >= 1, got 0"),
        ({"tokens": 1}, "tokens is 1"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: Manifest, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(EngineError, match=what):
        manifest.replace(**changes)


def test_a_view_is_no_folder(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has all frame counts of its folder, not 4 alone"):
        manifest.at(4).write(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(EngineError, match="null or several frame counts"):
        Manifest.from_dict(manifest.at(4).to_dict())
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_every_check_says_of_which_count_it_is(folder: Path, manifest: Manifest) -> None:
    report = json.loads((folder / layout.REPORT_FILE).read_text())
    assert manifest.verification == report["verification"]
    for checks in report["verification"]["steps"].values():
        per_count = {frames: [c["what"] for c in checks if c["frames"] == frames] for frames in COUNTS}
        assert per_count[4] == per_count[8]
        assert sum(map(len, per_count.values())) == len(checks)
    assert report["key_parts"]["frame_counts"] == [4, 8]
    assert {note.split(":")[0] for note in report["verification"]["notes"]} == {"4 frames", "8 frames"}


def test_a_count_that_fails_fails_the_build(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate of the least count sees its own graph, and nothing is published."""
    kept = stages.export_counts

    def export(config: BuildConfig, place: Path, int8: Any) -> Any:
        made = kept(config, place, int8)
        model = onnx.load(str(made[0].path), load_external_data=False)
        (node,) = (node for node in model.graph.node if layout.TOKENS in node.output)
        node.output[list(node.output).index(layout.TOKENS)] = "raw"
        model.graph.node.append(onnx.helper.make_node("Neg", ["raw"], [layout.TOKENS]))
        onnx.save(model, str(made[0].path))
        return made

    monkeypatch.setattr(stages, "export_counts", export)
    words = ["--model", str(small_checkpoint), *WORDS, "--out", str(tmp_path / "out"), "--no-verify-text"]
    assert cli.run(build.main, words) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list((tmp_path / "out").glob("*"))


# What it runs


def test_every_count_is_what_it_would_be_alone(
    folder: Path, manifest: Manifest, alone: dict[int, Path], videos: tuple[Path, ...]
) -> None:
    vision = open_backend("onnxruntime", folder, manifest)
    assert isinstance(vision, ByFrames)
    assert vision.counts == COUNTS
    for frames in COUNTS:
        clip = load_clip(videos[0], frames, (72, 72)).frames
        tokens, positions, *_ = vision.encode(clip)
        wanted = open_whole(alone[frames]).encode(clip)
        assert torch.equal(positions, wanted[1])
        assert torch.equal(tokens, wanted[0])  # the same operators on the same weights
    with pytest.raises(EngineError, match="takes clips of 4 or 8 frames"):
        vision.encode(load_clip(videos[0], 6, (72, 72)).frames)


def test_a_folder_that_was_moved_still_runs(folder: Path, videos: tuple[Path, ...], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    clip = load_clip(videos[0], 8, (72, 72)).frames
    found = open_backend("onnxruntime", moved, Manifest.read(moved)).encode(clip)
    assert torch.equal(found[0], open_backend("onnxruntime", folder, Manifest.read(folder)).encode(clip)[0])
    (moved / layout.DATA_FILE).write_bytes(b"")
    with pytest.raises(EngineError, match=r"vision.data has 0 bytes"):
        Manifest.read(moved)


def test_only_some_of_the_counts(folder: Path, manifest: Manifest) -> None:
    one = open_backend("onnxruntime", folder, manifest, frames=(4,))
    assert isinstance(one, Whole)
    assert one.shape[0] == 4
    assert open_backend("onnxruntime", folder, manifest.at(8)).shape[0] == 8  # type: ignore[attr-defined]
    both = open_backend("onnxruntime", folder, manifest, frames=(8, 4))
    assert isinstance(both, ByFrames)
    with pytest.raises(EngineError, match="takes 4 or 8 frames, not 16"):
        open_backend("onnxruntime", folder, manifest, frames=(4, 16))
    assert choose_backend("auto", manifest) == "onnxruntime"
    assert read_engine(folder, describe(manifest.model.source), 4) == manifest.at(4)
    with pytest.raises(EngineError, match="takes 4 or 8 frames and 16 are measured"):
        read_engine(folder, describe(manifest.model.source), 16)


def test_what_was_opened_is_closed_where_another_count_cannot_be(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[tuple[int, ...]] = []

    class Second(Whole):
        def __init__(self, runner: Any) -> None:
            if "f8" in runner.path.name:
                raise EngineError("no room")
            super().__init__(runner)

        def close(self) -> None:
            closed.append(self.shape)
            super().close()

    monkeypatch.setattr("runtime.vision.open.Whole", Second)
    with pytest.raises(EngineError, match="no room"):
        open_backend("onnxruntime", folder, manifest)
    assert closed == [(4, 3, 72, 72)]


def test_a_question_takes_the_count_that_suits_the_video(
    folder: Path, manifest: Manifest, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(videos[0]),
        "What happens?",
        "--engine",
        str(folder),
        "--max-new-tokens",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    for more, frames in (([], 8), (["--frames", "4"], 4), (["--frames", "4", "--backend", "torch"], 4)):
        assert cli.run(ask.main, [*words, *more]) == 0
        record = json.loads(capsys.readouterr().out)
        one = manifest.at(frames)
        assert (record["visual_tokens"], record["visual_tokens_full"]) == (one.tokens, one.tokens_full)
    assert cli.run(ask.main, [*words, "--frames", "5"]) == 2
    assert "takes 4 or 8 frames, not 5" in capsys.readouterr().err


def test_of_counts_that_keep_as_many_tokens_the_one_that_was_asked_is_reported(
    build_engine: Callable[..., Path], small_checkpoint: Path
) -> None:
    words = "--frames 3,4 --ratio 0.001 --merge-layers 1 --frame-budget 0.5 --fp32"
    with Pipeline.load(build_engine("--model", str(small_checkpoint), *words.split()), device="cpu") as pipeline:
        video = torch.randint(0, 256, (8, 3, 72, 72), dtype=torch.uint8)
        each = [pipeline.manifest.at(frames) for frames in (3, 4)]
        assert each[0].tokens == each[1].tokens
        for one in each:
            answer = pipeline.ask(video, "What happens?", frames=one.frames, max_new_tokens=1)
            with pipeline.watch(video, frames=one.frames) as watched:
                seen = watched.ask("What happens?", max_new_tokens=1)
            assert answer.visual_tokens_full == seen.visual_tokens_full == one.tokens_full


def test_in_pytorch_the_model_is_loaded_once(folder: Path, manifest: Manifest, videos: tuple[Path, ...]) -> None:
    vision = open_torch(describe(manifest.model.source), manifest, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(vision, ByFrames)
    parts = {id(backend.part) for backend in vision._backends.values()}  # type: ignore[attr-defined]
    assert len(parts) == 1
    for frames in COUNTS:
        clip = load_clip(videos[0], frames, (72, 72)).frames
        found = open_backend("onnxruntime", folder, manifest).encode(clip)
        tokens, positions, *_ = vision.encode(clip)
        assert torch.equal(positions, found[1])
        assert torch.allclose(tokens, found[0].float(), atol=0.05)


def test_several_videos_of_several_counts(small_checkpoint: Path, tmp_path: Path, clips: dict[str, Tensor]) -> None:
    config = config_of(small_checkpoint, "--batch", "2", "--fp32")
    graphs = stages.export_graphs(config, tmp_path)
    assert "-f4+8-b2-" in config.name(config.key())
    each = {frames: open_whole(graph.path, batch=2) for frames, graph in zip(COUNTS, graphs, strict=True)}
    vision = ByFrames(each)  # type: ignore[arg-type]
    some = [clip[:frames] for frames in COUNTS for clip in clips.values()]
    for one, other in ((0, 1), (2, 3), (0, 3)):
        found = [tuple(value.clone() for value in pair) for pair in vision.encode_several([some[one], some[other]])]
        assert torch.equal(found[0][1], each[len(some[one])].encode_several([some[one]])[0][1])
        assert torch.equal(found[1][1], each[len(some[other])].encode_several([some[other]])[0][1])


# The other commands


def test_the_references_of_every_count(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    done = shell(manifest.polygraphy, folder, torch=False)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    assert done.stdout.count("PASSED | Runtime") == len(COUNTS)
    for frames, graph, status in ((None, 8, 0), (4, 4, 0), (4, 8, 1)):
        script = keep_reference(folder, tmp_path / f"kept{frames}{graph}", frames)
        assert {p.name for p in script.parent.iterdir()} >= {COMPARE_FILE, f"reference_inputs.f{frames or 8}.json"}
        ran = shell(f"sh {script} {folder / f'vision.f{graph}.onnx'}", tmp_path, torch=False)
        assert bool(ran.returncode) == bool(status)


def test_drift_and_inspect_take_one_count(folder: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    for words, frames in (([], 8), (["--frames", "4"], 4)):
        assert verify.main([str(folder), "--layers", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["frames"] == frames
        assert drift.frames_for(folder, manifest.at(frames))[0].shape[0] == frames
    assert cli.run(verify.main, [str(folder), "--layers", "--frames", "5"]) == 2
    assert "takes 4 or 8 frames, not 5" in capsys.readouterr().err
    most, least = inspect.describe(folder), inspect.describe(folder, 4)
    assert (most["layers"]["source"], least["layers"]["source"]) == ("vision.f8.onnx", "vision.f4.onnx")
    assert most["layers"]["matrix_flops"] > least["layers"]["matrix_flops"]
    assert [row["frames"] for row in most["counts"]] == list(COUNTS)
    assert [t["shape"][0] for t in most["tensors"] if t["name"] == layout.FRAMES] == list(COUNTS)
    assert {check["frames"] for check in most["verification"]["checks"]} == set(COUNTS)
    assert inspect.main([str(folder), "--frames", "4"]) == 0
    shown = capsys.readouterr().out
    assert "frames: 4 -> " in shown
    assert "frames: 8 -> " in shown
    assert "layers (vision.f4.onnx)" in shown


def test_comparing_with_one_count_names_the_option(folder: Path, engine: Path) -> None:
    record = compare(inspect.describe(folder), inspect.describe(engine))
    assert any(row["field"] == "frame_counts" and row["set_by"] == "--frames" for row in record["key_parts"])


# The command line


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--frames", "4,8", "--schedule", "adaptive"], "takes one frame count, got 4,8: build with --schedule budget"),
        (["--frames", "4,8", "--frame-budget", "3,2,1"], "the frame budget 3,2,1 fits one frame count, got 4,8"),
        (["--frames", "4,8", "--frame-budget", "auto"], "gives a budget for one frame count"),
        (["--frames", "4,4"], "names a number twice"),
        (["--frames", "4,"], "give a whole number, or several such as 8,16,32"),
        (["--frames", "0,4"], "must be between 1 and 128, got 0"),
        (["--frames", "4,129"], "must be between 1 and 128, got 129"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(build.main, ["--backend", "onnx", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


def test_one_count_has_the_key_that_it_always_had(small_checkpoint: Path) -> None:
    one, both, other = (config_of(small_checkpoint, "--frames", text) for text in ("8", "8,4", "8,2"))
    assert "frame_counts" not in one.key_parts()
    assert len({config.key() for config in (one, both, other)}) == 3
    assert both.frame_counts == COUNTS
    assert one.frame_counts is None
    assert both.key() == config_of(small_checkpoint, "--frames", "4,8").key()
    assert [config.stages for config in both.each] == [frames_per_stage(frames, merges=2) for frames in COUNTS]
    with pytest.raises(UserError, match="ascending"):
        replace(both, frame_counts=(8, 4))


def test_the_plan_shows_every_count(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.main(["--model", str(small_checkpoint), *WORDS, "--dry-run"])
    out = capsys.readouterr().out
    for frames in COUNTS:
        assert f"of {frames} frames" in out
        assert f"cost of a clip of {frames} frames" in out
    record = json.loads(out.splitlines()[-1])
    assert [row["frames"] for row in record["counts"]] == list(COUNTS)
    assert [row["tokens"] for row in record["counts"]] == [token_count(n, 25, 0.3, merges=2) for n in COUNTS]
    assert record["tokens"] == record["counts"][-1]["tokens"]


def test_the_folder_is_found_again(folder: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.main(["--model", str(small_checkpoint), *WORDS, "--out", str(folder.parent), "--json"])
    assert json.loads(capsys.readouterr().out)["cached"] is True


def test_every_count_gets_an_engine_and_a_layer_list_of_its_own(
    folder: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that only tells what it was asked for."""
    asked: list[tuple[str, ...]] = []
    shares: list[float] = []

    def compiler(graph: Path, engine: Path, **options: Any) -> CompileReport:
        asked.append((graph.name, engine.name, options["layers_path"].name))
        shares.append(options["expected_share"])
        words = {"flavour": "tensorrt-rtx", "version": "1", "target": "8.0", "dtype": "fp16"}
        return CompileReport(
            **words,
            hardware_compatible=False,
            engine_bytes=1,
            peak_rss_bytes=1,
            seconds={},
            warnings=(),
            layers=summarise(()),
            plugins=(PLUGIN,),
        )

    monkeypatch.setattr(stages, "compile_engine", compiler)
    config = replace(config_of(Path(manifest.model.source)), backend="tensorrt-rtx")
    graphs = [ExportedGraph(folder / one.file(layout.ONNX_FILE), ()) for one in config.each]
    screen = cli.Screen(json_only=True)
    reports = stages.compile_graphs(config, graphs, tmp_path, None, screen)
    assert asked == [(f"vision.f{n}.onnx", f"vision.f{n}.engine", f"layers.f{n}.json") for n in COUNTS]
    assert shares == [one.half_share for one in config.each]
    assert shares[0] != shares[1]
    write_report(tmp_path / layout.REPORT_FILE, StagesDone(config, reports, {}, {}), {})
    written = json.loads((tmp_path / layout.REPORT_FILE).read_text())
    assert [one["frames"] for one in written["compile"]] == list(COUNTS)
    assert [one["plugins"] for one in written["compile"]] == [
        [{**msgspec.structs.asdict(PLUGIN), "grid": [1, 1, 1]}]
    ] * 2


@needs_rtx
def test_every_count_compiles_from_the_shared_weights(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    config = config_of(Path(manifest.model.source))
    for one in config.each:
        report = compile_engine(
            folder / one.file(layout.ONNX_FILE),
            tmp_path / one.file(layout.ENGINE_FILE),
            flavour="tensorrt-rtx",
            dtype="fp16",
            expected_share=one.half_share,
            layers_path=tmp_path / one.file(layout.LAYERS_FILE),
        )
        assert report.engine_bytes > 0.9 * manifest.files[layout.DATA_FILE].bytes  # an engine holds its own
    files = describe_files(tmp_path)
    assert set(files) == names(layout.ENGINE_FILE, layout.LAYERS_FILE)
