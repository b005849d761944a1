"""Latency of every setting, one clip at a time.

Nothing is shared: each setting runs its own pass over the frames, and its own prefill through the runtime's decoder.
Settings are interleaved on each clip, so that other load on the machine affects all; reported are medians over clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.evaluation.bench import EvaluationBench, Setting
from builder.evaluation.passes import ClipPasses
from builder.micro.packing import Standing
from earlytom.families import family_of
from earlytom.inner import InnerSettings
from earlytom.inner_decoder import apply_inner
from runtime.decoder.eager import Decoder
from runtime.measure.clock import Laps
from runtime.text.places import Placing
from runtime.text.prompt import Prompt, build_prompt, splice


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds.

    Attributes:
        vision: from frames to visual tokens.
        prefill: from visual tokens to the answer's first token.
        compression: the part of `vision` after the projector; a method's work inside the tower counts as the tower's.
            None in older records.
    """

    vision: float
    prefill: float
    compression: float | None = None

    @property
    def first_token(self) -> float:
        """From frames to the answer's first token."""
        return self.vision + self.prefill


def measure_times(bench: EvaluationBench, clips: Sequence[int], progress: Callable[[int], None]) -> list[Times]:
    """One `Times` for each of the bench's settings, over some clips of its split.

    Args:
        progress: called with the number of clips measured so far.
    """
    prefill = Prefill(bench.model, bench.tokenizer)
    seconds = np.empty((len(clips), len(bench.settings), 3))
    for done, index in enumerate(clips):
        clip, known = bench.clip(index)
        question = known.questions[0].text

        def one(setting: Setting, clip: ClipPasses = clip, question: str = question) -> tuple[float, float, float]:
            laps = Laps(bench.model.device, ("vision", "prefill"))
            alone = ClipPasses(bench.vision, clip.frames, clip.number)
            visual = setting.visual(alone)
            laps("vision")
            prefill(visual.tokens, question, setting.standing(alone, visual), visual.inner)
            laps("prefill")
            return laps.seconds["vision"], laps.seconds["prefill"], laps.seconds["vision"] - alone.seconds

        if not done:
            one(bench.settings[0])  # warms up
        seconds[done] = [one(setting) for setting in bench.settings]
        progress(done + 1)
    return [Times(*row) for row in (1000 * np.median(seconds, 0)).tolist()]


class Prefill:
    """The decoder of a model, up to an answer's first token."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._family = family_of(model.config)
        self._closing = self._family.closing(model.model)
        self._closings = self._family.closings(self._family.geometry(model.config).cells)
        self._decoder, self._language_model = Decoder.from_model(model), model.get_decoder()

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, question: str, standing: Standing | None = None, inner: InnerSettings | None = None
    ) -> int:
        """The first token id of the answer to a question about visual tokens [N, E]; `inner`: inner merging."""
        prompt = build_prompt(self._tokenizer, question, family=self._family)
        visual = self._closings.closed(tokens, None, self._closing)
        embeds = splice(prompt, visual, self._decoder.embed)
        told = {} if standing is None else _told(prompt, len(tokens), standing, self._closings.behind)
        with ExitStack() as stack:
            if inner is not None:
                place = torch.arange(embeds.shape[1])[None] - len(prompt.prefix_ids)
                applied = stack.enter_context(apply_inner(self._language_model, *inner))
                stack.enter_context(applied.prompt((place >= 0) & (place < len(tokens))))
            stream = stack.enter_context(closing(self._decoder.stream(embeds, max_new_tokens=1, **told)))
            return next(stream)


def _told(prompt: Prompt, count: int, standing: Standing, closing: int) -> dict[str, Any]:
    """The decoder's arguments for positions and bias of a prompt with `count` visual tokens."""
    place, bias = standing.place, standing.bias
    return Placing(original=place is not None, bias=bias is not None).of_prompt(
        len(prompt.prefix_ids),
        torch.zeros(count, dtype=torch.int64) if place is None else place,
        torch.zeros(count) if bias is None else bias,
        standing.full,
        len(prompt.suffix_ids),
        closing,
    )
