"""What a method is: who decides which frames and which tokens of a video the LLM sees.

`earlytom.encoder` runs a vision part around a `Method` and calls its hooks; `earlytom.methods` has them all by name.

Notation: B videos, F frames, F' frames left, T = S + prefix tokens a frame inside the tower, S patch tokens, P tokens
after pooling, E LLM width, N tokens kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from earlytom.families import Vision
from earlytom.inner import InnerSettings
from earlytom.standing import frame_times, places, size_bias, token_sizes

Note = Callable[..., None]
"""Told intermediate tensors by name."""
SEVERAL_NEED_BUDGET = "several videos at once keep equal numbers of frames, so the schedule must be budget, not {}"


@dataclass(frozen=True)
class Counts:
    """What is known of a video's tokens before it is seen.

    Attributes:
        stages: frames before the first merge and after each one.
        tokens: N.
    """

    stages: tuple[int, ...]
    tokens: int


@dataclass
class State:
    """What has become of one run's frames so far. A method that has to remember more extends it.

    Attributes:
        vision: the vision part that runs.
        stages: frames of a video before the first merge and after each one so far.
        sources: [F', F] fp32, what each frame left is made of.
        cells: (rows, columns) of the tokens of a frame; known from the projector on.
        start: [F'] int64, first frame of each remaining frame's final segment; None for a method without segments.
        static: [F'] bool, the frames strictly inside their segment; None likewise.
        time, size: [F', P] int64 and fp32, of a method that merges cell by cell: the frame of the video that a token is
            taken to be, and of how many tokens it is made; None where `sources` say it of whole frames.
    """

    vision: Vision
    stages: list[int]
    sources: Tensor
    cells: tuple[int, int] = (0, 0)
    start: Tensor | None = None
    static: Tensor | None = None
    time: Tensor | None = None
    size: Tensor | None = None

    @property
    def frames(self) -> int:
        """F, that entered the tower."""
        return self.stages[0]

    @property
    def ran(self) -> tuple[tuple[int, int], ...]:
        """Of a method that merges tokens inside the tower: sequences, and tokens of each, that every layer ran on."""
        return ()


class Method(ABC):
    """Who decides which frames and which tokens of a video the LLM sees.

    A method is made of frozen settings and holds nothing of a video; `begin` gives the state that its hooks are handed.
    The hooks, in the order in which `encode` calls them: `frames` before the tower, `after_layer` behind each of
    `layers`, `look` once received attention is known, `choose` after the projector. By default none does anything but
    `choose`, which every method must have.

    Attributes:
        name: in `earlytom.methods.METHODS`.
        layers: the encoder layers, ascending, after which `after_layer` is called.
        videos: B, about how many videos at once it decides.
        streams: whether it decides by hidden states and tokens alone where others are taken along (`Tower.streams`).
        inner: what is done to visual tokens inside the language model (see `earlytom.inner`); None leaves it alone.
    """

    name: ClassVar[str]
    streams: ClassVar[bool] = False
    layers: tuple[int, ...] = ()
    videos: int = 1
    inner: InnerSettings | None = None

    @classmethod
    @abstractmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings. Raises UserError for what is no setting of it, or makes no sense."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Its settings in plain JSON types; inverse of `from_dict`."""

    @abstractmethod
    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        """What it keeps of a video of `frames` frames; None if only the video tells."""

    @abstractmethod
    def tower_key(self) -> Hashable:
        """Equal for two methods that do the same up to `choose`, so that one pass over a video serves both."""

    def check(self, depth: int) -> None:  # noqa: B027  (a hook)
        """Raise UserError if it cannot act in a tower of which `depth` layers run."""

    def watched(self, depth: int) -> int | None:
        """The layer, of `depth` that run, whose received attention it needs; None if it needs none."""
        return None

    def frames(self, count: int) -> Sequence[int]:
        """Before the tower: which of a video's `count` frames enter it, ascending."""
        return range(count)

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        """The state of a new run on videos of `frames` frames each."""
        return State(vision, [frames], torch.eye(frames, device=device))

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        """Inside the tower, after one of `layers`: merge frames.

        Args:
            hidden: [F', T, D] of all frames left.
            received: [F', S] fp32 received attention, once the layer that is watched has run.
            state: of the run; brought up to date.
            note: told what it decides by.

        Returns:
            What is left of both.
        """
        return hidden, received

    def look(self, hidden: Tensor, state: State) -> None:  # noqa: B027  (a hook)
        """Once, behind the layer that is watched and what the method does there: `hidden [F', T, D]` of the frames."""

    @abstractmethod
    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """After the projector: `features [F', P, E]` and `relevance [F', P]` to tokens [N, E] and positions [N]."""

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """What the tokens at `positions [N]` of `features [F', P, E]` stand for: place [N] int64, bias [N] fp32."""
        time, size = frame_times(state.sources)
        time, size = (time if state.time is None else state.time), (size if state.size is None else state.size)
        sizes = token_sizes(state.vision.own(features), positions, time, size, state.sources.shape[-1])
        return places(time, positions, features.shape[1]), size_bias(sizes)
