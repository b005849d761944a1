"""Settings of methods that leave the vision tower as it is and can be built into an engine. Needs no PyTorch.

They merge no frames, so that what an engine asks of settings (`earlytom.settings`) is mostly fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from earlytom.config import Schedule, known
from earlytom.numbers import real


@dataclass(frozen=True)
class VisionZipConfig:
    """Settings of VisionZip, corrected form.

    Attributes:
        retention_ratio: share of the tokens of every frame that should reach the LLM, in (0, 1].

    The others are no settings: see `earlytom.settings`.
    """

    method: ClassVar[str] = "visionzip"
    bias: ClassVar[bool] = False
    original_positions: ClassVar[bool] = False
    inner_layer: ClassVar[None] = None
    merges_inside: ClassVar[bool] = False
    watches: ClassVar[bool] = True
    merge_layers: ClassVar[tuple[int, ...]] = ()
    frame_budget: ClassVar[float] = 1.0
    schedule: ClassVar[Schedule] = "budget"

    retention_ratio: float = 0.1

    def __post_init__(self) -> None:
        real("retention_ratio", self.retention_ratio, 0, 1, low_open=True)

    def check_layers(self, depth: int) -> None:
        """It acts in every tower."""

    def replace(self, **changes: Any) -> VisionZipConfig:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionZipConfig:
        """Inverse of `to_dict`. Raises UserError on a key that is not a setting."""
        return cls(**known(cls, cls.method, values))
