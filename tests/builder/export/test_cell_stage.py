"""The adaptive schedule of "cells" as a chain: the graphs, and the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from builder.compile.engine import compile_engine
from builder.export.chain import export_chain
from builder.export.vision import VisionGraph
from builder.gate import accuracy
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import merge_marks, plan_cells
from earlytom.encoder import run_span
from earlytom.methods.cells import Cells
from runtime.engine import layout
from runtime.engine.layout import Layout, Sizes
from runtime.vision.adaptive import Adaptive
from runtime.vision.open import open_onnxruntime
from tests.builder.conftest import FRAMES, Chain, reference_of
from tests.builder.export.test_chain import CELLS, STAGES, THRESHOLD, videos_of
from tests.builder.needed import needs_rtx
from tests.earlytom.tiny import PATCH, tiny_projector, tiny_tower


@pytest.fixture(scope="module")
def cells(chain_of: Callable[..., Chain]) -> Chain:
    return chain_of(*CELLS, "--fp32")


def all_videos(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the other chain, and one of which either merge has something to do: half of it still, which the first
    merges, half with a noise that later layers see less of."""
    first = next(iter(clips.values()))
    noise = torch.randint(-32, 33, first.shape, generator=torch.Generator().manual_seed(0))
    noisy = (first[:1].int() + noise).clamp(0, 255).to(torch.uint8)
    return {**videos_of(clips), "both": torch.cat([first[:1].repeat(6, 1, 1, 1), noisy[6:]])}


def test_counts_positions_and_tokens_are_those_of_pytorch(cells: Chain, clips: dict[str, Tensor]) -> None:
    vision = open_onnxruntime(cells.folder, cells.config.layout)
    assert isinstance(vision, Adaptive)
    counts = {}
    for name, frames in all_videos(clips).items():
        wanted = cells.encode(frames)
        tokens, positions, sources, place, bias = vision.encode(frames)
        assert vision.frames_per_stage == wanted.frames_per_stage
        assert len(tokens) == cells.config.tokens_of(wanted.frames_per_stage[-1])
        assert torch.equal(positions, wanted.positions)
        assert torch.equal(place, wanted.place)
        torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(sources, wanted.sources, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias, wanted.bias, rtol=0, atol=1e-4)
        counts[name] = vision.frames_per_stage
    assert len(set(counts.values())) >= 4  # they depend on the video
    assert counts["still"] == (FRAMES, 1, 1)
    assert FRAMES > counts["both"][1] > counts["both"][2] > 1


def test_inputs_and_outputs_are_those_of_the_layout(cells: Chain) -> None:
    for stage, path in enumerate(cells.paths):
        graph = onnx.load(path).graph
        part = cells.config.layout.graphs[stage]
        inputs, outputs = (tuple(t.name for t in tensors) for tensors in (part.inputs, part.outputs))
        assert tuple(value.name for value in graph.input) == inputs
        assert {value.name for value in graph.output} == set(outputs)
        sizes = [value.type.tensor_type.shape.dim[0] for value in graph.input]
        assert [size.dim_value for size in sizes] == ([FRAMES] if stage == 0 else [0] * len(inputs))
        kinds = {node.op_type for node in graph.node}
        assert not {"NonZero", "If", "Loop", "Softmax"} & kinds  # attention is nowhere written out
        assert onnx.TensorProto.DOUBLE not in {tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("arriving", [1, 2, FRAMES])
def test_a_stage_runs_on_any_number_of_frames(cells: Chain, arriving: int) -> None:
    """And takes along what the frames that arrive are made of, whatever that is."""
    generator = torch.Generator().manual_seed(arriving)
    hidden = torch.randn(arriving, 81, 128, generator=generator)
    hidden[arriving // 2 :] = hidden[arriving // 2]  # one group
    size, time = torch.rand(arriving, 81, generator=generator), torch.rand(arriving, 81, generator=generator)
    made = torch.rand(arriving, 81, FRAMES, generator=generator)
    config = cells.config.earlytom
    assert isinstance(config, CellsConfig)
    wanted, _ = run_span(cells.reference.tower, range(2, 3), hidden, Cells(config), cells.config.depth)
    plan = plan_cells(wanted, None, config.power, threshold=THRESHOLD)
    groups = len(plan.member)
    assert groups == arriving // 2 + 1
    session = onnxruntime.InferenceSession(cells.paths[1])
    entering = {"hidden": hidden, "cell_size": size, "cell_time": time, "cell_made_of": made}
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, {key: value.numpy() for key, value in entering.items()}), strict=True))
    assert found[layout.COUNT].tolist() == [groups]
    marks = merge_marks(plan, size, time)
    for name, value in zip(("cell_size", "cell_time"), marks, strict=True):
        np.testing.assert_allclose(found[f"merged_{name}"][:groups], value, rtol=0, atol=1e-4)
    shares = torch.einsum("sof,fsk->osk", plan.weights, made)
    np.testing.assert_allclose(found["merged_cell_made_of"][:groups], shares, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[layout.MERGED_HIDDEN][:groups], plan.apply(wanted), rtol=0, atol=1e-4)
    feeds = {name: found[layout.BETWEEN[name]][:groups] for name in entering}
    tokens, (count,), sources = onnxruntime.InferenceSession(cells.paths[2]).run(
        [layout.TOKENS, layout.COUNT, layout.SOURCES], feeds
    )
    assert len(tokens) == count == cells.config.layout.tokens_of(groups)
    np.testing.assert_allclose(sources, shares.mean(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "frames", "layers", "rounds"),
    [("clip", 6, (0, 2), None), ("siglip", 1, (3,), 3), ("dinov2", 5, (), None), ("dinov2", 5, (), 3)],
)
def test_other_towers_one_frame_and_other_cuts(
    family: str, frames: int, layers: tuple[int, ...], rounds: int | None, tmp_path: Path
) -> None:
    """A class token before the cells; a clip of one frame, merged after the last layer; merging off, one stage; tokens
    taken one after the other, which ONNX Runtime has a loop for."""
    config = CellsConfig(0.4, merge_layers=layers, schedule="adaptive", threshold=0.05, rounds=rounds)
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
        assert vision.frames_per_stage[-1] == (frames - seed if layers and frames > 1 else frames)
        for name in layout.OUTPUTS:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_gate_passes(chain_of: Callable[..., Chain], clips: dict[str, Tensor], dtype: str) -> None:
    made = chain_of(*CELLS, f"--{dtype}")
    report, wanted = accuracy.verify(made.paths, made.reference, clips, dtype)
    report.require()
    checks = {check.what: check.value for check in report.checks}
    assert checks["frames that a merge keeps: largest error"] == 0
    assert checks["token choices repeated: share that is equal"] == 1
    assert len(wanted[0][1][0]["features"]) < FRAMES
    assert sorted(path.name for path in made.folder.iterdir()) == STAGES  # nothing is left behind


def test_the_gate_follows_merges_of_which_only_some_leave_frames_out(cells: Chain, clips: dict[str, Tensor]) -> None:
    videos = all_videos(clips)
    chosen = {name: videos[name] for name in ("both", "noise", "still")}
    report, _ = accuracy.verify(cells.paths, cells.reference, chosen, "fp32")
    report.require()


@needs_rtx
def test_every_stage_compiles(chain_of: Callable[..., Chain], tmp_path: Path) -> None:
    made = chain_of(*CELLS, "--fp16")
    fused = 0
    for stage, path in enumerate(made.paths):
        report = compile_engine(
            path,
            tmp_path / layout.stage_file(layout.ENGINE_FILE, stage),
            flavour="tensorrt-rtx",
            dtype="fp16",
            profile=(1, 7, FRAMES),
            expected_share=made.config.stage_half_shares[stage],
            layers_path=tmp_path / layout.stage_file(layout.LAYERS_FILE, stage),
        )
        assert report.engine_bytes > 100_000
        assert not report.layers.attention_unfused
        fused += len(report.layers.attention_fused)
    assert fused >= len(made.config.earlytom.merge_layers) + 1
