"""Islands: named, counted, and fp32 in the graph; the rest is half."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, numpy_helper
from torch import Tensor

from builder import build
from builder.compile.engine import compile_engine
from builder.compile.layers import LayerSummary, check_precision
from builder.gate import accuracy
from builder.precision import islands
from builder.precision.islands import DEFAULT, ISLANDS, LAYERED, Costs, Islands
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom.errors import UserError
from earlytom.families import geometry
from earlytom.families.qwen3_vl import Qwen3Vl
from runtime import trt as seam
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from tests.builder.conftest import FRAMES, SMALL, Exported
from tests.runtime.checkpoint.family_folders import family_folder

Make = Callable[..., Exported]
CHANGED: dict[str, Any] = {}  # of a geometry
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
BYTES = {FLOAT: 4, HALF: 2}
DEPTH = SMALL[0]
MIX = "default,residual,logits,gelu,embeddings,projector,attention:1,mlp:2-3"
GRAPHS = ("default", "none", "all", MIX)


def exported_with(exported: Make, choice: str) -> tuple[Exported, onnx.ModelProto]:
    made = exported("--ratio", "0.3", "--fp16", *(() if choice == "default" else ("--islands", choice)))
    return made, onnx.load(str(made.path))


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that the graph states."""
    known = {t.name: t.data_type for t in model.graph.initializer}
    stated = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return known | {value.name: value.type.tensor_type.elem_type for value in stated}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default", ("pixels", "norms", "softmax", "similarity")),
        ("none", ()),
        ("similarity, Pixels,norms,SOFTMAX", ("pixels", "norms", "softmax", "similarity")),
        ("mlp:2,residual,mlp:0-1", ("residual", "mlp:0-2")),
        ("attention:3,attention:1,mlp", ("attention:1", "attention:3", "mlp:0-3")),
        ("none,mlp:1", ("mlp:1",)),
        ("all", (*(name for name in ISLANDS if name not in LAYERED), "attention:0-3", "mlp:0-3")),
    ],
)
def test_words(text: str, words: tuple[str, ...]) -> None:
    chosen = islands.parse(text, 4)
    assert chosen.words == words
    assert islands.parse(",".join(chosen.words) or "none", 4) == chosen


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nroms", r"'nroms' is no island; choose among pixels, norms.*--islands list"),
        ("", "'' is no island"),
        ("default,", "'' is no island"),
        ("list,norms", "'list' is no island"),
        ("mlp:4", r"'mlp:4': give a layer, or a range such as mlp:0-3"),
        ("mlp:2-1", "'mlp:2-1': give a layer"),
        ("attention:", r"'attention:': give a layer, or a range such as attention:0-3"),
        ("mlp:a-b", "'mlp:a-b': give a layer"),
        ("mlp:-1", "'mlp:-1': give a layer"),
        ("norms:3", "only attention and mlp are chosen by layer"),
        ("nothing:3", "only attention and mlp are chosen by layer"),
    ],
)
def test_what_is_no_choice_is_one_line(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        islands.parse(text, 4)
    assert "\n" not in str(caught.value)


def test_the_command_line(small_checkpoint: Path) -> None:
    def config(*words: str) -> BuildConfig:
        return parse(["--model", str(small_checkpoint), "--backend", "onnx", *words])[1]

    usual = config()
    assert usual.islands == DEFAULT
    for spelling in ("--islands", "--fp16-islands"):
        assert config("--bf16", spelling, "default,mlp:1").islands.mlp == {1}
    # A key says what was chosen, and nothing where that is the usual.
    assert usual.key() == config("--islands", "softmax,similarity,norms,pixels").key()
    assert "islands" not in usual.key_parts()
    other = config("--islands", "default,mlp:1")
    assert other.key_parts()["islands"] == [*DEFAULT.words, "mlp:1"]
    assert other.key() != usual.key()
    assert config("--islands", "none").key_parts()["islands"] == []
    with pytest.raises(UserError, match="--islands is for --fp16 and --bf16"):
        config("--fp32", "--islands", "norms")
    with pytest.raises(UserError, match="range such as mlp:0-3"):
        config("--islands", "mlp:9")


@pytest.mark.parametrize("words", [["--fp16-islands", "list"], ["--dry-run"], ["--dry-run", "--bf16"]])
def test_every_island_is_listed_with_its_cost(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    out = tmp_path / "engines"
    assert build.main(["--model", str(small_checkpoint), "--backend", "onnx", "--out", str(out), *words]) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line and line.split()[0] in ISLANDS}
    assert list(rows) == list(ISLANDS)
    assert [name for name, row in rows.items() if row.endswith("yes")] == list(DEFAULT.words)
    record = json.loads(lines[-1])
    if words[-1] == "list":
        assert record["chosen"] == list(DEFAULT.words)
        assert all(record["islands"][name]["flops"] > 0 for name in ISLANDS)
    else:
        assert record["islands"] == list(DEFAULT.words)


def test_fp32_has_no_islands(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--model", str(small_checkpoint), "--backend", "onnx", "--dry-run", "--fp32"]) == 0
    printed = capsys.readouterr().out
    assert "similarity" not in printed
    assert json.loads(printed.splitlines()[-1])["islands"] == []


def test_what_is_chosen_is_fp32_and_the_rest_is_half(exported: Make) -> None:
    _, model = exported_with(exported, MIX)
    kind = kinds(model)
    stored = {t.name: t for t in model.graph.initializer}
    wide = {name.removeprefix("vision_tower.") for name, t in stored.items() if t.data_type == FLOAT}
    for part in (
        "embeddings.patch_embedding.bias",
        "encoder.layers.1.self_attn.q_proj.bias",
        "projector.linear_1.bias",
    ):
        assert part in wide
    for part in ("encoder.layers.2.mlp.fc1.bias", "encoder.layers.3.mlp.fc2.bias"):
        assert part in wide
    for part in ("encoder.layers.0.self_attn.q_proj.bias", "encoder.layers.1.mlp.fc1.bias"):
        assert part not in wide
    for node in model.graph.node:
        out = kind[node.output[0]]
        if node.op_type in ("LayerNormalization", "Softmax", "Gelu", "Conv", "Resize"):
            assert out == FLOAT, node.op_type
        if node.op_type == "Attention":
            assert (out == FLOAT) == any(".layers.1." in name for name in ancestors(model, node))
        if node.op_type == "Softmax":
            product = producer(model, node.input[0])
            assert {kind[name] for name in product.input} == {FLOAT}
    assert {kind[f"hidden_{layer}"] for layer in range(DEPTH)} == {FLOAT}
    assert (kind["features"], kind[layout.TOKENS]) == (FLOAT, HALF)


def producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if name in node.output)
    return node


def ancestors(model: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    """Names of the weights between a node and the layer norm before it."""
    made = {name: n for n in model.graph.node for name in n.output}
    found: set[str] = set()
    waiting = list(node.input)
    while waiting:
        name = waiting.pop()
        if name not in made:
            found.add(name)
        elif made[name].op_type != "LayerNormalization":
            waiting.extend(made[name].input)
    return found


def test_without_islands_everything_is_half_but_what_decides(exported: Make) -> None:
    _, model = exported_with(exported, "none")
    kind = kinds(model)
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "Attention", "Gelu", "Conv"):
            assert {kind[name] for name in (*node.input, *node.output) if name in kind} == {HALF}, node
    assert not [t.name for t in model.graph.initializer if t.data_type == FLOAT and is_weight(t)]
    large = [node for node in model.graph.node if node.op_type == "MatMul" and is_large(model, node)]
    wide = [node for node in large if kind[node.input[0]] == FLOAT]
    tokens = sizes(model)[layout.TOKENS][0]
    assert [sizes(model)[node.output[0]][0] for node in wide] == [tokens]  # what tokens stand for is decided in fp32
    assert {kind[node.input[0]] for node in large} == {HALF, FLOAT}


def test_all_is_fp32_but_for_the_tokens(exported: Make) -> None:
    made, model = exported_with(exported, "all")
    assert {name for name, kind in kinds(model).items() if kind == HALF} == {layout.TOKENS}
    assert made.config.half_share == 0


def sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    known = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}
    return known | {t.name: list(t.dims) for t in model.graph.initializer}


def is_large(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Not the merging of received attention, which is [F', F] times [F, S]."""
    return len(sizes(model)[node.output[0]]) > 2 or math.prod(sizes(model)[node.output[0]]) > FRAMES * 81


def half_share_of(model: onnx.ModelProto) -> float:
    """The share of the flops of the graph's own products, from its own shapes, whose operands are half."""
    size, kind = sizes(model), kinds(model)
    flops: dict[int, int] = {HALF: 0, FLOAT: 0}
    for node in model.graph.node:
        out = math.prod(size[node.output[0]]) if node.output[0] in size else 0
        if node.op_type == "MatMul":
            flops[kind[node.input[0]]] += 2 * out * size[node.input[0]][-1]
        elif node.op_type == "Conv":
            flops[kind[node.input[0]]] += 2 * out * math.prod(size[node.input[1]][1:])
        elif node.op_type == "Attention":
            flops[kind[node.input[0]]] += 4 * out * size[node.input[1]][-2]
    return flops[HALF] / sum(flops.values())


@pytest.mark.parametrize("choice", GRAPHS)
def test_counts_are_those_of_the_graph(exported: Make, choice: str) -> None:
    made, model = exported_with(exported, choice)
    assert made.config.half_share == pytest.approx(half_share_of(model), abs=1e-3)

    config = made.config
    width, wider = config.model.vision_config.hidden_size, Costs(config).total(config.islands).weight_bytes
    usual = replace(config, islands=islands.parse("none", DEPTH)).expected_bytes["weights"]
    assert config.expected_bytes["weights"] == usual + wider
    stored = sum(BYTES[t.data_type] * math.prod(t.dims) for t in model.graph.initializer if is_weight(t))
    keys = width * (2 * DEPTH + 2 * len(config.islands.attention))  # their biases are zero
    assert stored == usual + wider - keys


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Not a constant of the graph: zeros, identities of at most [F, F], numbers a colour."""
    large = math.prod(tensor.dims) > FRAMES**2 or max(tensor.dims, default=0) > FRAMES
    return tensor.data_type in BYTES and large and bool(numpy_helper.to_array(tensor).any())


@pytest.mark.parametrize("choice", ["all", MIX])
def test_the_gate_passes(exported: Make, clips: dict[str, Tensor], choice: str) -> None:
    made, _ = exported_with(exported, choice)
    report, _ = accuracy.verify(made.path, made.reference, clips, "fp16")
    assert report.passed, report


def test_costs_add_up(exported: Make) -> None:
    config = exported("--ratio", "0.3", "--fp16").config
    costs = Costs(config)
    layers = [Islands(frozenset(), frozenset({layer}), frozenset({layer})) for layer in range(DEPTH)]
    both = costs.of("attention") + costs.of("mlp")
    assert sum((costs.total(one) for one in layers), islands.Cost()) == both
    assert costs.of("attention").products + costs.of("mlp").products == sum(costs.total(one).products for one in layers)
    # The explicit logits are part of the attention of the layer that decides, and no other.
    deciding = config.earlytom.merge_layers[-1]
    logits = islands.parse("logits", DEPTH)
    inside = replace(logits, attention=frozenset({deciding}))
    beside = replace(logits, attention=frozenset({0}))
    assert costs.total(inside).products == costs.total(replace(inside, names=frozenset())).products
    assert costs.total(beside).products > costs.total(replace(beside, names=frozenset())).products
    # The total of a graph is that of `earlytom.flops` and what only the compression does.
    rest = costs.of("similarity").products + costs.of("residual").products
    assert costs.products == config.flops["vision"] + rest + costs.standing


def test_windows_and_gates_count_as_they_do_in_the_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = family_folder(tmp_path / "given", "qwen3_vl")
    own, plain = Qwen3Vl.geometry, geometry(model.config)
    windowed = replace(plain, pairs=(20, plain.patches**2, 30), gated=True, rms=True)
    monkeypatch.setattr(Qwen3Vl, "geometry", lambda self, config: replace(own(self, config), **CHANGED))
    words = ["--model", str(folder), "--frames", "8", "--merge-layers", "0,1", "--ratio", "0.5", "--backend", "onnx"]
    counted = []
    for frame in (plain, windowed):
        CHANGED.update(pairs=frame.pairs, gated=frame.gated, rms=frame.rms)
        config = parse([*words, "--fp16"])[1]
        costs = Costs(config)
        layers = costs.of("attention").products + costs.of("mlp").products
        assert layers + costs.of("embeddings").products + costs.of("projector").products == config.flops["vision"]
        counted.append((layers, costs.of("mlp").weight_bytes, costs.of("norms").weight_bytes))
    (before, weights, norms), (after, more, fewer) = counted
    assert before != after
    assert (more - weights, norms - fewer) == (2 * 3 * (plain.width + 1) * plain.inner, 2 * 3 * 2 * plain.width)


def summary(**shares: float) -> LayerSummary:
    return LayerSummary(1, (), (), shares, {}, 100, (), ())


def test_the_share_of_an_engine_is_held_against_that_of_its_islands() -> None:
    check_precision(summary(fp16=0.62, fp32=0.38), "fp16", expected=0.6)
    check_precision(summary(fp32=1.0), "fp16", expected=0.0)
    for found, expected, bound in ((0.62, 1.0, "at least 90"), (0.4, 0.6, "at least 50"), (1.0, 0.6, "at most 70")):
        with pytest.raises(UserError, match=f"expected {bound} % fp16"):
            check_precision(summary(fp16=found, fp32=1 - found), "fp16", expected=expected)


@pytest.mark.skipif("tensorrt-rtx" not in seam.flavours(), reason="tensorrt-rtx is not installed (pip install .[rtx])")
def test_a_compiled_engine_has_the_share(exported: Make, tmp_path: Path) -> None:
    made, _ = exported_with(exported, MIX)
    share = made.config.half_share
    assert share < 0.8
    report = compile_engine(
        made.path, tmp_path / "vision.engine", flavour="tensorrt-rtx", dtype="fp16", expected_share=share
    )
    assert report.layers.half_share == pytest.approx(share, abs=0.01)
    with pytest.raises(UserError, match="expected at least 90 % fp16"):
        check_precision(report.layers, "fp16")


def test_the_manifest_says_so_only_where_it_is_not_the_usual(
    engine: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    usual = Manifest.read(engine)
    assert usual.islands is None
    assert "islands" not in json.loads((engine / layout.MANIFEST_FILE).read_text())
    for words in ((), ("norms", "mlp:1")):
        other = usual.replace(islands=words)
        assert other.to_dict()["islands"] == list(words)
        assert Manifest.from_dict(other.to_dict()) == other
    for wrong in ("norms", [1], {"norms": 1}):
        with pytest.raises(EngineError, match="islands"):
            usual.replace(islands=wrong)

    command = ["--model", str(small_checkpoint), "--frames", "4", "--backend", "onnx", "--no-verify", "--json"]
    build.main([*command, "--out", str(tmp_path), "--islands", "default,residual,mlp:1"])
    (folder,) = tmp_path.iterdir()
    assert Manifest.read(folder).islands == (*DEFAULT.words, "residual", "mlp:1")
