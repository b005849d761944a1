"""The interface of a method, which decides which frames and which tokens of a video the LLM sees.

`earlytom.encoder` runs the vision tower and calls a `Method`'s hooks; `earlytom.methods` has all methods by name.

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
"""A callback that takes intermediate tensors by name."""
SEVERAL_NEED_BUDGET = "several videos at once keep equal numbers of frames, so the schedule must be budget, not {}"


@dataclass(frozen=True)
class Counts:
    """Frame and token counts that are known before the video is seen.

    Attributes:
        stages: frames before the first merge and after each one.
        tokens: N.
    """

    stages: tuple[int, ...]
    tokens: int


@dataclass
class State:
    """The state of one run. A method that must remember more extends it.

    Attributes:
        vision: the vision tower and projector that run.
        stages: frames of a video before the first merge and after each one so far.
        sources: [F', F] fp32, weight of each input frame in each remaining frame.
        cells: (rows, columns) of a frame's tokens; set after the projector.
        start: [F'] int64, first frame of each remaining frame's final segment; None for a method without segments.
        static: [F'] bool, the frames strictly inside their segment; None likewise.
        time, size: [F', P] int64 and fp32, for a method that merges cell by cell: the frame of the video that each
            token stands for, and the number of tokens merged into it; None where `sources` holds for whole frames.
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
        """F, the frames that entered the tower."""
        return self.stages[0]

    @property
    def ran(self) -> tuple[tuple[int, int], ...]:
        """(sequences, tokens of each) of every layer, for a method that merges tokens inside the tower; else empty."""
        return ()


class Method(ABC):
    """Decides which frames and which tokens of a video the LLM sees.

    A method holds frozen settings only; `begin` makes the per-run state that its hooks get. The hooks in the order in
    which `encode` calls them: `frames` before the tower, `after_layer` after each of `layers`, `look` once received
    attention is known, `choose` after the projector. Only `choose` must be defined; the others do nothing by default.

    Attributes:
        name: in `earlytom.methods.METHODS`.
        layers: the encoder layers, ascending, after which `after_layer` is called.
        videos: B, the videos of one run, one decision each.
        streams: whether it works on a tower whose hidden states carry earlier layers' states (`Tower.streams`).
        inner: merging of visual tokens inside the language model (see `earlytom.inner`); None for none.
    """

    name: ClassVar[str]
    streams: ClassVar[bool] = False
    layers: tuple[int, ...] = ()
    videos: int = 1
    inner: InnerSettings | None = None

    @classmethod
    @abstractmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings. Raises UserError for an unknown or invalid setting."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Its settings in plain JSON types; inverse of `from_dict`."""

    @abstractmethod
    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        """Frames and tokens kept of a video of `frames` frames; None if they depend on the video."""

    @abstractmethod
    def tower_key(self) -> Hashable:
        """Equal for two methods that do the same up to `choose`, so that one pass over a video serves both."""

    def check(self, depth: int) -> None:  # noqa: B027  (a hook)
        """Raise UserError if the method cannot run in a tower of which `depth` layers run."""

    def watched(self, depth: int) -> int | None:
        """The layer whose received attention the method needs, of `depth` that run; None for none."""
        return None

    def frames(self, count: int) -> Sequence[int]:
        """Before the tower: which of a video's `count` frames enter it; indices, ascending."""
        return range(count)

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        """The state of a new run on videos of `frames` frames each."""
        return State(vision, [frames], torch.eye(frames, device=device))

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        """Inside the tower, after one of `layers`: merge frames.

        Args:
            hidden: [F', T, D] of all remaining frames.
            received: [F', S] fp32 received attention; None until the watched layer has run.
            state: of the run; updated in place.
            note: gets the values that the decision is based on.

        Returns:
            both after merging.
        """
        return hidden, received

    def look(self, hidden: Tensor, state: State) -> None:  # noqa: B027  (a hook)
        """Called once, after the watched layer and its `after_layer`, with the frames' `hidden [F', T, D]`."""

    @abstractmethod
    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """After the projector: `features [F', P, E]` and `relevance [F', P]` to tokens [N, E] and positions [N]."""

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Place [N] int64 and bias [N] fp32 of the kept tokens at `positions [N]` of `features [F', P, E]`."""
        time, size = frame_times(state.sources)
        time, size = (time if state.time is None else state.time), (size if state.size is None else state.size)
        sizes = token_sizes(state.vision.own(features), positions, time, size, state.sources.shape[-1])
        return places(time, positions, features.shape[1]), size_bias(sizes)
