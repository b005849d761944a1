"""What a kept token stands for: its place in the video, and how many of the video's tokens it speaks for.

Tokens that are left out give their share of attention to whatever stays, the text first of all. So a decoder may be
told, for each visual token, the logarithm of the number of tokens that it stands for: for m identical keys softmax
attention equals that of one key with log m added to its logit. It may also be told where the token was in the video
rather than where it is among those kept.

Decided in fp32 by a fixed tensor program without host sync. Notation: F frames of the video, F' frames left, P tokens a
frame after pooling, E width, N tokens kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SMALLEST = 0.1
"""Of the tokens that one stands for: one that nothing belongs to keeps a little attention."""


SHARE_NOISE = 5e-5
"""Shares that differ by less are equal: those of copies differ by what rounding left of them."""


def frame_times(sources: Tensor) -> tuple[Tensor, Tensor]:
    """Of frames made of others: the frame that has the largest share in each, the first of equals, and how many have
    any. `sources [F', F]` to int64 [F'] and fp32 [F']."""
    largest = sources >= sources.amax(dim=-1, keepdim=True) - SHARE_NOISE
    return largest.float().argmax(dim=-1), (sources > 0).sum(dim=-1).float()


def places(time: Tensor, positions: Tensor, per_frame: int) -> Tensor:
    """Places in the video: `frame of the video * P + cell` [N] int64.

    Args:
        time: [F'] or [F', P] int64, the frame of the video that a frame, or each of its tokens, is taken to be.
        positions: [N] int64, `frame * P + cell`, frame counted among the F'.
    """
    slot = torch.div(positions, per_frame, rounding_mode="trunc")
    when = time.index_select(0, slot) if time.dim() == 1 else time.flatten().index_select(0, positions)
    return when * per_frame + (positions - slot * per_frame)


class FrameSpan(NamedTuple):
    """Kept tokens of one frame that follow one another.

    Attributes:
        number: the frame of the video that it is taken to be, from 0.
        tokens: how many.
    """

    number: int
    tokens: int


def frame_spans(positions: Tensor, sources: Tensor, per_frame: int) -> tuple[FrameSpan, ...]:
    """Kept tokens by frames, in their order; waits for the device.

    A frame made of others is taken to be the one that has the largest share in it (`frame_times`); the first span, and
    no other, is always frame 0, whose name a prompt begins with.

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
    """How many of the video's tokens each kept one stands for, fp32 [N]: every token belongs to the kept one that it is
    most alike, near ones being preferred; ties go to the first.

    Args:
        features: [F', P, E] after projector and pooling.
        positions: [N] int64, `frame * P + cell`.
        time: [F'] or [F', P] as in `places`.
        size: [F'] or [F', P] fp32, how many tokens of the video each token is made of.
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
    """Sizes of what belongs to each of N tokens: `alike [N, M]` and the sizes `count [M]` of all to fp32 [N], which add
    up to theirs. Of equally alike ones the first is the owner."""
    belongs = alike.argmax(dim=0)[None] == torch.arange(len(alike), device=alike.device)[:, None]
    return belongs.to(count.dtype) @ count


def size_bias(sizes: Tensor) -> Tensor:
    """What is added to the attention logits of tokens that stand for so many: fp32 [N]."""
    return sizes.clamp(min=SMALLEST).log()
