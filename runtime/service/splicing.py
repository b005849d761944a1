"""Splices a video's visual tokens into a prompt: embeddings, and the position ids and bias that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from earlytom.families import FrameTimes, family_named
from earlytom.standing import frame_spans
from runtime.decoder.protocol import TextDecoder
from runtime.engine.manifest import Manifest
from runtime.show.kept import grid_of
from runtime.text.axes import told_of, weights_of
from runtime.text.places import Placing
from runtime.text.prompt import Prompt, Spans, splice
from runtime.vision import Encoded


class Spliced(NamedTuple):
    """A prompt with its video.

    Attributes:
        embeds: [1, L, D].
        visual: places of the visual tokens in it.
        placed: further arguments of the decoder: positions, bias, states.
        after: position id of text that follows; None: that after the last token.
    """

    embeds: Tensor
    visual: Sequence[int]
    placed: dict[str, Tensor]
    after: int | None = None


class Splicing:
    """Puts the visual tokens of an engine into prompts.

    Args:
        closing: [D], embedding that closes a video or its parts; None where nothing does.
        placing: which positions and bias the visual tokens get.
    """

    def __init__(self, manifest: Manifest, closing: Tensor | None, placing: Placing) -> None:
        self.manifest, self.closing, self.placing = manifest, closing, placing
        self._family = family_named(manifest.model.family)
        self._grid = grid_of(manifest.tokens_per_frame, manifest.model.preprocessing.size)

    def __call__(self, decoder: TextDecoder, words: Prompt, encoded: Encoded, times: FrameTimes) -> Spliced:
        """Splice `encoded` into a prompt; `times` are those of the video's frames."""
        words = words.at(times)
        device, per_frame = decoder.device, self.manifest.tokens_per_frame
        spans = None if words.names is None else frame_spans(encoded.positions, encoded.sources, per_frame)
        closings = self.manifest.closings
        visual = closings.closed(encoded.tokens.to(device), encoded.positions, self.closing)
        embeds = splice(words, visual, decoder.embed, spans)
        place, bias = closings.placed(encoded.place.to(device), encoded.bias.to(device), encoded.positions)
        frames, before, after = encoded.sources.shape[-1], len(words.prefix_ids), len(words.suffix_ids)
        if self._family.on_axes:
            return self._on_axes(words, encoded, embeds, spans, times)
        if spans is None:
            placed = self.placing.of_prompt(before, place, bias, closings.span(frames), after, closings.behind)
        else:
            placed = self.placing.of_frames(words, place, bias, frames, per_frame, spans)
        end = self.placing.after(words, frames, closings)
        return Spliced(embeds, words.visual_span(len(visual), spans), placed, end)

    def _on_axes(
        self, words: Prompt, encoded: Encoded, embeds: Tensor, spans: Spans | None, times: FrameTimes
    ) -> Spliced:
        """The same for a family whose positions have axes (time, row, column) and whose tokens carry layer states."""
        tokens, place, bias = (values.to(embeds.device) for values in (encoded.tokens, encoded.place, encoded.bias))
        steps = self._family.time_steps(encoded.sources.shape[-1], self.placing.per_second, times)
        width, original = embeds.shape[2], self.placing.original
        placed, end = told_of(words, spans, tokens, place, self._grid, steps, width, original=original)
        if self.placing.bias:
            placed["bias"] = weights_of(words, spans, bias)
        return Spliced(embeds, words.visual_span(len(tokens), spans), placed, end)
