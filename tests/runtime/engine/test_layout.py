"""What an engine is: graphs, tensors, files, counts, and the values that are compared, from the settings alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.budget import frames_per_stage, most_tokens, token_count
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.settings import MethodSettings
from earlytom.spans import trace_names
from runtime.engine.layout import VARIES, Graph, Layout, Sizes
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[3]
SIZES = Sizes(tokens_per_frame=25, image=(72, 72), width=256, layers=8)
BUDGET = EarlyTomConfig(retention_ratio=0.3, merge_layers=(2, 5), schedule="budget")
ADAPTIVE = BUDGET.replace(schedule="adaptive")
CELLS = CellsConfig(retention_ratio=0.3, merge_layers=(2, 5), schedule="adaptive")


def layout(config: MethodSettings = BUDGET, frames: int = 8, **more: Any) -> Layout:
    return Layout(config, frames, **{"sizes": SIZES, "dtype": "fp16", **more})


def shapes(graph: Graph) -> dict[str, tuple[int | None, ...]]:
    return {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}


MODES = {
    "whole": layout(),
    "batch": layout(batch=3),
    "counts": layout(frame_counts=(4, 8)),
    "adaptive": layout(ADAPTIVE),
    "adaptive, one merge": layout(ADAPTIVE.replace(merge_layers=(4,))),
    "adaptive, no merge": layout(ADAPTIVE.replace(merge_layers=())),
    "cells, adaptive": layout(CELLS),
    "cells, adaptive, no merge": layout(CELLS.replace(merge_layers=())),
    "chunked": layout(chunk=2),
    "chunked, one merge": layout(BUDGET.replace(merge_layers=(4,)), chunk=2),
    "chunked, no merge": layout(BUDGET.replace(merge_layers=()), chunk=2),
}


@pytest.mark.parametrize(
    ("mode", "graphs"),
    [
        ("whole", [("vision.onnx", "frames -> tokens positions sources place bias", 1)]),
        ("batch", [("vision.onnx", "frames -> tokens positions sources place bias", 1)]),
        ("counts", [("vision.f8.onnx", "frames -> tokens positions sources place bias", 1)]),
        (
            "adaptive",
            [
                ("vision.0.onnx", "frames -> merged_hidden sources count", 1),
                ("vision.1.onnx", "hidden made_of -> merged_hidden sources count merged_received", 1),
                ("vision.2.onnx", "hidden received made_of -> tokens positions sources place bias count", 1),
            ],
        ),
        (
            "adaptive, one merge",
            [
                ("vision.0.onnx", "frames -> merged_hidden sources count merged_received", 1),
                ("vision.1.onnx", "hidden received made_of -> tokens positions sources place bias count", 1),
            ],
        ),
        ("adaptive, no merge", [("vision.0.onnx", "frames -> tokens positions sources place bias count", 1)]),
        (
            "cells, adaptive",
            [
                (
                    "vision.0.onnx",
                    "frames -> merged_hidden merged_cell_size merged_cell_time merged_cell_made_of count",
                    1,
                ),
                (
                    "vision.1.onnx",
                    "hidden cell_size cell_time cell_made_of -> merged_hidden merged_cell_size merged_cell_time "
                    "merged_cell_made_of count",
                    1,
                ),
                (
                    "vision.2.onnx",
                    "hidden cell_size cell_time cell_made_of -> tokens positions sources place bias count",
                    1,
                ),
            ],
        ),
        ("cells, adaptive, no merge", [("vision.0.onnx", "frames -> tokens positions sources place bias count", 1)]),
        (
            "chunked",
            [
                ("vision.0.onnx", "frames -> hidden", 4),
                ("vision.1.onnx", "hidden -> tokens positions sources place bias", 1),
            ],
        ),
        (
            "chunked, one merge",
            [
                ("vision.0.onnx", "frames -> hidden received", 4),
                ("vision.1.onnx", "hidden received -> tokens positions sources place bias", 1),
            ],
        ),
        (
            "chunked, no merge",
            [
                ("vision.0.onnx", "frames -> hidden received", 4),
                ("vision.1.onnx", "hidden received -> tokens positions sources place bias", 1),
            ],
        ),
    ],
)
def test_the_graphs_their_files_and_tensors(mode: str, graphs: list[tuple[str, str, int]]) -> None:
    """Written out: folders that were built keep these names."""
    found = []
    for graph in MODES[mode].graphs:
        inputs, outputs = (" ".join(tensor.name for tensor in tensors) for tensors in (graph.inputs, graph.outputs))
        found.append((graph.file("vision.onnx"), f"{inputs} -> {outputs}", graph.calls))
        assert graph.names == set(f"{inputs} {outputs}".split())
    assert found == graphs


def test_shapes_and_dtypes() -> None:
    assert shapes(MODES["whole"].graphs[0]) == {
        "frames": (8, 3, 72, 72),
        "tokens": (60, 256),
        "positions": (60,),
        "sources": (4, 8),
        "place": (60,),
        "bias": (60,),
    }
    assert shapes(MODES["batch"].graphs[0])["sources"] == (3, 4, 8)
    assert shapes(MODES["batch"].graphs[0])["tokens"] == (3, 60, 256)
    head, rest = MODES["chunked, one merge"].graphs
    assert shapes(head) == {"frames": (2, 3, 72, 72), "hidden": (2, None, None), "received": (2, None)}
    assert shapes(rest)["hidden"] == (8, None, None)
    first, _, last = MODES["adaptive"].graphs
    assert shapes(first)["merged_hidden"] == (8, None, None)
    assert shapes(last) == {
        "hidden": (VARIES, None, None),
        "received": (VARIES, None),
        "tokens": (VARIES, 256),
        "positions": (VARIES,),
        "made_of": (VARIES, 8),
        "sources": (VARIES, 8),
        "place": (VARIES,),
        "bias": (VARIES,),
        "count": (1,),
    }
    assert {tensor.name: tensor.dtypes for tensor in (*last.inputs, *last.outputs)} == {
        "hidden": ("fp16", "bf16", "fp32"),
        "received": ("fp32",),
        "tokens": ("fp16", "bf16", "fp32"),
        "positions": ("int64",),
        "made_of": ("fp32",),
        "sources": ("fp32",),
        "place": ("int64",),
        "bias": ("fp32",),
        "count": ("int64",),
    }


def test_what_goes_between_stages_of_cells() -> None:
    first, _, last = MODES["cells, adaptive"].graphs
    assert shapes(first)["merged_cell_made_of"] == (8, None, 8)
    assert shapes(last) == {
        "hidden": (VARIES, None, None),
        "cell_size": (VARIES, None),
        "cell_time": (VARIES, None),
        "cell_made_of": (VARIES, None, 8),
        "tokens": (VARIES, 256),
        "positions": (VARIES,),
        "sources": (VARIES, 8),
        "place": (VARIES,),
        "bias": (VARIES,),
        "count": (1,),
    }
    between = [tensor for tensor in last.inputs if tensor.name.startswith("cell_")]
    assert {tensor.dtypes for tensor in between} == {("fp32",)}


@pytest.mark.parametrize("mode", MODES)
def test_spans_and_taps_are_shared_out_among_the_graphs(mode: str) -> None:
    made = MODES[mode]
    spans = [graph.span for graph in made.graphs]
    assert [layer for span in spans if span is not None for layer in span] == list(range(8))
    assert made.taps == tuple(trace_names(made.earlytom, 8))
    assert sorted(tap for graph in made.graphs for tap in graph.taps) == sorted(made.taps)
    for graph in made.graphs:  # in the order of computation, as in the whole
        places = [made.taps.index(tap) for tap in graph.taps]
        assert places == sorted(places)
    alike = Layout(made.earlytom, made.frames, made.batch, made.chunk)  # of a model that is not known
    assert alike.taps == tuple(trace_names(made.earlytom))
    assert [graph.span for graph in alike.graphs] == [None] * len(spans)


def test_a_merge_is_done_by_the_stage_before_it_or_by_the_rest() -> None:
    assert MODES["adaptive"].graphs[0].taps == ("hidden_0", "hidden_1", "hidden_2", "similarity_2", "weights_2")
    head, rest = MODES["chunked"].graphs
    assert head.taps == ("hidden_0", "hidden_1", "hidden_2")
    assert rest.taps[:3] == ("similarity_2", "weights_2", "hidden_3")


@given(
    frames=st.integers(1, 40),
    per_frame=st.integers(1, 200),
    ratio=st.floats(0.01, 1),
    merges=st.integers(0, 4),
    share=st.floats(0.1, 1),
)
def test_counts_are_those_of_the_budget(frames: int, per_frame: int, ratio: float, merges: int, share: float) -> None:
    config = EarlyTomConfig(
        retention_ratio=ratio, merge_layers=tuple(range(merges)), frame_budget=share, schedule="budget"
    )
    made = Layout(config, frames, sizes=Sizes(per_frame))
    rule: dict[str, Any] = {"merges": merges, "frame_budget": share}
    assert made.stages == frames_per_stage(frames, **rule)
    assert made.tokens == token_count(frames, per_frame, ratio, **rule)
    assert made.tokens_full == frames * per_frame
    varying = Layout(config.replace(schedule="adaptive"), frames, sizes=Sizes(per_frame))
    assert varying.stages == (frames,) * (merges + 1)
    assert varying.tokens == most_tokens(frames, per_frame, ratio, merges=merges)
    for left in range(1, frames + 1):
        known: dict[str, int] = {"frames_out": left, "static_frames": 0}
        assert varying.tokens_of(left) == token_count(frames, per_frame, ratio, "adaptive", **known)


def test_one_of_several_counts() -> None:
    both = layout(frame_counts=(4, 8))
    one = both.at(4)
    assert (both.counts, one.counts, one.frames) == ((4, 8), (4,), 4)
    assert one.at(4) is one
    assert layout().at(8) == layout()
    assert one.graphs[0].file("vision.engine") == "vision.f4.engine"
    assert [graph.file("vision.onnx") for graph in both.files] == ["vision.f4.onnx", "vision.f8.onnx"]
    assert one.stages == frames_per_stage(4, merges=2)
    assert one.tokens == token_count(4, 25, 0.3, merges=2)


def test_a_frame_budget_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="is more than the 8 frames"):
        _ = layout(BUDGET.replace(frame_budget=(9, 8))).stages


WITHOUT_PYTORCH = """
import sys, types
sys.modules["torch"] = None
sys.modules["earlytom"] = package = types.ModuleType("earlytom")  # which offers what does need it
package.__path__ = ["earlytom"]
import runtime.engine.layout as layout
print(layout.ONNX_FILE)
"""


def test_it_needs_no_pytorch() -> None:
    """A command that only looks at names need not load it."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (done.returncode, done.stdout.strip()) == (0, "vision.onnx"), done.stderr


def spelt(path: Path) -> set[str]:
    """The texts in a module that are names of graphs' tensors or files and of nothing else."""
    names = {"merged_hidden", "merged_received", "vision.onnx", "vision.engine", "vision.data"}
    tree = ast.parse(path.read_text("utf-8"))
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return found & names


def test_no_other_module_spells_these_names() -> None:
    home = ROOT / "runtime" / "engine" / "layout.py"
    assert len(spelt(home)) == 5  # negative control
    sources = [path for package in ("earlytom", "runtime", "builder") for path in (ROOT / package).rglob("*.py")]
    assert {path: found for path in sources if path != home and (found := spelt(path))} == {}
