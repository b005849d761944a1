"""The adaptive schedule as a chain: the graphs, what is measured for them, the gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from builder.clips import FramesKept, frames_kept
from builder.export.chain import export_chain
from builder.export.vision import VisionGraph, vision_graph
from builder.gate import accuracy
from builder.precision.islands import Islands
from earlytom.config import EarlyTomConfig
from earlytom.encoder import run_span
from earlytom.errors import UserError
from earlytom.methods.earlytom import EarlyTom
from runtime.engine import layout
from runtime.engine.layout import Layout, Sizes
from runtime.vision.adaptive import Adaptive
from runtime.vision.open import open_onnxruntime
from tests.builder.conftest import FRAMES, Chain, reference_of
from tests.earlytom.tiny import PATCH, tiny_projector, tiny_tower

MERGES = (1, 2)  # of the small checkpoint's four layers
STAGES = [layout.stage_file(layout.ONNX_FILE, stage) for stage in range(len(MERGES) + 1)]
THRESHOLD = 0.05
CELLS = ("--method", "cells", "--threshold", str(THRESHOLD))  # the other method that has stages


def videos_of(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drawn clips, one frame repeated, cuts between frames of them, and noise, of which nothing can be merged."""
    first, second = list(clips.values())[:2]
    generator = torch.Generator().manual_seed(0)
    return {
        **clips,
        "still": first[:1].repeat(FRAMES, 1, 1, 1),
        "scenes": torch.cat([first[:1].repeat(6, 1, 1, 1), second[-1:].repeat(FRAMES - 6, 1, 1, 1)]),
        "noise": torch.randint(0, 256, first.shape, generator=generator, dtype=torch.uint8),
    }


# The graphs


def test_counts_positions_and_tokens_are_those_of_pytorch(chain: Chain, clips: dict[str, Tensor]) -> None:
    vision = open_onnxruntime(chain.folder, chain.config.layout)
    assert isinstance(vision, Adaptive)
    counts = {}
    for name, frames in videos_of(clips).items():
        wanted = chain.encode(frames)
        tokens, positions, sources, place, bias = vision.encode(frames)
        assert vision.frames_per_stage == wanted.frames_per_stage
        assert torch.equal(positions, wanted.positions)
        torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(sources, wanted.sources, rtol=0, atol=1e-5)
        assert torch.equal(place, wanted.place)
        assert torch.isclose(bias, wanted.bias).float().mean() > 0.98  # but for tokens as much alike to two
        counts[name] = (*vision.frames_per_stage, len(tokens))
    assert len(set(counts.values())) >= 4  # they depend on the video
    assert counts["still"][2] < FRAMES


def test_each_weight_is_in_one_graph(chain: Chain) -> None:
    """The graphs' weights add up to the vision part's, but for norms that do not run and constants."""
    parameters = sum(p.numel() for p in chain.reference.parameters())
    stages = [sum(_size(tensor) for tensor in onnx.load(path).graph.initializer) for path in chain.paths]
    assert sum(stages) == pytest.approx(parameters, rel=0.01)
    layers = [tensor for path in chain.paths for tensor in _matrices(path)]
    assert len(layers) == len(set(layers)) > 4 * 6  # no matrix twice, and those of every layer are there


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) if tensor.data_type == onnx.TensorProto.FLOAT else 0


def _matrices(path: Path) -> list[bytes]:
    tensors = (tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2 and _size(tensor) > 1000)
    return [numpy_helper.to_array(tensor).tobytes() for tensor in tensors]


def test_inputs_and_outputs_are_those_of_the_layout(chain: Chain) -> None:
    for stage, path in enumerate(chain.paths):
        graph = onnx.load(path).graph
        part = chain.config.layout.graphs[stage]
        inputs, outputs = (tuple(t.name for t in tensors) for tensors in (part.inputs, part.outputs))
        assert tuple(value.name for value in graph.input) == inputs
        assert {value.name for value in graph.output} == set(outputs)
        sizes = [value.type.tensor_type.shape.dim[0] for value in graph.input]
        assert [size.dim_value for size in sizes] == ([FRAMES] if stage == 0 else [0] * len(inputs))
        assert not {"NonZero", "If", "Loop"} & {node.op_type for node in graph.node}
        assert onnx.TensorProto.DOUBLE not in {tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("arriving", [1, 2, FRAMES])
def test_a_stage_runs_on_any_number_of_frames(chain: Chain, arriving: int) -> None:
    """One is what exporters take for a constant; it arrives where a clip has one frame."""
    generator = torch.Generator().manual_seed(arriving)
    hidden = torch.randn(arriving, 81, 128, generator=generator)
    tower, spans = chain.reference.tower, (range(2, 3), range(3, 4))
    wanted, column = run_span(tower, spans[0], hidden, EarlyTom(chain.config.earlytom), chain.config.depth)
    assert column is not None
    session = onnxruntime.InferenceSession(chain.paths[1])
    made_of = torch.eye(FRAMES)[:arriving]
    names, entering = [value.name for value in session.get_outputs()], {"hidden": hidden, "made_of": made_of}
    found = dict(zip(names, session.run(None, {key: value.numpy() for key, value in entering.items()}), strict=True))
    assert found[layout.COUNT].tolist() == [arriving]  # noise is not merged
    np.testing.assert_allclose(found[layout.MERGED_HIDDEN], wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[layout.MERGED_RECEIVED], column, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[layout.SOURCES], made_of)
    feeds = {name: found[f"merged_{name}"] for name in (layout.HIDDEN, layout.RECEIVED)}
    tokens, positions, place, (count,) = onnxruntime.InferenceSession(chain.paths[2]).run(
        [layout.TOKENS, layout.POSITIONS, layout.PLACE, layout.COUNT], feeds | {layout.MADE_OF: found[layout.SOURCES]}
    )
    np.testing.assert_array_equal(place[:count], positions[:count])  # no frame was merged
    assert len(tokens) == len(positions) == chain.config.layout.tokens_of(arriving) >= count > 0


@pytest.mark.parametrize(("family", "frames", "layers"), [("clip", 6, (0,)), ("siglip", 1, (3,)), ("dinov2", 5, ())])
def test_other_towers_one_frame_and_other_cuts(
    family: str, frames: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    """A class token before the patches; a clip of one frame, merged after the last layer; merging off, one stage."""
    config = EarlyTomConfig(retention_ratio=0.4, merge_layers=layers, tau=0.3)
    graph = VisionGraph(tiny_tower(family), tiny_projector(), config, mean=[0.5] * 3, std=[0.5] * 3)
    export_chain(graph, frames, (5 * PATCH, 5 * PATCH), tmp_path)
    vision = open_onnxruntime(tmp_path, Layout(config, frames, sizes=Sizes(tokens_per_frame=9)))
    assert isinstance(vision, Adaptive)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        clip = torch.randint(0, 256, (frames, 3, 5 * PATCH, 5 * PATCH), generator=generator, dtype=torch.uint8)
        clip[1 : 1 + seed] = clip[:1]
        wanted = reference_of(graph, clip)
        found = vision.encode(clip)
        assert vision.frames_per_stage == wanted.frames_per_stage
        assert torch.equal(found.positions, wanted.positions)
        assert torch.equal(found.place, wanted.place)
        torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sources, wanted.sources, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.bias, wanted.bias, rtol=0, atol=1e-5)


def test_a_chain_is_for_the_adaptive_schedule(chain: Chain, tmp_path: Path) -> None:
    graph = vision_graph(chain.config, torch.float32)
    graph.config = graph.config.replace(schedule="budget")
    with pytest.raises(UserError, match="--schedule adaptive"):
        export_chain(graph, FRAMES, (72, 72), tmp_path)
    with pytest.raises(UserError, match="--compression native"):
        dataclasses.replace(chain.config, compression="plugin")


# The gate


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_gate_passes(chain_of: Callable[..., Chain], clips: dict[str, Tensor], dtype: str) -> None:
    made = chain_of(f"--{dtype}")
    report, wanted = accuracy.verify(made.paths, made.reference, clips, dtype)
    report.require()
    checks = {check.what: check.value for check in report.checks}
    assert checks["frames that a merge keeps: largest error"] == 0
    assert checks["token choices repeated: share that is equal"] == 1
    assert len(wanted[0][1][0][layout.TOKENS]) < len(wanted[0][1][0]["features"]) * 25
    assert sorted(path.name for path in made.folder.iterdir()) == STAGES  # nothing is left behind


def broken(chain: Chain, folder: Path, stage: int, change: Callable[[onnx.ModelProto], None]) -> list[Path]:
    """A copy of the chain with one stage changed."""
    paths = []
    for path in chain.paths:
        model = onnx.load(path)
        if path.name == STAGES[stage]:
            change(model)
        paths.append(folder / path.name)
        onnx.save(model, paths[-1])
    return paths


def scale_weight(model: onnx.ModelProto) -> None:
    """The largest matrix of a graph, times 1.1."""
    tensor = max(model.graph.initializer, key=_size)
    tensor.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(tensor), tensor.name))


def other_decision(model: onnx.ModelProto) -> None:
    values = {"tau": 0.99, "threshold": 0.5}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in values:
                attribute.f = values[attribute.name]


@pytest.mark.parametrize("words", [(), CELLS], ids=["frames", "cells"])
@pytest.mark.parametrize(
    ("stage", "change", "line"),
    [(1, scale_weight, "hidden_2|tokens"), (0, other_decision, "frame"), (2, scale_weight, "tokens")],
)
def test_the_gate_fails_on_a_broken_stage(
    chain_of: Callable[..., Chain],
    clips: dict[str, Tensor],
    tmp_path: Path,
    words: tuple[str, ...],
    stage: int,
    change: Callable[[onnx.ModelProto], None],
    line: str,
) -> None:
    """Negative controls: a weight of a stage with dynamic frames, a decision, the last stage."""
    chain = chain_of(*words, "--fp32")
    report, _ = accuracy.verify(broken(chain, tmp_path, stage, change), chain.reference, clips, "fp32")
    with pytest.raises(UserError, match=line):
        report.require()


# What is measured for it


def kept(*clips: tuple[int, ...]) -> FramesKept:
    return FramesKept({f"clip {index}": counts for index, counts in enumerate(clips)})


def test_ranges_and_budget_of_measured_counts() -> None:
    found = kept(*((12, 12 - index, 11 - index) for index in range(10)))
    assert found.ranges == ((12, 12, 12), (3, 8, 12), (2, 7, 11))
    assert found.budget() == (11, 10)  # enough for nine of ten
    assert found.budget(1.0) == (12, 11)
    assert kept((8, 5)).ranges == ((8, 8, 8), (5, 5, 5))
    assert kept((8, 5), (8, 3)).budget() == (5,)
    assert found.to_dict()["minimum"] == [12, 3, 2]
    assert found.to_dict()["clips"]["clip 9"] == [12, 3, 2]


def test_what_is_measured_is_what_the_model_keeps(chain: Chain, clips: dict[str, Tensor]) -> None:
    wanted = {name: chain.encode(frames).frames_per_stage for name, frames in clips.items()}
    assert frames_kept(chain.reference, clips).clips == wanted
    budget = vision_graph(chain.config, torch.float32)
    budget.config = chain.config.earlytom.replace(schedule="budget")
    assert frames_kept(budget, clips).clips == wanted  # whatever the schedule of the build


def test_shares_of_the_stages_see_their_own_islands(chain_of: Callable[..., Chain]) -> None:
    config = chain_of("--fp16").config
    plain = config.stage_half_shares
    assert len(plain) == len(STAGES)
    assert all(0.97 < share < 1 for share in plain)
    wide = dataclasses.replace(config, islands=Islands(mlp=frozenset({2}))).stage_half_shares
    assert wide[0] == pytest.approx(plain[0])
    assert wide[2] == pytest.approx(plain[2])
    assert wide[1] < 0.6
