"""The budget schedule as two graphs, for clips in chunks: the graphs, the gate, the command, the compiler."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from builder import build, inspect, stages, verify
from builder.compile.engine import compile_engine
from builder.export.chunks import export_chunks
from builder.export.vision import VisionGraph, vision_graph
from builder.gate import accuracy
from builder.gate.runs import run_stages
from builder.inspection.layers import graph_layers
from builder.precision.islands import Costs
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.methods.earlytom import EarlyTom
from runtime import ask, cli
from runtime.engine import layout
from runtime.engine.layout import Layout, Sizes
from runtime.engine.manifest import Manifest
from runtime.vision.open import open_onnxruntime
from tests.builder.conftest import FRAMES, TAU, Exported, reference_of
from tests.builder.needed import needs_rtx
from tests.earlytom.tiny import PATCH, tiny_projector, tiny_tower

CHUNK = 4
FILES = [layout.stage_file(layout.ONNX_FILE, stage) for stage in range(2)]
MERGES = {"usual": "1,2", "one merge": "2", "none": "none", "first layer": "0,1"}


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The two graphs, and the same vision part in fp32 in PyTorch."""

    config: BuildConfig
    folder: Path
    reference: VisionGraph

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in FILES]


@pytest.fixture(scope="module")
def chunked_of(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Callable[..., Chunked]:
    """`chunked_of("--fp16")`: those graphs of the small checkpoint; equal arguments share one export."""
    made: dict[tuple[str, ...], Chunked] = {}

    def export(*arguments: str) -> Chunked:
        if arguments not in made:
            words = ["--model", str(small_checkpoint), "--frames", str(FRAMES), "--tau", TAU, "--backend", "onnx"]
            _, config, _ = parse([*words, "--ratio", "0.3", "--chunk", str(CHUNK), *arguments])
            folder = tmp_path_factory.mktemp("chunked")
            stages.export_graphs(config, folder)
            made[arguments] = Chunked(config, folder, vision_graph(config, torch.float32))
        return made[arguments]

    return export


@pytest.fixture(scope="module")
def chunked(chunked_of: Callable[..., Chunked]) -> Chunked:
    return chunked_of("--fp32")


# The graphs


@pytest.mark.parametrize("merges", MERGES)
def test_tokens_and_positions_are_those_of_pytorch(
    chunked_of: Callable[..., Chunked], clips: dict[str, Tensor], merges: str
) -> None:
    made = chunked_of("--fp32", *([] if merges == "usual" else ["--merge-layers", MERGES[merges]]))
    vision = open_onnxruntime(made.folder, made.config.layout)
    seen = []
    for frames in clips.values():
        wanted = reference_of(made.reference, frames)
        tokens, positions, *_ = vision.encode(frames)
        assert torch.equal(positions, wanted.positions)
        torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)
        seen.append(tokens.clone())
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


def test_they_say_what_one_graph_says(
    exported: Callable[..., Exported], chunked: Chunked, clips: dict[str, Tensor]
) -> None:
    session = onnxruntime.InferenceSession(exported("--fp32", "--ratio", "0.3").path)
    for frames in clips.values():
        wanted = session.run(list(layout.OUTPUTS), {layout.FRAMES: frames.numpy()})
        found = open_onnxruntime(chunked.folder, chunked.config.layout).encode(frames)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("merges", MERGES)
def test_inputs_and_outputs_are_those_of_the_layout(chunked_of: Callable[..., Chunked], merges: str) -> None:
    made = chunked_of("--fp32", *([] if merges == "usual" else ["--merge-layers", MERGES[merges]]))
    received = merges in ("one merge", "none")
    for stage, path in enumerate(made.paths):
        graph = onnx.load(path).graph
        part = made.config.layout.graphs[stage]
        inputs, outputs = (tuple(t.name for t in tensors) for tensors in (part.inputs, part.outputs))
        assert (layout.RECEIVED in part.names) == received
        assert tuple(value.name for value in graph.input) == inputs
        assert {value.name for value in graph.output} == set(outputs)
        sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
        rows = FRAMES if stage else CHUNK
        expected = {"frames": [CHUNK, 3, 72, 72], "hidden": [rows, 81, 128], "received": [rows, 81]}
        width = made.config.model.text_config.hidden_size
        tokens = made.config.tokens
        expected |= {"tokens": [tokens, width], "positions": [tokens], "place": [tokens], "bias": [tokens]}
        expected |= {"sources": [made.config.stages[-1], FRAMES]}
        assert sizes == {name: expected[name] for name in (*inputs, *outputs)}
        assert not {"NonZero", "If", "Loop"} & {node.op_type for node in graph.node}


def test_each_weight_is_in_one_graph(chunked: Chunked) -> None:
    """The graphs' weights add up to the vision part's, but for norms that do not run and constants."""
    parameters = sum(p.numel() for p in chunked.reference.parameters())
    assert sum(map(_weights, chunked.paths)) == pytest.approx(parameters, rel=0.01)
    layers = [tensor for path in chunked.paths for tensor in _matrices(path)]
    assert len(layers) == len(set(layers)) > 4 * 6
    assert all(_matrices(path) for path in chunked.paths)


def _weights(path: Path) -> int:
    tensors = onnx.load(path).graph.initializer
    return sum(int(np.prod(t.dims)) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)


def _matrices(path: Path) -> list[bytes]:
    tensors = (t for t in onnx.load(path).graph.initializer if len(t.dims) == 2 and int(np.prod(t.dims)) > 1000)
    return [numpy_helper.to_array(tensor).tobytes() for tensor in tensors]


@pytest.mark.parametrize(
    ("family", "frames", "chunk", "layers"), [("clip", 6, 2, (0,)), ("siglip", 1, 1, (3,)), ("dinov2", 6, 6, ())]
)
def test_other_towers_one_frame_and_other_cuts(
    family: str, frames: int, chunk: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    config = EarlyTomConfig(merge_layers=layers, retention_ratio=0.4, tau=0.5, schedule="budget")
    normal: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)}
    graph = VisionGraph(tiny_tower(family), tiny_projector(), config, **normal)
    export_chunks(graph, frames, chunk, (5 * PATCH, 5 * PATCH), tmp_path)
    shape = (frames, 3, 5 * PATCH, 5 * PATCH)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wanted = reference_of(graph, noise)
    made = Layout(config, frames, chunk=chunk, sizes=Sizes(tokens_per_frame=9))
    tokens, positions, *_ = open_onnxruntime(tmp_path, made).encode(noise)
    assert torch.equal(positions, wanted.positions)
    torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)


def test_the_adaptive_schedule_is_not_cut_so(tmp_path: Path) -> None:
    config = EarlyTomConfig(merge_layers=(1,), retention_ratio=0.4, schedule="adaptive")
    graph = VisionGraph(tiny_tower("siglip"), tiny_projector(), config, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UserError, match="--schedule budget, not adaptive"):
        export_chunks(graph, 4, 2, (20, 20), tmp_path)
    assert not list(tmp_path.iterdir())


# The gate


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_gate_passes(chunked_of: Callable[..., Chunked], clips: dict[str, Tensor], dtype: str) -> None:
    made = chunked_of(f"--{dtype}")
    report, wanted = accuracy.verify(made.paths, made.reference, clips, dtype)
    report.require()
    assert len(wanted[0][1]) == len(clips)
    assert sorted(path.name for path in made.folder.iterdir()) == FILES  # no temporary graph stays
    assert {check.what for check in report.checks if check.step == "hidden"} >= {
        f"hidden_{layer}: cosine" for layer in (1, 2)
    }


def changed(made: Chunked, place: Path, stage: int, change: Callable[[onnx.GraphProto], None]) -> list[Path]:
    """A copy of the graphs, one of them changed."""
    shutil.copytree(made.folder, place)
    path = place / FILES[stage]
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return [place / name for name in FILES]


def first_for_all(graph: onnx.GraphProto) -> None:
    """Every frame of a chunk is encoded as its first one."""
    for node in graph.node:
        node.input[:] = ["chosen" if name == layout.FRAMES else name for name in node.input]
    graph.initializer.append(numpy_helper.from_array(np.zeros(CHUNK, np.int64), "places"))
    graph.node.insert(0, helper.make_node("Gather", [layout.FRAMES, "places"], ["chosen"], axis=0))


def mixed_up(graph: onnx.GraphProto) -> None:
    """The rest takes the frames in another order."""
    for node in graph.node:
        node.input[:] = ["chosen" if name == layout.HIDDEN else name for name in node.input]
    order = np.roll(np.arange(FRAMES), CHUNK).astype(np.int64)
    graph.initializer.append(numpy_helper.from_array(order, "places"))
    graph.node.insert(0, helper.make_node("Gather", [layout.HIDDEN, "places"], ["chosen"], axis=0))


@pytest.mark.parametrize(("stage", "change"), [(0, first_for_all), (1, mixed_up)])
def test_the_gate_notices(
    chunked: Chunked, clips: dict[str, Tensor], tmp_path: Path, stage: int, change: Callable[[onnx.GraphProto], None]
) -> None:
    paths = changed(chunked, tmp_path / "changed", stage, change)
    report, _ = accuracy.verify(paths, chunked.reference, clips, "fp32")
    with pytest.raises(UserError, match="does not reproduce the model"):
        report.require()


def test_values_are_named_and_joined(chunked: Chunked, clips: dict[str, Tensor]) -> None:
    feeds = [{layout.FRAMES: frames.numpy()} for frames in clips.values()]
    chunked.reference.every_layer = True
    chunked.reference.decisions = EarlyTom(chunked.config.earlytom)  # its own, not those that the gate forced on it
    try:
        names = chunked.reference.trace_names
        results = run_stages(chunked.paths, names, feeds, rounded=False)
        for result, feed in zip(results, feeds, strict=True):
            wanted = chunked.reference(torch.from_numpy(feed[layout.FRAMES]))
            assert set(result) == set(wanted)
            for name in names:
                np.testing.assert_allclose(np.asarray(result[name]), wanted[name], rtol=0, atol=1e-3, err_msg=name)
    finally:
        chunked.reference.every_layer = False
    with pytest.raises(UserError, match=r"no graph of .* has a value named hidden_99"):
        run_stages(chunked.paths, ["hidden_99"], feeds, rounded=False)


# What is asked for


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--chunk 5", r"--chunk 5 does not divide the 12 frames of a clip: give one of 1, 2, 3, 4, 6, 12$"),
        ("--chunk 0", r"--chunk 0 does not divide .* give one of 1, 2"),
        ("--chunk -4", r"--chunk -4 does not divide"),
        ("--chunk 24", r"--chunk 24 does not divide"),
        ("--chunk 4 --schedule adaptive", "build with --schedule budget, not adaptive"),
        ("--chunk 4 --batch 2", "--chunk 4 is for one video of one frame count at a time, got --batch 2"),
        ("--chunk 4 --frames 4,12", "got --frames 4,12"),
    ],
)
def test_what_does_not_go_together_is_one_line(small_checkpoint: Path, words: str, line: str) -> None:
    frames = [] if "--frames" in words else ["--frames", str(FRAMES)]
    with pytest.raises(UserError, match=line) as caught:
        parse(["--model", str(small_checkpoint), "--backend", "onnx", *frames, *words.split()])
    assert "\n" not in str(caught.value)


def test_the_key_has_it_only_where_it_is_asked_for(chunked: Chunked) -> None:
    whole = dataclasses.replace(chunked.config, chunk=None)
    assert "chunk" not in whole.key_parts()
    assert chunked.config.key_parts() == whole.key_parts() | {"chunk": CHUNK}
    keys = {config.key() for config in (whole, chunked.config, dataclasses.replace(chunked.config, chunk=6))}
    assert len(keys) == 3
    assert f"-f{FRAMES}-c{CHUNK}-" in chunked.config.name("0" * 64)
    assert f"-f{FRAMES}-0" in whole.name("0" * 64)


@pytest.mark.parametrize("words", ["default", "none", "default,residual,mlp:0-1", "embeddings,logits,attention:2"])
def test_half_shares_of_the_two_are_that_of_the_whole(chunked_of: Callable[..., Chunked], words: str) -> None:
    for merges in ("1,2", "3", "none"):
        source = chunked_of("--fp32").config.checkpoint.source
        options = f"--frames 12 --chunk 4 --islands {words} --merge-layers {merges} --backend onnx".split()
        _, config, _ = parse(["--model", source, *options])
        head, rest = config.stage_half_shares
        costs = Costs(config)
        span = range((1, 3, 3)[("1,2", "3", "none").index(merges)] + 1)
        of_head = costs.of("embeddings").products + sum(
            getattr(costs, f"_{name}")(layer).products for name in ("mlp", "attention") for layer in span
        )
        both = head * of_head + rest * (costs.products - of_head)
        assert both / costs.products == pytest.approx(config.half_share)
        assert 0 <= head <= 1
        assert 0 <= rest <= 1


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """An engine folder, as the command builds it."""
    out = tmp_path_factory.mktemp("engines")
    assert build.main([*words_for(small_checkpoint), "--out", str(out)]) == 0
    (made,) = out.iterdir()
    return made


def words_for(small_checkpoint: Path) -> list[str]:
    words = f"--frames {FRAMES} --ratio 0.3 --tau {TAU} --fp32 --backend onnx --chunk {CHUNK}".split()
    return ["--model", str(small_checkpoint), *words]


def test_the_command_builds_one_folder_with_one_manifest(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.chunk == CHUNK
    assert manifest.in_stages
    assert not manifest.adaptive
    assert manifest.stage_files(layout.ONNX_FILE) == tuple(FILES)
    assert set(FILES) <= manifest.files.keys()
    assert layout.ONNX_FILE not in manifest.files
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert {"hidden", "decisions", "tokens"} <= set(manifest.verification["steps"])
    assert manifest.polygraphy == ""


def test_a_dry_run_and_a_second_run(
    folder: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([*words_for(small_checkpoint), "--dry-run", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "frames come in chunks of 4, on which the layers up to layer 1 run" in shown
    assert json.loads(shown.splitlines()[-1])["chunk"] == CHUNK
    assert not list(tmp_path.iterdir())
    assert build.main([*words_for(small_checkpoint), "--json", "--out", str(folder.parent)]) == 0
    assert json.loads(capsys.readouterr().out)["cached"]


def test_other_commands_take_the_folder(
    folder: Path, videos: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = set()
    for backend in ("auto", "torch"):
        words = [str(videos[0]), "What happens?", "--engine", str(folder), "--max-new-tokens", "2", "--json"]
        assert cli.run(ask.main, [*words, "--backend", backend, "--device", "cpu"]) == 0
        answers.add(json.loads(capsys.readouterr().out)["answer"])
    assert len(answers) == 1
    assert inspect.main([str(folder)]) == 0
    assert "the graphs of 2 stages" in capsys.readouterr().out
    assert verify.main([str(folder), "--layers", "--json"]) == 0
    assert {tap["tap"] for tap in json.loads(capsys.readouterr().out)["taps"]} >= {f"hidden_{n}" for n in range(4)}
    assert cli.run(verify.main, [str(folder), "--polygraphy", str(tmp_path / "reference")]) == 2
    assert "build without --chunk" in capsys.readouterr().err


def test_layers_add_up_to_a_whole_clip(folder: Path, exported: Callable[..., Exported]) -> None:
    """Flops of a clip, not of a chunk: those of the single graph."""
    record = inspect.describe(folder)["layers"]
    whole = graph_layers(exported("--fp32", "--ratio", "0.3").path)
    for name in ("matrix_flops", "attention_fused"):
        assert record[name] == whole[name]
    assert record["weight_bytes"] == pytest.approx(whole["weight_bytes"], rel=0.01)


# The compiler


@needs_rtx
@pytest.mark.parametrize(("dtype", "merges"), [("fp16", "usual"), ("fp16", "one merge"), ("fp32", "none")])
def test_both_compile(chunked_of: Callable[..., Chunked], tmp_path: Path, dtype: str, merges: str) -> None:
    made = chunked_of(f"--{dtype}", *([] if merges == "usual" else ["--merge-layers", MERGES[merges]]))
    for stage, path in enumerate(made.paths):
        report = compile_engine(
            path,
            tmp_path / layout.stage_file(layout.ENGINE_FILE, stage),
            flavour="tensorrt-rtx",
            dtype=dtype,
            expected_share=made.config.stage_half_shares[stage] if dtype == "fp16" else 1.0,
            layers_path=tmp_path / layout.stage_file(layout.LAYERS_FILE, stage),
        )
        assert report.engine_bytes > 100_000
        assert not (report.layers.attention_unfused and dtype == "fp16")
