"""What the comparison methods share that only choose after the projector: the tower runs untouched, and frames stay.

Each is a frozen dataclass of its settings, two of which all have: `retention_ratio`, the share of the F * P tokens it
is asked to keep (every method rounds in its own way: report how many there are), and `faithful`, the released form with
its quirks instead of the corrected one. The two forms never belong in one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from earlytom.config import known
from earlytom.errors import UserError
from earlytom.method import Counts, Method
from earlytom.numbers import real


@dataclass(frozen=True)
class Compressing(Method):
    """See the module.

    Attributes:
        retention_ratio: in (0, 1].
        faithful: the released form.
    """

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
        """One that needs received attention takes it from the last layer that runs."""
        return "untouched", type(self).watched is not Method.watched
