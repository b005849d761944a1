"""The vision encoder with EarlyTom inside: pixels of a video in, the tokens that reach the LLM out.

One function, `encode`, is the method; the PyTorch reference and the exported graph both run it. What differs between
them is only who takes the two data-dependent decisions (`Decisions`): here plain PyTorch, in the exporter a node that
names an ONNX function. `encode_video` is `encode` on Hugging Face modules.

Notation: F frames, F' frames left, T = S + prefix tokens a frame inside the tower, S patch tokens, P tokens after
pooling, D tower width, E LLM width, N tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earlytom.budget import dynamic_tokens, effective_ratio, frames_per_stage, pooled_side, static_tokens
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.merge import apply_weights, frame_similarity, plan_similarity, segments_of, static_frames
from earlytom.select import keep_mask, select_fixed
from earlytom.towers import Tower, grid_side, tower_of


@dataclass(frozen=True)
class VisualTokens:
    """A video as the LLM will see it (without the closing newline).

    Attributes:
        tokens: [N, E] projected tokens, in time order, raster order within a frame.
        positions: [N] int64, `frame * P + cell`, frame counted among the F' frames.
        hidden: [F', S, D] patch hidden states after the last layer run.
        received: [F', S] fp32 received attention of the last merge layer, merged like the frames.
        segment_start: [F'] int64, first frame of each remaining frame's final segment.
        frames_per_stage: frames before the first merge and after each one.
        frame_weights: [F', F] fp32, what each remaining frame is made of; rows sum to one.
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    received: Tensor
    segment_start: Tensor
    frames_per_stage: tuple[int, ...]
    frame_weights: Tensor

    @property
    def segments(self) -> Tensor:
        """[G, 2] int64: first and last frame of each final segment, inclusive."""
        return segments_of(self.segment_start)


class Decisions:
    """The two data-dependent steps, in plain PyTorch."""

    def __init__(self, config: EarlyTomConfig) -> None:
        self.config = config

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """`similarity [F, F]` to weights [F', F], segment start [F], static [F] bool. `None` frames: adaptive."""
        c = self.config
        weights, start, end = plan_similarity(
            similarity, frames_out, tau=c.tau, max_window=c.max_window, ema=c.ema, trailing=c.trailing
        )
        return weights, start, static_frames(start, end)

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Exactly `places` tokens of every frame: tokens [F' * places, E], positions [F' * places]."""
        return select_fixed(features, received, static, places)


def encode_video(
    vision_model: nn.Module,
    projector: nn.Module,
    pixels: Tensor,
    config: EarlyTomConfig,
    *,
    depth: int | None = None,
) -> VisualTokens:
    """Encode one video.

    Args:
        vision_model: a Hugging Face vision tower with an adapter in `earlytom.towers`, for example SiglipVisionModel.
        projector: maps [F', S, D] to [F', S, E].
        pixels: [F, 3, H, W] normalised pixels in the tower's dtype.
        config: the method's settings.
        depth: how many layers to run; default all (the post layer norm is never applied).

    Raises:
        UserError: no frames, not four dimensions, or a depth or merge layer that the tower does not have.
    """
    return encode(tower_of(vision_model), projector, pixels, config, Decisions(config), depth=depth)


@torch.no_grad()
def encode(
    tower: Tower,
    projector: nn.Module,
    pixels: Tensor,
    config: EarlyTomConfig,
    decisions: Decisions,
    *,
    depth: int | None = None,
    trace: dict[str, Tensor] | None = None,
) -> VisualTokens:
    """The method, against an adapter and a decision maker.

    Arguments as in `encode_video`; `trace` is filled with the named intermediate tensors of `trace_names`.
    """
    if pixels.dim() != 4 or pixels.shape[0] < 1:
        raise UserError(f"pixels must be [frames, 3, height, width] with a frame, got {list(pixels.shape)}")
    layers = list(tower.layers)
    if depth is not None and not 1 <= depth <= len(layers):
        raise UserError(f"depth must be between 1 and {len(layers)} (the tower's layers), got {depth}")
    layers = layers[:depth]
    config.check_layers(len(layers))
    frames = pixels.shape[0]
    stages = planned_frames(frames, config)
    # The layer whose received attention and segments the selection goes by.
    deciding = config.merge_layers[-1] if config.merge_layers else len(layers) - 1

    def note(**values: Tensor) -> None:
        if trace is not None:
            trace.update(values)

    frame_weights = torch.eye(frames, device=pixels.device)
    counts = [frames]

    hidden = tower.embed(pixels)  # [F, T, D]
    for index, layer in enumerate(layers):
        if not config.merge_layers and index == deciding:
            # Beside the layer rather than within, so that with merging off every layer runs as in the untouched tower.
            received = tower.received(layer, hidden)
        hidden, column = tower.run_layer(layer, hidden, receive=index in config.merge_layers and index == deciding)
        if index in config.merge_layers:
            note(**{f"hidden_{index}": hidden})
            similarity = frame_similarity(hidden[:, tower.prefix :])
            weights, _, _ = decisions.plan(similarity, stages[len(counts)])
            note(**{f"similarity_{index}": similarity, f"weights_{index}": weights})
            hidden = apply_weights(weights, hidden)
            frame_weights = weights @ frame_weights
            counts.append(hidden.shape[0])
        if column is not None:
            received = apply_weights(weights, column)
        if index == deciding:
            # The final segments are those of the merged frames.
            final = frame_similarity(hidden[:, tower.prefix :])
            _, start, static = decisions.plan(final, hidden.shape[0])

    hidden = hidden[:, tower.prefix :]
    features = pool(projector(hidden))  # [F', P, E]
    relevance = pool(received[:, :, None])[:, :, 0]  # [F', P]
    note(static=static, features=features, relevance=relevance)
    tokens, positions = _select(features, relevance, static, frames, config, decisions)
    note(tokens=tokens, positions=positions)
    return VisualTokens(tokens, positions, hidden, received, start, tuple(counts), frame_weights)


def trace_names(config: EarlyTomConfig) -> list[str]:
    """The keys of a trace that `encode` fills, in the order in which they are computed."""
    per_layer = [f"{kind}_{layer}" for layer in config.merge_layers for kind in ("hidden", "similarity", "weights")]
    return [*per_layer, "static", "features", "relevance", "tokens", "positions"]


def planned_frames(frames: int, config: EarlyTomConfig) -> tuple[int | None, ...]:
    """Frames before the first merge and after each one; None where only the video will tell (adaptive schedule)."""
    merges = len(config.merge_layers)
    if config.schedule == "adaptive":
        return (frames, *([None] * merges))
    return frames_per_stage(frames, merges=merges, frame_budget=config.frame_budget)


def pool(features: Tensor) -> Tensor:
    """The model's own 2x pooling: bilinear, g x g to ceil(g/2) x ceil(g/2), on [F, g*g, E]. Returns [F, P, E]."""
    side = grid_side(features.shape[1])
    out = pooled_side(side)
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
    return nn.functional.interpolate(grid, size=(out, out), mode="bilinear").flatten(2).transpose(1, 2)


def _select(
    features: Tensor, relevance: Tensor, static: Tensor, frames: int, config: EarlyTomConfig, decisions: Decisions
) -> tuple[Tensor, Tensor]:
    kept, per_frame, _ = features.shape
    effective = effective_ratio(config.retention_ratio, frames, kept)
    places = dynamic_tokens(per_frame, effective)
    windows = places if config.schedule == "budget" else static_tokens(per_frame, effective)
    if places == windows == per_frame:  # nothing to leave out
        return features.flatten(0, 1), torch.arange(kept * per_frame, device=features.device)
    if config.schedule == "budget":
        return decisions.select(features, relevance, static, places)
    mask = keep_mask(relevance, static, places, windows)
    positions = mask.flatten().nonzero().squeeze(1)
    return features.flatten(0, 1)[positions], positions
