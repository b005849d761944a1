"""Position ids and attention bias of a whole prompt, from those of its visual tokens.

A visual token keeps the place in the prompt that it had before tokens were left out: what closes them and the text
after it stand where they would stand behind all of them, and a text that names a frame stands before all tokens of that
frame. A video of more frames than the model was made for is fitted into the positions of as many as that: further ones
mean nothing to the model. Tensors only, and no wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from earlytom.families import Closings
from earlytom.transfers import to_device
from runtime.text.prompt import Prompt, Spans


@dataclass(frozen=True)
class Placing:
    """What a decoder is told of visual tokens besides themselves.

    Attributes:
        original: where they were in the video; else they stand one after the other, as if nothing had been left out.
        bias: how many of the video's tokens each stands for.
        most: original positions that a video may take; None: as many as it has tokens.
        per_second: as `earlytom.families.Geometry.tokens_per_second`.
    """

    original: bool = False
    bias: bool = False
    most: int | None = None
    per_second: float | None = None

    def span(self, tokens_full: int) -> int:
        """The original positions that a video of so many tokens takes."""
        return tokens_full if self.most is None else min(tokens_full, self.most)

    def of_prompt(
        self, prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int, closing: int = 1
    ) -> dict[str, Tensor]:
        """`positions` and `bias` of a whole prompt, see `places`; those that are not wanted are left out."""
        if not (self.original or self.bias):
            return {}
        span = self.span(tokens_full)
        fits = fitted(place, tokens_full, span)
        return self._wanted(places(prefix_length, fits, bias, span, suffix_length, closing))

    def of_frames(
        self, prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans
    ) -> dict[str, Tensor]:
        """`of_prompt` for a prompt that names frames, see `places_by_frame`."""
        if not (self.original or self.bias):
            return {}
        shown = self.span(frames * per_frame) // per_frame
        return self._wanted(places_by_frame(prompt, place, bias, frames, per_frame, spans, shown))

    def after(self, prompt: Prompt, frames: int, closings: Closings) -> int | None:
        """Where text behind a video of `frames` frames stands that was read up to its end, so that a question goes on
        as in one prompt; None: behind the last token."""
        if not self.original:
            return None
        span, per_frame = self.span(closings.span(frames)), closings.span(1)
        if prompt.names is None:
            return len(prompt.prefix_ids) + span + closings.behind
        return begins_of(prompt, span // per_frame, per_frame)[-1] + per_frame

    def _wanted(self, found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        wanted = {"positions": self.original, "bias": self.bias}
        return {name: value for (name, wants), value in zip(wanted.items(), found, strict=True) if wants}


def fitted(place: Tensor, tokens_full: int, span: int) -> Tensor:
    """Places int64 [N] below `tokens_full`, moved together to lie below `span`; as they are where that is no less."""
    return place if span >= tokens_full else place * span // tokens_full


def places(
    prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int, closing: int = 1
) -> tuple[Tensor, Tensor]:
    """For a prompt of text, N visual tokens, `closing` that close them, and text.

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


def begins_of(prompt: Prompt, frames: int, per_frame: int) -> list[int]:
    """Where the tokens of each frame of a video begin in a prompt with a span a frame, if none is left out."""
    assert prompt.names is not None
    names = [0, *(len(prompt.names.before(number)) for number in range(1, frames))]
    return [len(prompt.prefix_ids) + text + number * per_frame for number, text in enumerate(accumulate(names))]


def places_by_frame(
    prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans, shown: int
) -> tuple[Tensor, Tensor]:
    """`places` for a prompt with a span a frame and nothing that closes a video.

    Args:
        frames, per_frame: F and P, of the video.
        spans: of the visual tokens, see `Prompt`.
        shown: frames into whose positions the video is fitted, F or fewer.
    """
    lead, begins = len(prompt.prefix_ids), begins_of(prompt, frames, per_frame)
    names = [0, *(begin - before - per_frame for before, begin in pairwise(begins))]
    end, fits = (begins[last - 1] + per_frame - lead for last in (frames, shown))  # behind the first text
    shifts = torch.tensor([begin - number * per_frame for number, begin in enumerate(begins)], dtype=torch.int64)
    frame = torch.div(place, per_frame, rounding_mode="trunc")
    sizes = [span.tokens for span in spans]
    visual = (place + to_device(shifts, place.device).index_select(0, frame)).split(sizes)
    positions, weights = [], []
    for at, (seen, added) in enumerate(zip(visual, bias.split(sizes), strict=True)):
        begin, length = begins[spans[at].number], names[spans[at].number] if at else lead
        positions += [torch.arange(begin - length, begin, device=place.device), seen]
        weights += [bias.new_zeros(length), added]
    video = torch.cat(positions[1:])
    after = torch.arange(lead + fits, lead + fits + len(prompt.suffix_ids), device=place.device)
    moved = lead + fitted(video - lead, end, fits)
    return torch.cat([positions[0], moved, after]), torch.cat([*weights, bias.new_zeros(len(prompt.suffix_ids))])
