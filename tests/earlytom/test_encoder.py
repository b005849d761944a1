"""The encoder as a whole: off is the untouched tower, on is the method step by step, nothing waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from earlytom import EarlyTomConfig, UserError, encode_video, frames_per_stage, plan_frames, select_tokens, token_count
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.families.llava_onevision import pool
from earlytom.merge import frame_similarity, segments_of
from earlytom.methods.earlytom import EarlyTom
from earlytom.spans import trace_names
from tests.earlytom.reference import adaptive_plan, budget_plan, dense, segments, select_positions
from tests.earlytom.tiny import FAMILIES, PATCH, made_video, tiny_projector, tiny_tower, untouched

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
BUDGET = EarlyTomConfig(retention_ratio=0.3, merge_layers=(0, 1, 2), tau=0.3, schedule="budget")
ADAPTIVE = BUDGET.replace(schedule="adaptive")


def encoded(family: str, video: Tensor, config: EarlyTomConfig, **options: Any) -> VisualTokens:
    return encode_video(tiny_tower(family), tiny_projector(), video, config, **options)


def traced(family: str, video: Tensor, config: EarlyTomConfig, trace: dict[str, Tensor]) -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower(family), tiny_projector())
    return encode(vision, video, EarlyTom(config), trace=trace)


# --- off


@pytest.mark.parametrize("grid", [1, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_off_is_the_untouched_tower_bit_for_bit(family: str, grid: int) -> None:
    model, video = tiny_tower(family, grid=grid), made_video("scenes", 4, grid=grid)
    out = encode_video(model, tiny_projector(), video, OFF)
    prefix = 1 if family in ("clip", "dinov2") else 0
    want = untouched(model, video).hidden_states[-1][:, prefix:]
    assert torch.equal(out.hidden, want)
    assert torch.equal(out.tokens, model_pooling(tiny_projector()(want), grid).flatten(0, 1))
    assert torch.equal(out.positions, torch.arange(4 * ((grid + 1) // 2) ** 2))
    assert torch.equal(out.sources, torch.eye(4))
    assert out.frames_per_stage == (4,)


@pytest.mark.parametrize("schedule", ["adaptive", "budget"])
@torch.no_grad()
def test_without_merging_the_hidden_states_are_untouched_at_any_ratio(schedule: str) -> None:
    model, video = tiny_tower("siglip"), made_video("scenes", 4)
    config = EarlyTomConfig(retention_ratio=0.3, merge_layers=(), schedule=schedule)  # type: ignore[arg-type]
    out = encode_video(model, tiny_projector(), video, config)
    assert torch.equal(out.hidden, untouched(model, video).hidden_states[-1])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attention = untouched(eager, video, output_attentions=True).attentions[-1]
    assert torch.allclose(out.received, attention.mean(dim=(1, 2)), atol=1e-6)
    assert len(out.tokens) < 36


@torch.no_grad()
def test_on_is_not_the_untouched_tower() -> None:
    """Negative control."""
    model, video = tiny_tower("siglip"), made_video("still", 6)
    out = encode_video(model, tiny_projector(), video, OFF.replace(merge_layers=(1,)))
    assert len(out.hidden) < 6
    assert not torch.equal(out.tokens[:9], encode_video(model, tiny_projector(), video, OFF).tokens[-9:])


def model_pooling(features: Tensor, grid: int) -> Tensor:
    """LLaVA-OneVision's own pooling, run on a stand-in for the model."""
    vision = SimpleNamespace(image_size=grid * PATCH, patch_size=PATCH)
    stand_in: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    return LlavaOnevisionModel.apply_pooling(stand_in, features)


@pytest.mark.parametrize("grid", [1, 2, 5, 8, 9, 27])
def test_pooling_is_the_models_own(grid: int) -> None:
    features = torch.randn(3, grid * grid, 7)
    assert torch.equal(pool(features), model_pooling(features, grid))


# --- on, step by step


@torch.no_grad()
def step_by_step(family: str, model: Any, video: Tensor, config: EarlyTomConfig) -> dict[str, Any]:
    """The method with the model's own eager layers and the sequential reference; decisions on the same similarities."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    prefix = 1 if family in ("clip", "dinov2") else 0
    layers = eager.encoder.layer if family == "dinov2" else eager.encoder.layers
    attention_of: Callable[[Any], Any] = lambda layer: layer.attention if family == "dinov2" else layer.self_attn  # noqa: E731
    options: dict[str, Any] = {key: getattr(config, key) for key in ("tau", "max_window", "ema")}
    hidden = untouched(eager, video).hidden_states[0]
    whole, counts = np.eye(len(video)), [len(video)]
    for index, layer in enumerate(layers):
        kept: list[Tensor] = []
        handle = attention_of(layer).register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[1]))
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        handle.remove()
        if index not in config.merge_layers:
            continue
        c = frame_similarity(hidden[:, prefix:]).tolist()
        if config.schedule == "adaptive":
            rows = adaptive_plan(c, **options, trailing=config.trailing)
        else:
            rows = budget_plan(c, round(0.75 * len(c)), **options, trailing=config.trailing)
        weights = dense(rows, len(c))
        received = torch.from_numpy(weights).float() @ kept[0].mean(dim=(1, 2))[:, prefix:]
        hidden = torch.einsum("if,f...->i...", torch.from_numpy(weights).float(), hidden)
        whole = weights @ whole
        counts.append(len(hidden))
        final = segments(frame_similarity(hidden[:, prefix:]).tolist(), **options)
    hidden = hidden[:, prefix:]
    features = model_pooling(tiny_projector()(hidden), 5)
    relevance = model_pooling(received[:, :, None], 5)[:, :, 0]
    positions = select_positions(
        relevance.tolist(), final, frames_in=len(video), ratio=config.retention_ratio, schedule=config.schedule
    )
    return {
        "hidden": hidden,
        "received": received,
        "segments": final,
        "counts": tuple(counts),
        "weights": whole,
        "positions": positions,
        "tokens": features.flatten(0, 1)[positions],
    }


@pytest.mark.parametrize("kind", ["noise", "drift", "scenes"])
@pytest.mark.parametrize("config", [ADAPTIVE, BUDGET, ADAPTIVE.replace(trailing="keep", merge_layers=(1, 3))])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_equals_the_sequential_method(family: str, config: EarlyTomConfig, kind: str) -> None:
    model, video = tiny_tower(family), made_video(kind, 12, seed=3)
    out, want = encode_video(model, tiny_projector(), video, config), step_by_step(family, model, video, config)
    assert out.frames_per_stage == want["counts"]
    assert out.segments.tolist() == [list(pair) for pair in want["segments"]]
    assert torch.allclose(out.hidden, want["hidden"], atol=1e-4)
    assert torch.allclose(out.received, want["received"], atol=1e-5)
    assert np.allclose(out.sources, want["weights"], atol=1e-5)
    assert out.positions.tolist() == want["positions"]
    assert torch.allclose(out.tokens, want["tokens"], atol=1e-4)


@pytest.mark.parametrize("config", [ADAPTIVE, BUDGET])
@pytest.mark.parametrize("family", FAMILIES)
def test_sources_are_the_product_of_the_stages(family: str, config: EarlyTomConfig) -> None:
    trace: dict[str, Tensor] = {}
    out = traced(family, made_video("drift", 12), config, trace)
    product = torch.eye(12)
    for layer, before, after in zip(config.merge_layers, out.frames_per_stage, out.frames_per_stage[1:], strict=False):
        weights = trace[f"weights_{layer}"]
        assert weights.shape == (after, before)
        product = weights @ product
    assert torch.equal(out.sources, product)
    assert out.sources.shape == (len(out.hidden), 12)
    assert torch.allclose(out.sources.sum(1), torch.ones(len(out.hidden)), atol=1e-5)
    assert bool((out.sources >= 0).all())
    assert out.sources[0, 0] > 0


def test_the_trace_holds_what_each_decision_was_made_of() -> None:
    trace: dict[str, Tensor] = {}
    out = traced("clip", made_video("drift", 8), BUDGET, trace)
    assert list(trace) == trace_names(BUDGET)
    for layer in BUDGET.merge_layers:
        hidden = trace[f"hidden_{layer}"][:, 1:]  # without the class token
        assert torch.equal(frame_similarity(hidden), trace[f"similarity_{layer}"])
        frames_out = len(trace[f"weights_{layer}"])
        again = plan_frames(hidden, tau=0.3, max_window=6, ema=0.9, schedule="budget", frames_out=frames_out)
        assert torch.equal(again.weights, trace[f"weights_{layer}"])
    tokens, positions = select_tokens(
        trace["features"], trace["relevance"], out.segments, frames_in=8, ratio=0.3, schedule="budget"
    )
    assert torch.equal(tokens, out.tokens)
    assert torch.equal(positions, out.positions)


def test_segments_are_those_of_the_last_merge_not_of_the_last_layer() -> None:
    config = ADAPTIVE.replace(merge_layers=(1,))
    video = made_video("scenes", 12, seed=3)
    short, long = encoded("siglip", video, config, depth=2), encoded("siglip", video, config)
    assert torch.equal(short.segments, long.segments)
    assert torch.equal(short.received, long.received)
    assert not torch.equal(short.hidden, long.hidden)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16, 32])
@pytest.mark.parametrize("kind", ["noise", "still", "scenes"])
def test_budget_shapes_do_not_depend_on_the_video(frames: int, kind: str) -> None:
    out = encoded("siglip", made_video(kind, frames), BUDGET)
    counts = frames_per_stage(frames)
    places = token_count(frames, 9, 0.3) // counts[-1]
    assert out.frames_per_stage == counts
    assert out.hidden.shape == (counts[-1], 25, 32)
    assert out.received.shape == (counts[-1], 25)
    assert out.tokens.shape == (counts[-1] * places, 24)
    assert torch.bincount(out.positions // 9).tolist() == [places] * counts[-1]


def test_adaptive_shapes_do_depend_on_the_video() -> None:
    """Negative control."""
    counts = {kind: encoded("siglip", made_video(kind, 16), ADAPTIVE).frames_per_stage for kind in ("noise", "still")}
    assert counts["noise"] != counts["still"]


def test_explicit_frame_counts() -> None:
    config = BUDGET.replace(frame_budget=(10, 10, 4))
    assert encoded("siglip", made_video("scenes", 12), config).frames_per_stage == (12, 10, 10, 4)
    with pytest.raises(UserError, match="frame budget 10 at merge 1 is more than the 8 frames"):
        encoded("siglip", made_video("scenes", 8), config)


@pytest.mark.parametrize("schedule", ["adaptive", "budget"])
def test_adaptive_static_frames_keep_fewer_when_dynamic_ones_keep_all(schedule: str) -> None:
    # 9 tokens a frame, r' = .92: 9 of a dynamic frame (8.28, rounded up), 8 of a static one (rounded)
    config = EarlyTomConfig(retention_ratio=0.92, merge_layers=(), tau=-1.0, schedule=schedule)  # type: ignore[arg-type]
    out = encoded("siglip", made_video("still", 5), config)
    static = 0 if schedule == "budget" else 3
    assert len(out.tokens) == 5 * 9 - static
    known: dict[str, int] = {"frames_out": 5} | ({"static_frames": 3} if schedule == "adaptive" else {})
    assert len(out.tokens) == token_count(5, 9, 0.92, schedule, **known)


@pytest.mark.parametrize("config", [OFF, ADAPTIVE, BUDGET])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_frames_are_not_merged(family: str, frames: int, config: EarlyTomConfig) -> None:
    out = encoded(family, made_video("still", frames), config)
    assert torch.equal(out.sources, torch.eye(frames))
    assert set(out.frames_per_stage) == {frames}
    assert len(out.tokens) == frames * (9 if config is OFF else 3)
    assert out.segments.tolist() == ([[0, 0]] if frames == 1 else [[0, 1]])


def test_repeated_frames_are_told_from_different_ones() -> None:
    video = made_video("noise", 4)[[0, 0, 0, 0, 1, 1, 1, 1]]
    out = encoded("siglip", video, ADAPTIVE.replace(merge_layers=(0,), tau=0.95, max_window=12))
    # Middle frames of equal similarity are no better than their ends: kept but for the trailing one.
    assert [[0, 2], [3, 5]] == segments_of(torch.tensor([0, 0, 0, 3, 3, 3])).tolist() == out.segments.tolist()
    assert out.frames_per_stage == (8, 6)


def test_depth_leaves_the_last_layers_out() -> None:
    model, video = tiny_tower("siglip"), made_video("noise", 2)
    out = encode_video(model, nn.Identity(), video, OFF, depth=2)
    assert torch.equal(out.hidden, untouched(model, video).hidden_states[2])


@pytest.mark.parametrize("config", [OFF, ADAPTIVE, BUDGET])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, dtype: torch.dtype, config: EarlyTomConfig) -> None:
    model, projector, video = tiny_tower(family), tiny_projector(), made_video("drift", 8)
    full = encode_video(model, projector, video, config)
    half = encode_video(model.to(dtype), projector.to(dtype), video.to(dtype), config)
    assert (half.tokens.dtype, half.hidden.dtype) == (dtype, dtype)
    assert (half.received.dtype, half.sources.dtype) == (torch.float32, torch.float32)
    assert bool(torch.isfinite(half.tokens).all())
    assert torch.allclose(half.received.sum(1), full.received.sum(1)[: len(half.received)], atol=0.05)
    if config.schedule == "budget" or config is OFF:
        assert half.tokens.shape == full.tokens.shape
    if torch.allclose(half.sources, full.sources, atol=1e-2):
        cosine = nn.functional.cosine_similarity(half.hidden.float(), full.hidden, dim=-1)
        assert float(cosine.min()) > 0.98
    if config is OFF:
        assert torch.allclose(half.tokens.float(), full.tokens, atol=0.3)


# --- no wait for the device


class NoHostSync(TorchDispatchMode):
    """Refuses an operator that moves data between the host and the (here imaginary) device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.dim() > 0]
        outputs = [a for a in torch.utils._pytree.tree_leaves(out) if isinstance(a, Tensor)]
        devices = {a.device.type for a in inputs + outputs}
        if len(devices) > 1:
            raise RuntimeError(f"{func} copies between {sorted(devices)}")
        return out


def on_device(family: str, config: EarlyTomConfig, frames: int = 12) -> VisualTokens:
    """Encode on a device that has no data at all: whatever needs a value on the host fails."""
    model, projector = tiny_tower(family, device="meta"), tiny_projector(device="meta")
    with NoHostSync():
        return encode_video(model, projector, torch.empty(frames, 3, 20, 20, device="meta"), config)


@pytest.mark.parametrize("trailing", ["released", "keep"])
@pytest.mark.parametrize("frames", [1, 2, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_schedule_never_asks_the_device_for_a_value(family: str, frames: int, trailing: str) -> None:
    out = on_device(family, BUDGET.replace(trailing=trailing), frames)
    assert out.tokens.shape == (token_count(frames, 9, 0.3), 24)
    assert out.positions.device.type == "meta"


def test_merging_off_never_asks_the_device_for_a_value() -> None:
    assert on_device("siglip", OFF).tokens.shape == (12 * 9, 24)
    assert on_device("siglip", BUDGET.replace(merge_layers=())).tokens.shape == (12 * 3, 24)


def test_the_public_parts_never_ask_the_device_for_a_value() -> None:
    hidden, features = torch.empty(12, 9, 8, device="meta"), torch.empty(6, 9, 8, device="meta")
    segments_ = torch.empty(2, 2, dtype=torch.int64, device="meta")
    with NoHostSync():
        plan = plan_frames(hidden, tau=0.8, max_window=6, ema=0.9, schedule="budget", frames_out=6)
        assert plan.apply(hidden).shape == (6, 9, 8)
        tokens, _ = select_tokens(features, features[:, :, 0], segments_, frames_in=12, ratio=0.3, schedule="budget")
    assert tokens.shape == (6 * 6, 8)


def test_the_check_finds_what_does_ask() -> None:
    """Negative control: the adaptive schedule must look; so does a constant that is made on the host."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_device("siglip", ADAPTIVE)
    with pytest.raises(RuntimeError, match="copies between"), NoHostSync():
        torch.arange(3).to("meta")
    with pytest.raises(RuntimeError), NoHostSync():
        torch.empty(3, device="meta").sum().item()


# --- refusals


@pytest.mark.parametrize("layers", [(4,), (0, 26), (6, 14, 20)])
def test_a_merge_layer_that_the_tower_lacks_is_refused(layers: tuple[int, ...]) -> None:
    wrong = next(layer for layer in layers if layer > 3)
    with pytest.raises(UserError, match=f"merge layer {wrong} does not exist: the vision tower has layers 0 to 3"):
        encoded("siglip", made_video("noise", 2), EarlyTomConfig(merge_layers=layers))


def test_a_merge_layer_beyond_the_depth_is_refused() -> None:
    with pytest.raises(UserError, match="merge layer 2 does not exist: the vision tower has layers 0 to 1"):
        encoded("siglip", made_video("noise", 2), BUDGET, depth=2)


@pytest.mark.parametrize("depth", [0, -1, 5])
def test_a_depth_that_the_tower_lacks_is_refused(depth: int) -> None:
    with pytest.raises(UserError, match=f"depth must be between 1 and 4 .* got {depth}"):
        encoded("siglip", made_video("noise", 2), OFF, depth=depth)


@pytest.mark.parametrize("shape", [(3, 20, 20), (0, 3, 20, 20), (1, 2, 3, 20, 20)])
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"pixels must be \[frames, 3, height, width\]"):
        encoded("siglip", torch.zeros(shape), OFF)
