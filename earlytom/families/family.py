"""What a model family answers for: everything that is true of its models and of no other family's.

The rest of the project asks a `Family` and knows no model by name. Its parts: the geometry of a frame on its way to the
LLM, the vision part as the encoder runs it (`Vision`), the names of the tensors, what the vision part costs, and where
visual tokens stand in a prompt.

Notation: F' frames, S patch tokens a frame, P tokens a frame after projector and pooling, D tower width, E LLM width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from earlytom.towers import Tower


@dataclass(frozen=True)
class Geometry:
    """Frames of one size, from pixels to visual tokens.

    Attributes:
        size: (height, width) in pixels.
        patch: side of a patch, in pixels.
        grid: (rows, columns) of patches, which enter the tower.
        cells: (rows, columns) of tokens, which reach the LLM.
        step: frames of the video that the tower takes for one.
        depth: encoder layers that run.
        width: D; llm_width: E.
    """

    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    cells: tuple[int, int]
    step: int
    depth: int
    width: int
    llm_width: int

    @property
    def patches(self) -> int:
        """S."""
        return math.prod(self.grid)

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return math.prod(self.cells)


class Features(NamedTuple):
    """Frames as the LLM would see them before any token is left out.

    Attributes:
        features: [F', P, E].
        relevance: [F', P] fp32, received attention brought to the same cells; None if none was given.
        projected: [F', S, E], what the projector gave, for those who look inside.
        cells: (rows, columns) of the P tokens of a frame.
    """

    features: Tensor
    relevance: Tensor | None
    projected: Tensor
    cells: tuple[int, int]


class Vision(ABC):
    """The vision part of one model, as the encoder runs it.

    Attributes:
        tower: how pixels become hidden states, layer by layer.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower

    @abstractmethod
    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        """Patch hidden states [F', S, D] and received attention [F', S] through projector and pooling, in the family's
        order."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """Anything that patches have, [F', S, n], brought to the cells by the family's own pooling, [F', P, n]."""


class Family(ABC):
    """One model family; `config` is always the Hugging Face configuration of one of its models.

    Attributes:
        model_type: what such a configuration calls the family.
        model_class: transformers' class of the whole model.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]

    @abstractmethod
    def geometry(self, config: Any) -> Geometry:
        """Raises UserError for a configuration whose features EarlyTom cannot run on."""

    @abstractmethod
    def vision(self, tower: nn.Module, projector: nn.Module) -> Vision:
        """The vision part around a Hugging Face vision tower; nothing is copied.

        Raises:
            UserError: the tower has no adapter.
        """

    @abstractmethod
    def vision_of(self, model: Any) -> Vision:
        """The vision part of a whole transformers model (without its language-model head); nothing is copied."""

    @abstractmethod
    def canonical_name(self, name: str) -> str:
        """The name of a tensor without the prefixes in which the releases of transformers differ."""

    @abstractmethod
    def vision_flops(self, config: Any, frames_per_stage: Sequence[int], merge_layers: Sequence[int]) -> int:
        """Floating-point operations of tower and projector on one video, see `earlytom.flops`.

        Args:
            config: of the model.
            frames_per_stage: frames before the first merge and after each one.
            merge_layers: after which layers the frames are merged.
        """

    @abstractmethod
    def projector_flops(self, config: Any, frames: int) -> int:
        """Those of the projector alone, on `frames` frames."""

    @abstractmethod
    def vision_weights(self, config: Any) -> int:
        """How many values the weights of the vision part have."""

    @abstractmethod
    def video_token_id(self, config: Any) -> int:
        """The id that stands for one visual token in a prompt."""

    @abstractmethod
    def closing(self, model: Any) -> Tensor | None:
        """What follows the visual tokens of a video, [E]; None where nothing does. `model` as in `vision_of`."""

    @abstractmethod
    def placeholders(self, config: Any, frames: int) -> int:
        """How many placeholders the family's processor puts into a prompt for a video of `frames` frames."""
