"""Base classes of the comparison methods. By default they act after the projector only and leave the tower as it is.

Each is a frozen dataclass of its settings. All have `retention_ratio`, the share of the F * P tokens to keep (methods
round differently, so report the actual count), and `faithful`: the released form with its quirks instead of the
corrected one. Never mix the two forms in one table.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from earlytom.config import known
from earlytom.errors import UserError
from earlytom.method import Counts, Method, State
from earlytom.numbers import real
from earlytom.settings import SETTINGS
from earlytom.untouched import UntouchedConfig


@dataclass(frozen=True)
class Compressing(Method):
    """A comparison method.

    Attributes:
        retention_ratio: in (0, 1].
        faithful: the released form.
        watches: whether the method needs received attention, that of the last layer that runs; not a setting.
    """

    watches: ClassVar[bool] = False
    retention_ratio: float = 0.1
    faithful: bool = False

    def __post_init__(self) -> None:
        real("retention_ratio", self.retention_ratio, 0, 1, low_open=True)
        if not isinstance(self.faithful, bool):
            raise UserError(f"faithful must be true or false, got {self.faithful!r}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        return cls(**known(cls, cls.name, settings))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        """Unknown before the video is seen; overridden where the numbers determine it."""
        return None

    def tower_key(self) -> Hashable:
        return "untouched", self.watches

    def watched(self, depth: int) -> int | None:
        return depth - 1 if self.watches else None


class Exported(Compressing):
    """A method that can be built into an engine: `by` is exported as it is, and no shape depends on tensor values."""

    streams = True

    @property
    def settings(self) -> UntouchedConfig:
        """The settings for an engine's builder; its token counts are the corrected form's."""
        kind = SETTINGS[self.name]
        assert issubclass(kind, UntouchedConfig)
        return kind(self.retention_ratio)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), self.settings.tokens(frames, tokens_per_frame))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        own = state.vision.own(features)
        return self.by(features, relevance, None if own is features else own)

    @abstractmethod
    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`choose` without the state; `metric [F, P, d]`, if given, is compared instead of the features."""
