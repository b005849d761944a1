"""Position ids and attention bias of a whole prompt, from those of its visual tokens.

With original positions every visual token has the position that it has in the uncompressed prompt, and so have closing
tokens, the text after the video, and texts that name a frame. A video with more frames than the model was made for is
scaled into the positions of that many, as the model does not know larger ones. Tensors only, and no wait for the
device.
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
    """Which positions and bias the visual tokens get.

    Attributes:
        original: their positions in the uncompressed video; else consecutive ones.
        bias: whether they get a bias for the number of tokens that each stands for.
        most: the most original positions of a video; None: as many as it has tokens.
        per_second: as `earlytom.families.Geometry.tokens_per_second`.
    """

    original: bool = False
    bias: bool = False
    most: int | None = None
    per_second: float | None = None

    def span(self, tokens_full: int) -> int:
        """The number of original positions of a video of `tokens_full` tokens."""
        return tokens_full if self.most is None else min(tokens_full, self.most)

    def of_prompt(
        self, prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int, closing: int = 1
    ) -> dict[str, Tensor]:
        """`positions` and `bias` of a whole prompt as `self` asks for them; arguments as in `places`."""
        if not (self.original or self.bias):
            return {}
        span = self.span(tokens_full)
        fits = fitted(place, tokens_full, span)
        return self._wanted(places(prefix_length, fits, bias, span, suffix_length, closing))

    def of_frames(
        self, prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans
    ) -> dict[str, Tensor]:
        """`of_prompt` for a prompt that names frames; arguments as in `places_by_frame`."""
        if not (self.original or self.bias):
            return {}
        shown = self.span(frames * per_frame) // per_frame
        return self._wanted(places_by_frame(prompt, place, bias, frames, per_frame, spans, shown))

    def after(self, prompt: Prompt, frames: int, closings: Closings) -> int | None:
        """Position of the text after a video of `frames` frames, so that a question after its prefix has the positions
        of a single prompt; None: after the last token."""
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
    """Places int64 [N] below `tokens_full`, scaled to lie below `span`; unchanged if that is no less."""
    return place if span >= tokens_full else place * span // tokens_full


def places(
    prefix_length: int, place: Tensor, bias: Tensor, tokens_full: int, suffix_length: int, closing: int = 1
) -> tuple[Tensor, Tensor]:
    """Positions and bias of a prompt of text, N visual tokens, `closing` closing tokens, and text.

    Args:
        prefix_length: tokens before the visual ones.
        place: int64 [N], of each visual token in the video, frame * P + cell (P cells a frame).
        bias: fp32 [N], of each visual token.
        tokens_full: F * P, visual tokens of the uncompressed video; above every place.
        suffix_length: tokens after those; 0 for a prefix that ends there.

    Returns:
        positions: int64 [L], L = prefix_length + N + closing + suffix_length.
        bias: fp32 [L], 0 for text and closing tokens.
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
    """Position of each frame's first token in the uncompressed prompt, for prompts with one span per frame."""
    assert prompt.names is not None
    names = [0, *(len(prompt.names.before(number)) for number in range(1, frames))]
    return [len(prompt.prefix_ids) + text + number * per_frame for number, text in enumerate(accumulate(names))]


def places_by_frame(
    prompt: Prompt, place: Tensor, bias: Tensor, frames: int, per_frame: int, spans: Spans, shown: int
) -> tuple[Tensor, Tensor]:
    """`places` for a prompt with one span per frame and no closing tokens.

    Args:
        frames, per_frame: F and P, of the video.
        spans: of the visual tokens, see `Prompt`.
        shown: number of frames, at most F, into whose positions the video is scaled.
    """
    lead, begins = len(prompt.prefix_ids), begins_of(prompt, frames, per_frame)
    names = [0, *(begin - before - per_frame for before, begin in pairwise(begins))]
    end, fits = (begins[last - 1] + per_frame - lead for last in (frames, shown))  # counted from the first text's end
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
