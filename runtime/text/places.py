"""Position ids and attention bias of a whole prompt, from those of its visual tokens.

A visual token keeps the place in the prompt that it had before tokens were left out: what closes them and the text
after it stand where they would stand behind all of them, and a text that names a frame stands before all tokens of that
frame. Tensors only, and no wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.transfers import to_device
from runtime.text.prompt import Prompt, Spans


@dataclass(frozen=True)
class Placing:
    """What a decoder is told of visual tokens besides themselves.

    Attributes:
        original: where they were in the video; else they stand one after the other, as if nothing had been left out.
        bias: how many of the video's tokens each stands for.
    """

    original: bool = False
    bias: bool = False

    def of_prompt(
        self, prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans | None = None
    ) -> dict[str, Tensor]:
        """`positions` and `bias` of a whole prompt; those that are not wanted are left out.

        Args:
            place, bias: of the visual tokens, as in `places`.
            frames, per_frame: F and P, of the video.
            spans: as in `Prompt`.
        """
        if not (self.original or self.bias):
            return {}
        if prompt.names is None:
            before, after = len(prompt.prefix_ids), len(prompt.suffix_ids)
            found = places(before, place, bias, frames * per_frame, after, prompt.closing)
        else:
            assert spans is not None
            found = places_by_frame(prompt, place, bias, frames, per_frame, spans)
        wanted = {"positions": self.original, "bias": self.bias}
        return {name: value for (name, wants), value in zip(wanted.items(), found, strict=True) if wants}


def places(
    prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int, closing: int = 1
) -> tuple[Tensor, Tensor]:
    """For a prompt of text, N visual tokens, `closing` tokens that close them, and text.

    Args:
        prefix_length: tokens before the visual ones.
        place: int64 [N], of each visual token in the video, frame * P + cell (P cells a frame).
        bias: fp32 [N], of each visual token.
        tokens_full: F * P, visual tokens if none had been left out; above every place.
        suffix_length: tokens after those; 0 for a prompt that is read up to there, whose rest goes on by itself.

    Returns:
        positions: int64 [L], L = prefix_length + N + closing + suffix_length.
        bias: fp32 [L], 0 for text and what closes.
    """
    after = prefix_length + tokens_full
    positions = torch.cat(
        (
            torch.arange(prefix_length, device=place.device),
            place + prefix_length,
            torch.arange(after, after + closing + suffix_length, device=place.device),
        )
    )
    return positions, torch.nn.functional.pad(bias, (prefix_length, closing + suffix_length))


def places_by_frame(
    prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans
) -> tuple[Tensor, Tensor]:
    """`places` for a prompt with a span a frame."""
    assert prompt.names is not None
    names = [0, *(len(prompt.names.before(number)) for number in range(1, frames))]
    begins = [len(prompt.prefix_ids) + sum(names[: n + 1]) + n * per_frame for n in range(frames)]  # of each frame
    frame = torch.div(place, per_frame, rounding_mode="trunc")
    offsets = to_device(torch.tensor(begins, dtype=torch.int64), place.device) - torch.arange(
        frames, device=place.device
    ).mul(per_frame)
    seen = place + offsets.index_select(0, frame)
    sizes = [span.tokens for span in spans]
    positions, weights = [], []
    for number, (visual, added) in enumerate(zip(seen.split(sizes), bias.split(sizes), strict=True)):
        end = begins[spans[number].number]
        length = names[spans[number].number] if number else len(prompt.prefix_ids)
        positions += [torch.arange(end - length, end, device=place.device), visual]
        weights += [bias.new_zeros(length), added]
    end, after = begins[-1] + per_frame, len(prompt.suffix_ids)
    positions.append(torch.arange(end, end + after, device=place.device))
    return torch.cat(positions), torch.cat([*weights, bias.new_zeros(after)])
