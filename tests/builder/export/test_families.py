"""The exported graph of every family is its reference: in ONNX Runtime the same positions, tokens to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from builder.export.vision import VisionGraph, export_onnx
from builder.precision.casts import NORMS, set_vision_precision
from builder.precision.islands import Islands
from earlytom import EarlyTomConfig, encode_video
from earlytom.families import FAMILIES, family_of, geometry
from runtime.checkpoint import VisionPart
from runtime.engine import layout
from runtime.vision.onnxruntime import open_session
from tests.earlytom.tiny import MODELS

F = 6
CONFIG = EarlyTomConfig(retention_ratio=0.5, merge_layers=(0, 1), tau=0.5, schedule="budget")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def graph_of(model: Any, dtype: torch.dtype = torch.float32, islands: Islands | None = None) -> VisionGraph:
    part, frame, family = VisionPart.from_model(model), geometry(model.config), family_of(model.config)
    if islands is not None:
        set_vision_precision(part.vision_tower, part.projector, dtype, islands, family)
    more: dict[str, Any] = {"mean": MEAN, "std": STD, "depth": frame.depth, "dtype": dtype, "family": family}
    more |= {} if islands is None else {"islands": islands}
    return VisionGraph(part.vision_tower, part.projector, CONFIG, **more)


def frames_of(model: Any) -> Tensor:
    """Two scenes, the second of which is still."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (F, 3, *geometry(model.config).size), generator=generator, dtype=torch.uint8)
    frames[2:] = frames[2].clone()
    frames[3] //= 2
    return frames


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llava_onevision", {}),
        ("llava_next_video", {}),
        ("llava_qwen", {"pooling": "max"}),
        ("smolvlm", {"grid": 6, "side": 3}),
        ("internvl", {"grid": (4, 6), "use_qk_norm": True, "use_mean_pooling": False}),
        ("qwen3_vl", {"grid": (4, 6)}),
        ("qwen3_5", {"grid": (4, 6)}),
        ("qwen2_5_vl", {"grid": (6, 10)}),
    ],
)
def test_the_exported_graph_is_the_reference(name: str, how: Mapping[str, Any], tmp_path: Path) -> None:
    model = MODELS[name](layers=3, **how)
    graph, frames, frame = graph_of(model), frames_of(model), geometry(model.config)
    pixels = graph.pixels(frames)
    parts: tuple[nn.Module, nn.Module] = (graph.vision_tower, graph.projector)
    wanted = encode_video(*parts, pixels, CONFIG, depth=frame.depth, family=graph.family)
    exported = export_onnx(graph, F, frame.size, tmp_path / "vision.onnx")
    session = open_session(exported.path, threads=1)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {layout.FRAMES: frames.numpy()}), strict=True))
    assert np.array_equal(found[layout.POSITIONS], wanted.positions.numpy())
    np.testing.assert_allclose(found[layout.TOKENS], wanted.tokens.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(found[layout.SOURCES], wanted.sources.numpy(), rtol=0, atol=1e-6)
    assert np.array_equal(found[layout.PLACE], wanted.place.numpy())
    assert len(found[layout.POSITIONS]) < F // frame.step * frame.tokens_per_frame
    assert found[layout.TOKENS].shape[1] == frame.token_width


RMS = {"norm_type": "rms_norm", "use_qk_norm": True}


@pytest.mark.parametrize(("name", "how"), [*((name, {}) for name in FAMILIES), ("internvl", RMS)])
def test_islands_stay_fp32_and_the_rest_is_half(name: str, how: Mapping[str, Any]) -> None:
    model = MODELS[name](layers=3, **how)
    islands = Islands(frozenset({"norms", "gelu", "embeddings", "pixels", "softmax", "similarity"}), frozenset({1}))
    graph = graph_of(model, torch.float16, islands)
    parts = [graph.tower.parts(layer) for layer in graph.tower.layers]
    for at, part in enumerate(parts):
        wide = torch.float32 if at == 1 else torch.float16
        norms = {
            parameter for child in part.attention.modules() if isinstance(child, NORMS) for parameter in [child.weight]
        }
        assert {p.dtype for p in part.attention.parameters() if p not in norms} == {wide}
        assert all(weight.dtype == torch.float32 for weight in norms)
        assert {p.dtype for p in part.mlp.parameters()} == {torch.float16}
        assert isinstance(part.attention_norm, NORMS)
        assert part.attention_norm.result == wide
        assert part.attention_norm.weight.dtype == torch.float32
        assert not graph.tower.key_bias_cancels or not part.attention.k_proj.bias.any()
    assert {p.dtype for p in graph.tower.embeddings.parameters()} == {torch.float32}
    tokens = graph(frames_of(model))[layout.TOKENS]
    reference = graph_of(MODELS[name](layers=3, **how))(frames_of(model))[layout.TOKENS]
    assert tokens.dtype == torch.float16
    assert torch.nn.functional.cosine_similarity(tokens.float(), reference, dim=-1).median() > 0.99


def test_rms_norms_of_a_half_graph_are_fp32(tmp_path: Path) -> None:
    model = MODELS["internvl"](layers=3, **RMS)
    kinds: dict[str, set[int]] = {}
    for names in ({"norms"}, set()):
        graph = graph_of(model, torch.float16, Islands(frozenset(names | {"pixels", "softmax", "similarity"})))
        exported = onnx.load(str(export_onnx(graph, F, geometry(model.config).size, tmp_path / "vision.onnx").path))
        found = {value.name: value.type.tensor_type.elem_type for value in exported.graph.value_info}
        found |= {tensor.name: tensor.data_type for tensor in exported.graph.initializer}
        operators = [node for node in exported.graph.node if node.op_type == "RMSNormalization"]
        assert len(operators) == 3 * 4  # two of each layer, and of its queries and keys
        kinds["norms" if names else "none"] = {
            found[name] for node in operators for name in [*node.input, *node.output]
        }
    assert kinds == {"norms": {onnx.TensorProto.FLOAT}, "none": {onnx.TensorProto.FLOAT16}}


def test_a_key_bias_that_a_norm_follows_is_kept() -> None:
    model = MODELS["internvl"](use_qk_norm=True)
    graph = graph_of(model, torch.float16, Islands())
    assert all(graph.tower.parts(layer).attention.k_proj.bias.any() for layer in graph.tower.layers)
