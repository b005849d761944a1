"""Several videos in one graph: what each gets is what it would get alone, and the gate sees a graph that mixes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor

from builder import build, inspect, verify
from builder.compile.engine import compile_engine
from builder.export import functions
from builder.gate import accuracy
from builder.gate.batches import fill, split, stack
from builder.gate.limits import GATES
from builder.gate.report import Report
from builder.settings.arguments import parse
from builder.settings.options import MAX_BATCH
from earlytom.errors import UserError
from runtime import ask, cli
from runtime.checkpoint import describe
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.vision import encode_one, open_backend
from runtime.vision.torch import TorchVision, open_torch
from runtime.vision.whole import Whole
from tests.builder.conftest import FRAMES, Exported
from tests.builder.gate.shell import shell
from tests.builder.needed import needs_rtx
from tests.runtime.vision.opened import open_whole

B = 3
BATCH = ("--ratio", "0.3", "--batch", str(B))
SINGLE = ("--ratio", "0.3")
ALIEN = "similarities, own video over others: error"
Make = Callable[..., Exported]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # products over other numbers of rows round otherwise


@pytest.fixture(scope="module")
def several(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole batch, made of two drawn clips."""
    return fill(clips, B)


@pytest.fixture(scope="module")
def together(exported: Make) -> Whole:
    return open_whole(exported(*BATCH, "--fp32").path, batch=3)


@pytest.fixture(scope="module")
def alone(exported: Make) -> Whole:
    return open_whole(exported(*SINGLE, "--fp32").path)


# The clips


def test_whole_batches_are_filled_with_clips_that_differ(clips: dict[str, Tensor]) -> None:
    for batch in (1, 2, 3, 5, 9):
        filled = fill(clips, batch)
        assert len(filled) % batch == 0
        assert len(filled) - len(clips) < batch
        assert list(filled)[: len(clips)] == list(clips)
        frames = list(filled.values())
        assert all(torch.equal(a, b) for a, b in zip(frames, clips.values(), strict=False))
        assert not any(torch.equal(a, b) for n, a in enumerate(frames) for b in frames[:n])
    names = list(fill({"clip": clips["drawn0.mp4"]}, 4))
    assert names == ["clip", "clip, reversed in time", "clip, mirrored", "clip, reversed and mirrored"]
    assert torch.equal(fill({"clip": clips["drawn0.mp4"]}, 2)[names[1]], clips["drawn0.mp4"].flip(0))


def test_a_clip_of_one_colour_fills_no_batch() -> None:
    plain = {"plain": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}
    assert list(fill(plain, 1)) == ["plain"]
    with pytest.raises(UserError, match=r"give 1 that differ, and whole batches of 2 need 2: .*--calibration.*--batch"):
        fill(plain, 2)


def test_what_is_stacked_comes_apart_again() -> None:
    each = [np.full((4, 2), n) for n in range(4)]
    first, second = stack(each, 2)
    assert first.shape == second.shape == (2, 4, 2)
    values = {"tokens": first, "weights_1": first, "hidden_1": first.reshape(8, 2), "features": first.reshape(8, 2)}
    for n, one in enumerate(split(values, 2)):
        assert all(np.array_equal(value, each[n]) for value in one.values())


# The graph


def test_every_video_is_encoded_as_if_it_were_alone(several: dict[str, Tensor], together: Whole, alone: Whole) -> None:
    clips = list(several.values())
    assert (together.batch, together.shape) == (B, (B, FRAMES, 3, 72, 72))
    assert (alone.batch, alone.shape) == (1, (FRAMES, 3, 72, 72))
    wanted = [tuple(value.clone() for value in alone.encode(clip)) for clip in clips]
    assert not torch.equal(wanted[0][1], wanted[1][1])  # they do not decide alike
    for order in ((0, 1, 2), (2, 0, 1)):
        tokens, positions, *_ = together.encode(torch.stack([clips[n] for n in order]))
        for place, n in enumerate(order):
            assert torch.equal(positions[place], wanted[n][1])
            assert torch.allclose(tokens[place], wanted[n][0], **CLOSE)
    assert not torch.allclose(tokens[1], wanted[1][0], **CLOSE)  # negative control


def test_fewer_clips_than_the_batch(several: dict[str, Tensor], together: Whole, alone: Whole) -> None:
    clips = list(several.values())
    for count in range(1, B + 1):
        found = [
            (tokens.clone(), positions.clone()) for tokens, positions, *_ in together.encode_several(clips[:count])
        ]
        assert len(found) == count
        for clip, (tokens, positions) in zip(clips, found, strict=False):
            wanted = alone.encode(clip)
            assert torch.equal(positions, wanted[1])
            assert torch.allclose(tokens, wanted[0], **CLOSE)
    assert torch.equal(encode_one(together, clips[1])[1], alone.encode(clips[1])[1])
    assert torch.equal(encode_one(alone, clips[1])[1], alone.encode_several([clips[1]])[0][1])
    for wrong in ([], clips + clips[:1]):
        with pytest.raises(EngineError, match=rf"takes 1 to {B} clips at once, got {len(wrong)}"):
            together.encode_several(wrong)
    with pytest.raises(EngineError, match=rf"\[{FRAMES}, 3, 72, 72\] \[F, 3, H, W\], got"):
        together.encode_several([clips[0][:-1]])
    with pytest.raises(EngineError, match=rf"\[B, F, 3, H, W\], got .*sample {FRAMES} frames of each of {B} videos"):
        together.encode(clips[0])


def test_results_of_several_are_the_backend_s_own_memory(several: dict[str, Tensor], together: Whole) -> None:
    clips = list(several.values())
    first = together.encode_several(clips)
    again = together.encode_several(clips[:1])
    assert again[0][0].data_ptr() == first[0][0].data_ptr() != first[1][0].data_ptr()


def test_the_pytorch_backend_agrees(several: dict[str, Tensor], exported: Make, together: Whole) -> None:
    config = exported(*BATCH, "--fp32").config
    device = {"device": torch.device("cpu"), "dtype": torch.float32}
    vision = TorchVision(config.checkpoint, config.earlytom, together.shape, **device)  # type: ignore[arg-type]
    assert vision.batch == B
    clips = list(several.values())
    tokens, positions, *_ = vision.encode(torch.stack(clips))
    assert torch.equal(positions, together.encode(torch.stack(clips))[1])
    assert torch.allclose(tokens, together.encode(torch.stack(clips))[0], **CLOSE)
    for count in (1, 2):
        for n, (some, where, *_) in enumerate(vision.encode_several(clips[:count])):
            assert torch.equal(where, positions[n])
            assert torch.allclose(some, tokens[n], **CLOSE)
    adaptive = config.earlytom.replace(schedule="adaptive")
    with pytest.raises(UserError, match="must be budget, not adaptive"):
        TorchVision(config.checkpoint, adaptive, together.shape, **device)  # type: ignore[arg-type]


# The gate


def run_gate(made: Exported, several: dict[str, Tensor], path: Path, edit: Callable[[onnx.ModelProto], None]) -> Any:
    model = onnx.load(str(made.path))
    edit(model)
    onnx.save(model, str(path))
    return accuracy.verify(path, made.reference, several, made.config.dtype, batch=B)[0]


def failed(report: Report) -> set[str]:
    return {check.what for check in report.checks if not check.passed}


def calls(model: onnx.ModelProto, function: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == function]


def first_video_s_plans(model: onnx.ModelProto) -> None:
    """Every video gets the plans of the first."""
    other = {}
    for place, call in enumerate(plans := calls(model, functions.FRAME_PLAN)):
        other |= dict(zip(call.output, plans[place - place % B].output, strict=True))
    for node in model.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def first_video_s_similarities(model: onnx.ModelProto) -> None:
    """Every video compares the frames of the first, at the first merge, and decides rightly from what it sees."""
    for node in model.graph.node:
        if "similarity_1" in node.output:
            node.output[0] = "each_similarity"
    model.graph.initializer.append(helper.make_tensor("first", onnx.TensorProto.INT64, [B], [0] * B))
    place = next(n for n, node in enumerate(model.graph.node) if "each_similarity" in node.output)
    model.graph.node.insert(
        place + 1, helper.make_node("Gather", ["each_similarity", "first"], ["similarity_1"], axis=0)
    )


def second_video_s_relevance(model: onnx.ModelProto) -> None:
    """The first video's tokens are chosen by the second's received attention."""
    chosen = calls(model, functions.SELECT_TOKENS)
    chosen[0].input[1] = chosen[1].input[1]


def second_video_s_frames(model: onnx.ModelProto) -> None:
    """The first two videos change places."""
    model.graph.initializer.append(helper.make_tensor("order", onnx.TensorProto.INT64, [B], [1, 0, 2]))
    for node in model.graph.node:
        node.input[:] = ["swapped" if name == layout.FRAMES else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Gather", [layout.FRAMES, "order"], ["swapped"], axis=0))


@pytest.mark.parametrize(
    ("edit", "what", "dtype"),
    [
        (first_video_s_plans, "frame plans repeated: largest difference", "fp32"),
        (first_video_s_similarities, ALIEN, "fp16"),
        (second_video_s_relevance, "token choices repeated: share that is equal", "fp32"),
        (second_video_s_frames, "tokens: largest error", "fp16"),
    ],
)
def test_a_graph_that_mixes_videos_fails(
    exported: Make, several: dict[str, Tensor], tmp_path: Path, edit: Any, what: str, dtype: str
) -> None:
    report = run_gate(exported(*BATCH, f"--{dtype}"), several, tmp_path / layout.ONNX_FILE, edit)
    assert what in failed(report)
    with pytest.raises(UserError, match="does not reproduce the model"):
        report.require()
    assert [path.name for path in tmp_path.iterdir()] == [layout.ONNX_FILE]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_graph_that_does_not_passes(exported: Make, several: dict[str, Tensor], tmp_path: Path, dtype: str) -> None:
    """As it is, and on six clips, which are two runs of it."""
    made = exported(*BATCH, f"--{dtype}")
    report = run_gate(made, several, tmp_path / layout.ONNX_FILE, lambda model: None)
    assert not failed(report)
    assert report.clips == tuple(several)
    found = {check.what: check.value for check in report.checks}
    assert found[ALIEN] < 0.1
    more = fill(several, 2 * B)
    assert accuracy.verify(made.path, made.reference, more, dtype, batch=B)[0].passed


def test_what_the_gate_measures_is_what_it_measures_of_each_alone(exported: Make, several: dict[str, Tensor]) -> None:
    made, single = exported(*BATCH, "--fp16"), exported(*SINGLE, "--fp16")
    batched, _ = accuracy.verify(made.path, made.reference, several, "fp16", batch=B)
    alone, _ = accuracy.verify(single.path, single.reference, several, "fp16")
    values = {check.what: check.value for check in alone.checks}
    assert {check.what for check in batched.checks} == {*values, ALIEN}
    for check in batched.checks:
        if check.what != ALIEN:
            assert check.value == pytest.approx(values[check.what], rel=0.05, abs=1e-6), check.what


# The command


def test_what_cannot_be_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in (
        (["--batch", "2", "--schedule", "adaptive"], "--batch 2 needs equal numbers: build with --schedule budget"),
        (["--batch", "0"], f"between 1 and {MAX_BATCH}, got 0: set --batch"),
        (["--batch", "two"], "two"),
    ):
        assert cli.run(build.main, ["--backend", "onnx", "--dry-run", *words]) == 2
        error = capsys.readouterr().err
        assert what in error
        assert error.count("\n") == 1


def test_one_video_at_once_has_the_key_that_it_always_had(build_arguments: list[str]) -> None:
    usual, one, two = (parse([*build_arguments, *words])[1] for words in ([], ["--batch", "1"], ["--batch", "2"]))
    assert "batch" not in usual.key_parts()
    assert usual.key() == one.key() != two.key()
    assert "-b2-" in two.name(two.key())
    assert two.expected_bytes["input"] == 2 * usual.expected_bytes["input"]
    assert two.flops == usual.flops  # of one clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, build_arguments: list[str]) -> Path:
    """An engine for two videos, as the command builds it."""
    out = tmp_path_factory.mktemp("engines")
    assert build.main([*build_arguments, "--batch", "2", "--out", str(out), "--no-verify-text"]) == 0
    (made,) = out.iterdir()
    return made


def test_the_folder_says_how_many_videos(folder: Path, engine: Path) -> None:
    manifest, single = Manifest.read(folder), Manifest.read(engine)
    assert (manifest.batch, single.batch) == (2, 1)
    assert manifest.to_dict()["batch"] == 2
    assert "batch" not in single.to_dict()
    assert manifest.verification is not None
    assert manifest.verification["clips"] == ["drawn clip", "drawn clip, reversed in time"]
    assert (manifest.tokens, manifest.frames_per_stage) == (single.tokens, single.frames_per_stage)
    shapes = [tensor["shape"] for tensor in inspect.describe(folder)["tensors"]]
    tokens, left = manifest.tokens, manifest.frames_per_stage[-1]
    expected = [[FRAMES, 3, 72, 72], [tokens, 256], [tokens], [left, FRAMES], [tokens], [tokens]]
    assert shapes == [[2, *shape] for shape in expected]
    vision = open_backend("auto", folder, manifest)
    assert vision.batch == 2


def test_the_engine_runs_in_pytorch_too(folder: Path, several: dict[str, Tensor]) -> None:
    manifest = Manifest.read(folder)
    reference = open_torch(describe(manifest.model.source), manifest, device=torch.device("cpu"), dtype=torch.float32)
    clip = next(iter(several.values()))
    wanted, found = encode_one(reference, clip), encode_one(open_backend("onnxruntime", folder, manifest), clip)
    assert wanted[0].shape == found[0].shape == (manifest.tokens, 256)
    assert torch.equal(wanted[1], found[1])
    assert torch.allclose(wanted[0], found[0].float(), atol=0.05)


def test_a_question_is_answered_by_an_engine_for_several_videos(
    folder: Path, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for backend in ("onnxruntime", "torch"):
        words = [str(videos[0]), "What happens?", "--engine", str(folder), "--max-new-tokens", "2", "--json"]
        assert cli.run(ask.main, [*words, "--backend", backend, "--device", "cpu"]) == 0
        record = json.loads(capsys.readouterr().out)
        answers.append((record["answer"], record["visual_tokens"]))
    assert answers[0] == answers[1]
    assert answers[0][1] == Manifest.read(folder).tokens


def test_polygraphy_and_the_drift_table_take_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Manifest.read(folder).polygraphy
    assert shell(line, folder, torch=False).returncode == 0
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in folder.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(spoiled / layout.ONNX_FILE))
    positions = next(node for node in model.graph.node if layout.POSITIONS in node.output)
    positions.input[:] = [positions.input[1], positions.input[0]]  # the two videos change places
    onnx.save(model, str(spoiled / layout.ONNX_FILE))
    assert shell(line, spoiled, torch=False).returncode != 0

    capsys.readouterr()
    assert verify.main([str(folder), "--layers", "--json"]) == 0
    taps = json.loads(capsys.readouterr().out)["taps"]
    assert {tap["tap"] for tap in taps} >= {f"hidden_{n}" for n in range(4)} | {"tokens"}
    assert all(tap["cosine"] > GATES["fp16"].cosine for tap in taps)


@needs_rtx
def test_a_batched_graph_compiles(exported: Make, tmp_path: Path) -> None:
    made = exported(*BATCH, "--fp16")
    report = compile_engine(
        made.path,
        tmp_path / layout.ENGINE_FILE,
        flavour="tensorrt-rtx",
        dtype="fp16",
        expected_share=made.config.half_share,
    )
    assert len(report.layers.attention_fused) == 3  # all but the explicit one
    assert not report.layers.attention_unfused
    flops = made.config.flops["vision"]
    assert report.layers.matrix_flops == pytest.approx(B * flops, rel=0.05)
