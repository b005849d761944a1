"""A prompt with its video in it, as a decoder is given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from earlytom.standing import frame_spans
from runtime.decoder.protocol import TextDecoder
from runtime.text.places import Placing
from runtime.text.prompt import Prompt, splice
from runtime.vision import Encoded


class Spliced(NamedTuple):
    """A prompt with its video: embeddings [1, L, D], where the visual tokens are in it, and what else the decoder is
    told of it."""

    embeds: Tensor
    visual: Sequence[int]
    placed: dict[str, Tensor]


class Splicer:
    """Puts visual tokens where a prompt has its video.

    Args:
        closing: [1, D], the token that closes a video's in a prompt; None where the family has none.
        placing: what the decoder is told of visual tokens besides themselves.
        per_frame: tokens of a whole frame.
    """

    def __init__(self, closing: Tensor | None, placing: Placing, per_frame: int) -> None:
        self.closing, self.placing, self.per_frame = closing, placing, per_frame

    def __call__(self, words: Prompt, encoded: Encoded, decoder: TextDecoder) -> Spliced:
        device, per_frame = decoder.device, self.per_frame
        spans = None if words.names is None else frame_spans(encoded.positions, encoded.sources, per_frame)
        embeds = splice(words, encoded.tokens.to(device), self.closing, decoder.embed, spans)
        place, bias = encoded.place.to(device), encoded.bias.to(device)
        frames, before, after = encoded.sources.shape[-1], len(words.prefix_ids), len(words.suffix_ids)
        if spans is None:
            placed = self.placing.of_prompt(before, place, bias, frames * per_frame, after, words.closing)
        else:
            placed = self.placing.of_frames(words, place, bias, frames, per_frame, spans)
        return Spliced(embeds, words.visual_span(len(encoded.tokens) + words.closing, spans), placed)
