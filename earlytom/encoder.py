"""The vision encoder with EarlyTom inside: pixels of a video in, the tokens that reach the LLM out.

One function, `encode`, is the method; PyTorch and the exported graph both run it. What differs between them is only who
takes the data-dependent decisions (`Decisions`): here the operators of `earlytom.ops`, in the exporter nodes that name
ONNX functions. `encode_video` is `encode` on Hugging Face modules.

It has two parts. Up to the first merge no frame knows of another, so `head` can run on any of a clip's frames as they
come; `rest` needs them all. Both also take the frames of several videos: the layers run on all of them at once, and
each video gets decisions of its own (`EachVideo`).

Notation: B videos, F frames, F' frames left, T = S + prefix tokens a frame inside the tower, S patch tokens, P tokens
after pooling, D tower width, E LLM width, N tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earlytom import ops
from earlytom.budget import dynamic_tokens, effective_ratio, frames_per_stage, pooled_side, static_tokens
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.merge import apply_weights, segments_of
from earlytom.select import select_varying
from earlytom.spans import layer_spans
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
    """What the method decides by, and its two data-dependent steps, as the operators of `earlytom.ops`."""

    def __init__(self, config: EarlyTomConfig) -> None:
        self.config = config

    def similarity(self, hidden: Tensor) -> Tensor:
        """`hidden [F, S, D]` to [F, F] fp32."""
        return ops.frame_similarity(hidden)

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """`similarity [F, F]` to weights [F', F], segment start [F], static [F] bool. `None` frames: adaptive."""
        c = self.config
        weights, static, start, count = ops.frame_plan(similarity, frames_out, c.tau, c.max_window, c.ema, c.trailing)
        if frames_out is None:
            weights = weights[: int(count)]  # the adaptive schedule's one wait for the device
        return weights, start, static

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Exactly `places` tokens of every frame: tokens [F' * places, E], positions [F' * places]."""
        return ops.select_tokens(features, received, static, places)

    def select_varying(
        self, features: Tensor, received: Tensor, static: Tensor, places: int, windows: int
    ) -> tuple[Tensor, Tensor]:
        """`places` tokens of a dynamic frame, `windows` of a static one: tokens [N, E], positions [N]. Waits."""
        return select_varying(features, received, static, places, windows)


class EachVideo(Decisions):
    """The decisions of several videos whose frames lie one video after the other, each as `decisions` takes them.

    Frame counts are those of one video. What belongs to a video has a leading B: similarity [B, F, F], weights
    [B, F', F], segment start and static [B, F], tokens [B, N, E], positions [B, N].
    """

    def __init__(self, decisions: Decisions, videos: int) -> None:
        if decisions.config.schedule != "budget":
            raise UserError(
                f"several videos at once keep equal numbers of frames, so the schedule must be budget, not "
                f"{decisions.config.schedule}"
            )
        super().__init__(decisions.config)
        self.decisions = decisions
        self.videos = videos

    def similarity(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.decisions.similarity(one) for one in self._each(hidden)])

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, start, static = zip(*(self.decisions.plan(one, frames_out) for one in similarity), strict=True)
        return torch.stack(weights), torch.stack(start), torch.stack(static)

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        each = zip(self._each(features), self._each(received), static, strict=True)
        tokens, positions = zip(*(self.decisions.select(*one, places) for one in each), strict=True)
        return torch.stack(tokens), torch.stack(positions)

    def _each(self, values: Tensor) -> Tensor:
        """[B * F, ...] to [B, F, ...], a view."""
        return values.unflatten(0, (self.videos, -1))


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
    every_layer: bool = False,
) -> VisualTokens:
    """The method, against an adapter and a decision maker.

    Arguments as in `encode_video`; `trace` is filled with the named intermediate tensors of `trace_names`, of every
    layer if `every_layer` is set. With `EachVideo` for decisions, `pixels` are [B * F, 3, H, W], the videos one after
    the other; what `EachVideo` gives a leading B has it in the result and in the trace.
    """
    if pixels.dim() != 4 or pixels.shape[0] < 1:
        raise UserError(f"pixels must be [frames, 3, height, width] with a frame, got {list(pixels.shape)}")
    depth = checked_depth(tower, config, depth)

    def note(**values: Tensor) -> None:
        if trace is not None:
            trace.update(values)

    hidden, received = head(tower, pixels, config, depth, note, every_layer)
    return rest(tower, projector, hidden, received, config, decisions, depth, note, every_layer)


def checked_depth(tower: Tower, config: EarlyTomConfig, depth: int | None) -> int:
    """How many layers run, default all.

    Raises:
        UserError: a depth or a merge layer that the tower does not have.
    """
    available = len(list(tower.layers))
    if depth is not None and not 1 <= depth <= available:
        raise UserError(f"depth must be between 1 and {available} (the tower's layers), got {depth}")
    config.check_layers(depth or available)
    return depth or available


def head(
    tower: Tower,
    pixels: Tensor,
    config: EarlyTomConfig,
    depth: int,
    note: Callable[..., None] = lambda **_: None,
    every_layer: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The layers up to the first merge, on any frames: pixels [n, 3, H, W] to what `run_span` returns of them."""
    hidden = embed(tower, pixels)
    if config.merge_layers:
        # A convolution leaves them channels first, and sums keep the layout of their first term: every layer up to the
        # first merge would stride through memory, and comparing frames took 36 times as long. With merging off the
        # layers stay those of the untouched tower to the last bit.
        hidden = hidden.contiguous()
    return run_span(tower, layer_spans(config, depth)[0], hidden, config, note, every_layer)


def rest(
    tower: Tower,
    projector: nn.Module,
    hidden: Tensor,
    received: Tensor | None,
    config: EarlyTomConfig,
    decisions: Decisions,
    depth: int,
    note: Callable[..., None] = lambda **_: None,
    every_layer: bool = False,
) -> VisualTokens:
    """Everything from the first merge on: what `head` made of all frames, [F, T, D] and [F, S], to visual tokens."""
    videos = decisions.videos if isinstance(decisions, EachVideo) else 1
    frames = hidden.shape[0] // videos
    stages = planned_frames(frames, config)
    frame_weights = torch.eye(frames, device=hidden.device)
    counts = [frames]
    for stage, span in enumerate(layer_spans(config, depth)):
        column = received if stage == 0 else None
        if stage > 0:
            hidden, column = run_span(tower, span, hidden, config, note, every_layer)
        if stage < len(config.merge_layers):
            layer = config.merge_layers[stage]
            similarity = decisions.similarity(hidden[:, tower.prefix :])
            weights, _, _ = decisions.plan(similarity, stages[len(counts)])
            note(**{f"similarity_{layer}": similarity, f"weights_{layer}": weights})
            hidden = apply_weights(weights, hidden)
            frame_weights = weights @ frame_weights
            counts.append(weights.shape[-2])
            column = None if column is None else apply_weights(weights, column)
        if column is not None:
            kept = column
            # The final segments are those of the merged frames.
            final = decisions.similarity(hidden[:, tower.prefix :])
            _, start, static = decisions.plan(final, counts[-1])

    hidden = hidden[:, tower.prefix :]
    note(static=static)
    features, relevance = project(projector, hidden, kept, note, every_layer)
    tokens, positions = select(features, relevance, static, frames, config, decisions)
    note(tokens=tokens, positions=positions)
    return VisualTokens(tokens, positions, hidden, kept, start, tuple(counts), frame_weights)


def embed(tower: Tower, pixels: Tensor) -> Tensor:
    """Normalised pixels [F, 3, H, W] to the hidden states [F, T, D] that enter the first layer."""
    hidden = tower.embed(pixels)
    return hidden.to(tower.residual_dtype or hidden.dtype)


def run_span(
    tower: Tower,
    span: range,
    hidden: Tensor,
    config: EarlyTomConfig,
    note: Callable[..., None] = lambda **_: None,
    every_layer: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One of `layer_spans` on `hidden [F, T, D]`, without the merge at its end.

    Returns the new hidden states and, if this span ends with the layer that the selection goes by (the last merge
    layer; with merging off the last layer), its received attention [F, S].
    """
    received = None
    for index in span:
        layer = tower.layers[index]
        last = index == span[-1]
        if last and not config.merge_layers:
            # Beside the layer rather than within, so that with merging off every layer runs as in the untouched tower.
            received = tower.received(layer, hidden)
        hidden, column = tower.run_layer(layer, hidden, receive=index == max(config.merge_layers, default=None))
        received = received if column is None else column
        if every_layer or index in config.merge_layers:
            note(**{f"hidden_{index}": hidden})
    return hidden, received


def project(
    projector: nn.Module,
    hidden: Tensor,
    received: Tensor,
    note: Callable[..., None] = lambda **_: None,
    every_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Patch hidden states [F', S, D] and received attention [F', S] to features [F', P, E] and relevance [F', P]."""
    projected = projector(hidden)  # [F', S, E]
    features = pool(projected)
    relevance = pool(received[:, :, None])[:, :, 0]
    if every_layer:
        note(projected=projected)
    note(features=features, relevance=relevance)
    return features, relevance


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


def select(
    features: Tensor, relevance: Tensor, static: Tensor, frames: int, config: EarlyTomConfig, decisions: Decisions
) -> tuple[Tensor, Tensor]:
    """The tokens that stay of a video of `frames` frames, which are [F'] now: tokens [N, E], positions [N] int64."""
    kept, per_frame = static.shape[-1], features.shape[1]
    effective = effective_ratio(config.retention_ratio, frames, kept)
    places = dynamic_tokens(per_frame, effective)
    windows = places if config.schedule == "budget" else static_tokens(per_frame, effective)
    if places == windows == per_frame:  # nothing to leave out
        positions = torch.arange(kept * per_frame, device=features.device)
        tokens = features.reshape(*static.shape[:-1], len(positions), features.shape[2])
        return tokens, positions.expand(tokens.shape[:-1])
    if config.schedule == "budget":
        return decisions.select(features, relevance, static, places)
    return decisions.select_varying(features, relevance, static, places, windows)
