"""Place and bias of kept tokens: where each is in the video, and how many of the video's tokens it stands for.

Without the removed tokens, their share of attention goes to whatever stays, above all to the text. The bias corrects
this: softmax attention over m identical keys equals that over one key with log m added to its logit, so a decoder may
get, for each visual token, log of the number of tokens that it stands for. It may also get the token's position in the
video instead of that among the kept tokens.

Computed in fp32 by a fixed tensor program without host sync. Notation: F frames of the video, F' frames left, P tokens
a frame after pooling, E width, N tokens kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SMALLEST = 0.1
"""Least size of a token: one that no token belongs to keeps a little attention."""
SHARE_NOISE = 5e-5
"""Shares that differ by less count as equal: those of copied frames differ by rounding."""


def frame_times(sources: Tensor) -> tuple[Tensor, Tensor]:
    """From `sources [F', F]`: for each remaining frame the source frame with the largest share, the first of equals,
    int64 [F'], and the number of source frames, fp32 [F']."""
    largest = sources >= sources.amax(dim=-1, keepdim=True) - SHARE_NOISE
    return largest.float().argmax(dim=-1), (sources > 0).sum(dim=-1).float()


def places(time: Tensor, positions: Tensor, per_frame: int) -> Tensor:
    """Places in the video: `frame of the video * P + cell` [N] int64.

    Args:
        time: [F'] or [F', P] int64, the frame of the video that a remaining frame, or each of its tokens, stands for.
        positions: [N] int64, `frame * P + cell`, frame counted among the F'.
    """
    slot = torch.div(positions, per_frame, rounding_mode="trunc")
    when = time.index_select(0, slot) if time.dim() == 1 else time.flatten().index_select(0, positions)
    return when * per_frame + (positions - slot * per_frame)


class FrameSpan(NamedTuple):
    """Consecutive kept tokens of one frame.

    Attributes:
        number: the frame of the video that it stands for, from 0.
        tokens: their number.
    """

    number: int
    tokens: int


def frame_spans(positions: Tensor, sources: Tensor, per_frame: int) -> tuple[FrameSpan, ...]:
    """Group kept tokens by frame, in their order; waits for the device.

    A merged frame stands for the source frame with the largest share (`frame_times`). The first span, and no other, is
    always numbered 0, as a prompt begins with the name of frame 0.

    Args:
        positions: [N] int64, `frame * P + cell`, frame counted among the F'.
        sources: [F', F].
        per_frame: P.
    """
    slots, counts = torch.unique_consecutive(torch.div(positions, per_frame, rounding_mode="trunc"), return_counts=True)
    times = frame_times(sources)[0].tolist()
    found = zip(slots.tolist(), counts.tolist(), strict=True)
    return tuple(FrameSpan(max(times[slot], 1) if at else 0, count) for at, (slot, count) in enumerate(found))


def token_sizes(features: Tensor, positions: Tensor, time: Tensor, size: Tensor, frames: int) -> Tensor:
    """How many of the video's tokens each kept one stands for, fp32 [N]: every token belongs to the most similar kept
    one, with similarity decaying over time; ties go to the first.

    Args:
        features: [F', P, E] after projector and pooling.
        positions: [N] int64, `frame * P + cell`.
        time: [F'] or [F', P] as in `places`.
        size: [F'] or [F', P] fp32, number of the video's tokens merged into each token.
        frames: F.
    """
    kept, per_frame = features.shape[:2]
    tokens = features.float().flatten(0, 1)  # [M, E], M = F' * P
    direction = normalize(tokens - tokens.mean(dim=0), dim=-1)
    when = (time[:, None] if time.dim() == 1 else time).expand(kept, per_frame).flatten().float()
    count = (size[:, None] if size.dim() == 1 else size).expand(kept, per_frame).flatten()
    apart = (when.index_select(0, positions)[:, None] - when[None]).abs()
    alike = (direction.index_select(0, positions) @ direction.T) * torch.exp(-apart / frames)  # [N, M]
    return owned_sizes(alike, count)


def owned_sizes(alike: Tensor, count: Tensor) -> Tensor:
    """Total size of the tokens that belong to each kept one, fp32 [N], from `alike [N, M]` and all sizes `count [M]`. A
    token belongs to the kept one it is most alike, ties to the first, so the total is preserved."""
    belongs = alike.argmax(dim=0)[None] == torch.arange(len(alike), device=alike.device)[:, None]
    return belongs.to(count.dtype) @ count


def size_bias(sizes: Tensor) -> Tensor:
    """The bias of tokens of these sizes, added to their attention logits: log of the size, fp32 [N]."""
    return sizes.clamp(min=SMALLEST).log()
