"""EarlyTom without any of this project's optimisations: the baseline for them.

The method step by step as described, adaptive schedule: attention is materialised in every layer, in fp32; segments,
merges and selection are Python loops over frames, which copy each number that they use to the host. Its decisions equal
those of `earlytom.encoder` (a test compares them), with which it shares only the model: embeddings, layers, pooling.

Notation: F frames, F' frames left, S patch tokens, P tokens after pooling, H heads, D tower width, E LLM width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, Family
from earlytom.merge import SIMILARITY_STEPS

Segments = list[tuple[int, int]]  # first and last frame, inclusive


@dataclass(frozen=True)
class NaiveTokens:
    """A compressed video: `tokens [N, E]`, `positions [N]` int64 (`frame * P + cell`), the final segments and the
    numbers of frames before the first merge and after each one."""

    tokens: Tensor
    positions: Tensor
    segments: Segments
    frames_per_stage: tuple[int, ...]


@torch.no_grad()
def encode_naive(
    vision_model: nn.Module,
    projector: nn.Module,
    pixels: Tensor,
    config: EarlyTomConfig,
    *,
    depth: int,
    family: Family = DEFAULT_FAMILY,
) -> NaiveTokens:
    """Encode one video with the adaptive schedule.

    Args:
        vision_model: one of the family's own towers.
        projector: [F', S, D] to [F', S, E].
        pixels: [F, 3, H, W], normalised, in the tower's dtype.
        config: the method's settings; its schedule must be "adaptive".
        depth: number of layers that run.
    """
    tower: Any = vision_model
    if config.schedule != "adaptive" or not family.released or tower.config.model_type not in family.towers:
        raise UserError(
            f"the naive baseline has the adaptive schedule and a {family.tower_title} tower, got {config.schedule} and "
            f"{tower.config.model_type}: measure without it (--variants)"
        )
    config.check_layers(depth)
    hidden = tower.embeddings(pixels)  # [F, S, D]
    counts = [len(hidden)]
    for index in range(depth):
        hidden, attention = _layer(tower.encoder.layers[index], hidden)
        if index in config.merge_layers:
            received = attention.mean(dim=(1, 2))  # [F, S]
            hidden, received = _merge(hidden, received, find_segments(hidden, config), config)
            segments = find_segments(hidden, config)
            counts.append(len(hidden))
    if not config.merge_layers:
        received, segments = attention.mean(dim=(1, 2)), find_segments(hidden, config)
    features, relevance, *_ = family.vision(vision_model, projector).features(hidden, received)  # [F', P, E], [F', P]
    assert relevance is not None
    positions = _select(relevance, segments, counts[0], config.retention_ratio)
    return NaiveTokens(features.flatten(0, 1)[positions], positions, segments, tuple(counts))


def _layer(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One encoder layer on `hidden [F, S, D]`: its output, and its attention [F, H, S, S] in fp32."""
    module = layer.self_attn
    entering = layer.layer_norm1(hidden)
    query, key, value = (
        projection(entering).unflatten(2, (-1, module.head_dim)).transpose(1, 2)  # [F, H, S, d]
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    logits = query @ key.transpose(2, 3) * module.head_dim**-0.5
    attention = torch.softmax(logits, dim=-1, dtype=torch.float32)
    attended = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + module.out_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), attention


def similarity(hidden: Tensor, one: int, other: int) -> float:
    """Mean over tokens of the cosine between frames `one` and `other` of `hidden [F, S, D]`.

    Rounded as in `earlytom.merge`: otherwise equal frames could differ by the order of summation.
    """
    cosine = nn.functional.cosine_similarity(hidden[one].float(), hidden[other].float(), dim=-1)  # [S]
    return round(cosine.mean().item() * SIMILARITY_STEPS) / SIMILARITY_STEPS


def find_segments(hidden: Tensor, config: EarlyTomConfig) -> Segments:
    """The segments of `hidden [F, S, D]`."""
    first, running = 0, 1.0
    segments = []
    for frame in range(1, len(hidden)):
        running = config.ema * similarity(hidden, first, frame) + (1 - config.ema) * running
        if running < config.tau or frame - first + 1 >= config.max_window:
            segments.append((first, frame - 1))
            first, running = frame, 1.0
    return [*segments, (first, len(hidden) - 1)]


def _merge(hidden: Tensor, received: Tensor, segments: Segments, config: EarlyTomConfig) -> tuple[Tensor, Tensor]:
    """`hidden [F, S, D]` and `received [F, S]` after the merge, with F' frames."""
    mixtures = [mixture for segment in segments for mixture in _mixtures(hidden, *segment, config)]

    def merged(x: Tensor) -> Tensor:
        out = []
        for mixture in mixtures:
            parts = [weight * x[frame] for frame, weight in mixture]
            out.append(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return torch.stack(out)

    return merged(hidden), merged(received)


def _mixtures(hidden: Tensor, first: int, last: int, config: EarlyTomConfig) -> list[list[tuple[int, float]]]:
    """The merge of one segment: for each remaining frame, its source frames and their weights."""
    last_middle = last - 1
    if last_middle - first < 2:  # at most one frame in the middle
        return [[(frame, 1.0)] for frame in range(first, last + 1)]
    threshold = similarity(hidden, first, last)
    out = [[(first, 1.0)]]
    frame = first + 1
    while frame < last_middle:
        near = similarity(hidden, frame, frame + 1)
        pair_is_last = frame + 1 == last_middle
        far = 0.0 if pair_is_last else similarity(hidden, frame + 1, frame + 2)
        if near > threshold and (pair_is_last or near > far):
            share = 1.0 if pair_is_last or near <= 0 else near / (near + max(far, 0.0))
            out.append([(frame, share), (frame + 1, 1 - share)])
            frame += 2
        else:
            out.append([(frame, 1.0)])
            frame += 1
    if frame == last_middle and config.trailing == "keep":
        out.append([(frame, 1.0)])
    return [*out, [(last, 1.0)]]


def _select(relevance: Tensor, segments: Segments, frames_in: int, ratio: float) -> Tensor:
    """Positions [N] of the kept tokens, from `relevance [F', P]`."""
    frames, per_frame = relevance.shape
    effective = min(ratio / (frames / frames_in), 1.0)
    kept: list[int] = []
    for first, last in segments:
        for frame in range(first, last + 1):
            choose = _windows if first < frame < last else _best
            cells = choose(relevance[frame], effective)
            kept += [frame * per_frame + cell for cell in cells]
    return torch.tensor(kept, device=relevance.device)


def _best(relevance: Tensor, effective: float) -> list[int]:
    """The kept cells of a dynamic frame, `relevance [P]`: those of highest received attention, in raster order."""
    places = math.ceil(len(relevance) * effective)
    return sorted(relevance.sort(descending=True, stable=True).indices[:places].tolist())


def _windows(relevance: Tensor, effective: float) -> list[int]:
    """The kept cells of a static frame, `relevance [P]`: the best one of each window."""
    windows = max(1, round(len(relevance) * effective))
    size, longer = divmod(len(relevance), windows)
    cells, begin = [], 0
    for window in range(windows):
        end = begin + size + (window < longer)
        cells.append(begin + int(relevance[begin:end].argmax()))
        begin = end
    return cells
