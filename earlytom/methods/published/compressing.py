"""What the comparison methods share that only choose after the projector: the tower runs untouched, and frames stay.

Each is a frozen dataclass of its settings, two of which all have: `retention_ratio`, the share of the F * P tokens it
is asked to keep (every method rounds in its own way: report how many there are), and `faithful`, the released form with
its quirks instead of the corrected one. The two forms never belong in one table.
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
    """See the module.

    Attributes:
        retention_ratio: in (0, 1].
        faithful: the released form.

    `watches` is no setting: whether the method needs received attention; it takes that of the last layer that runs.
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
        """Only the video tells, unless a method says otherwise."""
        return None

    def tower_key(self) -> Hashable:
        return "untouched", self.watches

    def watched(self, depth: int) -> int | None:
        return depth - 1 if self.watches else None


class Exported(Compressing):
    """One that can be built into an engine: an exporter writes `by` as it is, of shapes that follow from numbers."""

    streams = True

    @property
    def settings(self) -> UntouchedConfig:
        """What an engine's builder knows of it; it counts the tokens of the corrected form."""
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
        """`choose`, which needs no more than this; `metric [F, P, d]` decides in place of the features, if given."""
