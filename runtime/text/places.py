"""Position ids and attention bias of a whole prompt, from those of its visual tokens.

A visual token keeps the place in the prompt that it had before tokens were left out: the newline and the text after it
stand where they would stand behind all of them. Tensors only, and no wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def places(
    prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int
) -> tuple[Tensor, Tensor]:
    """For a prompt of text, N visual tokens, a newline and text.

    Args:
        prefix_length: tokens before the visual ones.
        place: int64 [N], of each visual token in the video, frame * P + cell (P cells a frame).
        bias: fp32 [N], of each visual token.
        tokens_full: F * P, visual tokens if none had been left out; above every place.
        suffix_length: tokens after the newline; 0 for a prompt that is read up to there, whose rest goes on by itself.

    Returns:
        positions: int64 [L], L = prefix_length + N + 1 + suffix_length.
        bias: fp32 [L], 0 for text and newline.
    """
    after = prefix_length + tokens_full
    positions = torch.cat(
        (
            torch.arange(prefix_length, device=place.device),
            place + prefix_length,
            torch.arange(after, after + 1 + suffix_length, device=place.device),
        )
    )
    return positions, torch.nn.functional.pad(bias, (prefix_length, 1 + suffix_length))
