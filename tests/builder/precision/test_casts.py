"""Precision: half weights with fp32 layer norms, and weights that half cannot hold are refused.

The second half is the proof: a checkpoint made to break half precision (`stress`), which an all-half graph does not
survive and ours does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from builder import build
from builder.export import vision
from builder.export.vision import VisionGraph, export_onnx, vision_graph
from builder.gate import accuracy
from builder.gate.drift import Tap, measure
from builder.precision.casts import TypedLayerNorm, TypedRMSNorm, set_precision, set_vision_precision
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom.errors import UserError
from earlytom.families import adapters
from earlytom.families.adapters import tower_of
from runtime.checkpoint import load_vision
from runtime.engine import layout
from runtime.engine.dtypes import DTYPES
from tests.builder.conftest import FRAMES, TAU
from tests.builder.precision.stress import NaiveSymbols, NaiveTower, naive_graph, plain_graph, stress_checkpoint

HALF = (torch.float16, torch.bfloat16)
LARGEST = torch.finfo(torch.float16).max


def block(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Sequential(nn.LayerNorm(width, eps=1e-3)))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_layer_norms_stay_fp32_and_the_rest_does_not(dtype: torch.dtype) -> None:
    module = set_precision(block(), dtype)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            assert isinstance(child, TypedLayerNorm)
            assert child.weight.dtype == child.bias.dtype == torch.float32
        elif isinstance(child, nn.Linear):
            assert child.weight.dtype == dtype
    assert module(torch.randn(2, 16, dtype=dtype)).dtype == dtype


def test_statistics_are_taken_in_fp32() -> None:
    """A mean far from zero: the squares of half values overflow, those of fp32 do not."""
    norm = set_precision(nn.LayerNorm(64), torch.float16)
    hidden = 20000 + 100 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.layer_norm(hidden.half().float(), (64,))
    got = norm(hidden.half())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2e-3)
    squares = hidden.half() ** 2
    assert squares.isinf().any()  # what would have gone wrong


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("kind", [Qwen2_5_VLRMSNorm, InternVLVisionRMSNorm])
def test_rms_norms_stay_fp32_too(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Values whose squares overflow half, and gains between its steps."""
    generator = torch.Generator().manual_seed(0)
    norm: Any = kind(64, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(64, generator=generator) * 2.0**-12)
    hidden = (2000 * torch.randn(4, 64, generator=generator)).to(dtype)
    wanted = norm(hidden.float())  # what transformers has in single precision
    torch.testing.assert_close(set_precision(norm, dtype)(hidden).float(), wanted, rtol=torch.finfo(dtype).eps, atol=0)
    assert isinstance(norm, TypedRMSNorm)
    assert norm.weight.dtype == torch.float32
    assert (norm(hidden * 1e-6).float().abs() < 1).all()  # the epsilon is its own
    norm.result = torch.float32
    assert norm(hidden).dtype == torch.float32


def test_an_rms_norm_without_fp32_has_half_gains_and_the_same_statistics() -> None:
    norm = set_precision(Qwen2_5_VLRMSNorm(64), torch.float16, norms=False)
    assert isinstance(norm, TypedRMSNorm)
    assert norm.weight.dtype == torch.float16
    hidden = 2000 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert (hidden.half() ** 2).isinf().any()  # what would go wrong
    torch.testing.assert_close(norm(hidden.half()), Qwen2_5_VLRMSNorm(64)(hidden).half(), rtol=0, atol=5e-3)


def test_layer_norm_keeps_its_own_weights_and_epsilon() -> None:
    module = block()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.LayerNorm):
                child.weight.copy_(torch.linspace(0.5, 2, 16))
                child.bias.copy_(torch.linspace(-1, 1, 16))
    before = module(torch.ones(1, 16).cumsum(1))
    after = set_precision(module, torch.float32)(torch.ones(1, 16).cumsum(1))
    assert torch.equal(before, after)


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_names_the_weight_and_the_remedy(sign: int) -> None:
    module = block()
    with torch.no_grad():
        module[0].weight[3, 4] = sign * 7e4  # type: ignore[index]
    with pytest.raises(UserError, match=r"weight 0\.weight holds 7e\+04.*--bf16 or --fp32") as caught:
        set_precision(module, torch.float16)
    assert "\n" not in str(caught.value)


def test_what_overflows_half_fits_in_bf16_and_fp32() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        module = block()
        with torch.no_grad():
            module[0].weight[3, 4] = 7e4  # type: ignore[index]
        assert set_precision(module, dtype)(torch.ones(1, 16, dtype=dtype)).isfinite().all()


def test_large_values_just_inside_half_are_taken() -> None:
    module = block()
    with torch.no_grad():
        module[0].weight[3, 4] = torch.finfo(torch.float16).max  # type: ignore[index]
    assert set_precision(module, torch.float16)[0].weight.isfinite().all()  # type: ignore[index]


def test_layer_norms_keep_their_fp32_weights() -> None:
    module = block()
    wanted = torch.full((16,), 1 + 2.0**-20)  # 1 in half
    with torch.no_grad():
        module[1].weight.copy_(wanted)  # type: ignore[index]
    assert torch.equal(set_precision(module, torch.float16)[1].weight, wanted)  # type: ignore[index]


def test_what_is_kept_wide_is_neither_rounded_nor_refused() -> None:
    module = block()
    with torch.no_grad():
        module[0].weight[3, 4] = 7e4  # type: ignore[index]
    kept = module[0].weight.clone()  # type: ignore[index]
    set_precision(module, torch.float16, wide=["0"], norms=False)
    assert torch.equal(module[0].weight, kept)  # type: ignore[index]
    assert module[1].weight.dtype == module[2][0].weight.dtype == torch.float16  # type: ignore[index]
    # A product takes its input in its own dtype, and a layer norm without fp32 works in half.
    assert module[0](torch.ones(1, 16, dtype=torch.float16)).dtype == torch.float32  # type: ignore[index]
    assert module[1](torch.ones(1, 16)).dtype == torch.float32  # type: ignore[index]


# ------------------------------------------------------------------------------------------- the stress checkpoint


@pytest.fixture(scope="module")
def stressed(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stress_checkpoint(small_checkpoint, tmp_path_factory.mktemp("stress") / "stressed")


@pytest.fixture(scope="module")
def reference(stressed: Path) -> VisionGraph:
    return vision_graph(config_of(stressed), torch.float32)


@pytest.fixture
def clip(clips: dict[str, Tensor]) -> Tensor:
    return clips["drawn0.mp4"]


def config_of(checkpoint: Path, *words: str) -> BuildConfig:
    given = ["--model", str(checkpoint), "--frames", str(FRAMES), "--tau", TAU, "--ratio", "0.3", "--backend", "onnx"]
    return parse([*given, *words])[1]


def lowest(taps: list[Tap]) -> float:
    """The lowest cosine; -1 where a value is not finite."""
    return min(-1.0 if tap.nonfinite else tap.cosine for tap in taps)


def test_the_stress_checkpoint_is_the_same_function(small_checkpoint: Path, stressed: Path, clip: Tensor) -> None:
    before, after = (plain_graph(config_of(path), torch.float64)(clip) for path in (small_checkpoint, stressed))
    assert torch.equal(before["positions"], after["positions"])
    for name in ("weights_1", "weights_2", "features", "relevance", "tokens"):
        # The explicit softmax is fp32 whatever the model is, and its logits are tens of thousands.
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=2e-4, msg=name)
    assert float(before["tokens"].abs().max()) > 1


def test_the_stress_checkpoint_is_at_thousands(reference: VisionGraph, clip: Tensor) -> None:
    layer = tower_of(reference.vision_tower).layers[2]
    attention = layer.self_attn
    made: dict[str, Tensor] = {}
    watched = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
    watched["neurons"] = layer.mlp.activation_fn
    hooks = [
        module.register_forward_hook(lambda module, given, out, name=name: made.update({name: out}))
        for name, module in watched.items()
    ]
    try:
        trace = reference(clip)
    finally:
        for hook in hooks:
            hook.remove()
    assert all(float(made[name].abs().max()) > 2500 for name in ("query", "value", "neurons"))
    query, key = (made[name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in ("query", "key"))
    logits = float((query @ key.transpose(2, 3)).abs().max())
    assert logits > LARGEST > logits * attention.head_dim**-0.5
    assert LARGEST > float(trace["hidden_2"].abs().max()) > 2e4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_all_half_breaks(
    stressed: Path,
    reference: VisionGraph,
    clip: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    config = config_of(stressed)
    monkeypatch.setattr(adapters, "tower_of", NaiveTower)
    monkeypatch.setattr(vision, "SymbolicDecisions", NaiveSymbols)
    graph = naive_graph(config, DTYPES[dtype])
    in_torch = graph(clip)["tokens"]
    exported = export_onnx(graph, FRAMES, (72, 72), tmp_path / layout.ONNX_FILE)
    monkeypatch.undo()
    taps = measure(exported.path, reference, clip, dtype)
    assert lowest(taps) < 0.9
    if dtype == "fp16":  # bf16 has the range, and not the digits
        assert {tap.name for tap in taps if tap.nonfinite} >= {"hidden_1", "features", "relevance", "tokens"}
        assert not in_torch.isfinite().all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_holds_by_default(
    stressed: Path, reference: VisionGraph, clips: dict[str, Tensor], tmp_path: Path, dtype: str
) -> None:
    clip = clips["drawn0.mp4"]
    config = config_of(stressed, f"--{dtype}")
    least = {"fp16": 0.9999, "bf16": 0.999}[dtype]
    graph = vision_graph(config, DTYPES[dtype])
    exported = export_onnx(graph, FRAMES, (72, 72), tmp_path / layout.ONNX_FILE)
    taps = measure(exported.path, reference, clip, dtype)
    assert len(taps) == 4 + 4  # layers, and what follows
    assert lowest(taps) > least, taps
    assert max(tap.channel_error for tap in taps) < {"fp16": 0.01, "bf16": 0.08}[dtype]
    if dtype == "fp16":  # ONNX Runtime runs no bf16, and fp16 with other roundings
        assert lowest(measure(exported.path, reference, clip, dtype, rounded=False)) > least
    # PyTorch's half kernels are a third opinion; nothing has been decided before the first merge.
    half, full = (one(clip)["hidden_1"].double().flatten() for one in (graph, reference))
    assert torch.cosine_similarity(half, full, dim=0) > least
    report, _ = accuracy.verify(exported.path, reference, clips, dtype)
    assert report.passed, report


def test_a_build_without_islands_fails(stressed: Path, tmp_path: Path) -> None:
    words = ["--model", str(stressed), "--frames", str(FRAMES), "--tau", TAU, "--ratio", "0.3", "--backend", "onnx"]
    words += ["--no-verify-text", "--json", "--out", str(tmp_path / "engines")]
    with pytest.raises(UserError, match=r"does not reproduce the model.*--layers"):
        build.main([*words, "--fp16", "--fp16-islands", "none"])
    assert not list((tmp_path / "engines").iterdir())


def test_the_bias_of_the_keys_is_what_half_could_not_bear(
    stressed: Path, reference: VisionGraph, clip: Tensor, tmp_path: Path
) -> None:
    """Softmax does not see it, so that the graph goes without; with it, the same graph does not hold."""
    config = config_of(stressed, "--fp16")
    graph = vision_graph(config, torch.float16)
    layers = tower_of(graph.vision_tower).layers
    assert all(not layer.self_attn.k_proj.bias.any() for layer in layers)
    for layer, source in zip(layers, tower_of(reference.vision_tower).layers, strict=True):
        layer.self_attn.k_proj.bias.data = source.self_attn.k_proj.bias.half()
    exported = export_onnx(graph, FRAMES, (72, 72), tmp_path / layout.ONNX_FILE)
    assert lowest(measure(exported.path, reference, clip, "fp16")) < 0.999


def test_fp32_keeps_every_weight(small_checkpoint: Path) -> None:
    config = config_of(small_checkpoint)
    part, untouched = (load_vision(config.checkpoint, torch.float32) for _ in range(2))
    set_vision_precision(part.vision_tower, part.projector, torch.float32)
    wanted = dict(untouched.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in part.named_parameters())
