"""The baseline without video: each question gets the most frequent answer to its text in the training split.

A task whose answers cannot be guessed from the text leaves this at chance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from earlytom.micro.data import Question, labelled_clip
from earlytom.micro.data.scene import FRAMES

_NO_FRAMES = np.empty(0, np.intp)


def questions_of(split: str, index: int, seed: int, length: int = FRAMES) -> tuple[Question, ...]:
    """The questions about a clip of `length` frames, without drawing it."""
    return labelled_clip(split, index, seed=seed, times=_NO_FRAMES, length=length).questions


class Blind:
    """Answer frequencies from the questions about `clips` training clips."""

    def __init__(self, clips: int, seed: int) -> None:
        self._by_text: dict[str, Counter[str]] = defaultdict(Counter)
        self._by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        for index in range(clips):
            for question in questions_of("train", index, seed):
                self._by_text[question.text][question.answer] += 1
                self._by_kind[question.kind][question.answer] += 1

    def answer(self, question: Question) -> str:
        """The guess; for an unknown text the kind's most frequent answer, for an unknown kind ""."""
        counts = self._by_text.get(question.text) or self._by_kind.get(question.kind)
        # Ties go to the alphabetically first answer, whatever the order of reading.
        return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""

    def right(self, asked: Sequence[Question]) -> NDArray[np.bool_]:
        """[Q] whether each guess is right."""
        return np.array([self.answer(question) == question.answer for question in asked], np.bool_)
