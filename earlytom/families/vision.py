"""The vision tower and projector of a model: its modules, and the interface through which the encoder runs them.

Notation as in `earlytom.families.family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.towers import Tower


class VisionModules(NamedTuple):
    """The vision modules of a transformers model.

    Attributes:
        vision_tower: [F, 3, H, W] to hidden states, of width D.
        projector: D to E.
        closing: [E], the embedding that closes visual tokens; None if there is none.
    """

    vision_tower: nn.Module
    projector: nn.Module
    closing: nn.Parameter | None


class Features(NamedTuple):
    """All visual tokens of the frames, before selection.

    Attributes:
        features: [F', P, E], tokens, with layer states concatenated if the LLM gets them.
        relevance: [F', P] fp32, received attention pooled to the same cells; None without received attention.
        projected: [F', S, E], the projector's output, for traces.
        cells: (rows, columns) of the P tokens of a frame.
    """

    features: Tensor
    relevance: Tensor | None
    projected: Tensor
    cells: tuple[int, int]


class Vision(ABC):
    """A model's vision tower and projector, as the encoder runs them.

    Attributes:
        tower: adapter of the vision tower.
        projector: the model's own.
    """

    def __init__(self, tower: Tower, projector: Any) -> None:
        self.tower, self.projector = tower, projector

    @abstractmethod
    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        """Patch hidden states [F', S, D] and received attention [F', S] through projector and pooling, in the family's
        order."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """As `Family.pool`."""

    def relevance(self, received: Tensor | None) -> Tensor | None:
        """Pool received attention [F', S] to `Features.relevance`."""
        return None if received is None else self.pool(received[:, :, None])[:, :, 0]

    def own(self, features: Tensor) -> Tensor:
        """Tokens [..., E] without the concatenated layer states; tokens are compared by these."""
        return features
