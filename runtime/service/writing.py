"""An answer while it is decoded: its text from token ids, stop strings, and the time of each step."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from runtime.service.requests import Delta, Finish
from runtime.text.stream import StopStrings, TextStream


class Writing:
    """One answer.

    Args:
        tokenizer: as in `TextStream`.
        stop: strings that end the answer.

    Attributes:
        ids: tokens so far.
        parts: their text, one part a token, and at the end what was held back.
        finish: why it ended.
        steps: begin and end of each step of the decoder (`time.perf_counter`); between two of them the caller has its
            time.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._text, self._stops = TextStream(tokenizer), StopStrings(stop)
        self.ids: list[int] = []
        self.parts: list[str] = []
        self.finish: Finish = "length"
        self.steps: list[tuple[float, float]] = []

    def deltas(self, source: Generator[int, None, Finish]) -> Generator[Delta, None, None]:
        """A `Delta` per token of `source`, the decoder, which is closed at the end."""
        with closing(source):  # and not left to the garbage: a traceback would keep it, and so the decoder busy
            while not self._stops.found:
                begun = time.perf_counter()
                try:
                    token = next(source)
                except StopIteration as end:
                    self.finish = end.value
                    break
                finally:
                    self.steps.append((begun, time.perf_counter()))
                self.ids.append(token)
                self.parts.append(self._stops.push(self._text.push(token)))
                yield Delta(self.parts[-1], token)
        self.parts.append(self._stops.push(self._text.finish()) + self._stops.finish())
        if self._stops.found:
            self.finish = "stop"

    @property
    def first(self) -> float:
        """When the first token was there."""
        return self.steps[0][1]

    @property
    def per_token(self) -> float:
        """Mean seconds of the decoder for each token after the first."""
        further = self.steps[1 : len(self.ids)]
        return sum(end - begun for begun, end in further) / len(further) if further else 0.0
