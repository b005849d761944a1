"""Settings of methods that do not change the vision tower and can be built into an engine. Needs no PyTorch.

They merge no frames, so most of the attributes that an engine needs (`earlytom.settings`) are constants, and the number
of tokens follows from the number of frames. Each is the corrected form of a method in `earlytom.methods.published`,
with the same token counts.

Notation: F frames, P tokens a frame after projector and pooling.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from earlytom.budget import dynamic_tokens
from earlytom.config import Schedule, known
from earlytom.errors import UserError
from earlytom.numbers import real


@dataclass(frozen=True)
class UntouchedConfig(ABC):
    """The common base.

    Attributes:
        retention_ratio: share of the F * P tokens that should reach the LLM, in (0, 1]; each method rounds in its way.

    The class variables are no settings: see `earlytom.settings`.
    """

    method: ClassVar[str]
    watches: ClassVar[bool] = False
    bias: ClassVar[bool] = False
    original_positions: ClassVar[bool] = False
    inner_layer: ClassVar[None] = None
    merges_inside: ClassVar[bool] = False
    merge_layers: ClassVar[tuple[int, ...]] = ()
    frame_budget: ClassVar[float] = 1.0
    schedule: ClassVar[Schedule] = "budget"

    retention_ratio: float = 0.1

    def __post_init__(self) -> None:
        real("retention_ratio", self.retention_ratio, 0, 1, low_open=True)

    @abstractmethod
    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        """How many tokens of a video reach the LLM."""

    def check_layers(self, depth: int) -> None:  # noqa: B027  (what other settings check)
        """No restriction: these methods run in every tower."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises UserError on a key that is not a setting."""
        return cls(**known(cls, cls.method, values))


class VisionZipConfig(UntouchedConfig):
    """The same number of tokens of every frame."""

    method = "visionzip"
    watches = True

    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        return frames * dynamic_tokens(tokens_per_frame, self.retention_ratio)


class EVSConfig(UntouchedConfig):
    """The first frame stays whole."""

    method = "evs"
    original_positions = True

    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        return max(tokens_per_frame, int(self.retention_ratio * frames * tokens_per_frame))


class VidCom2Config(UntouchedConfig):
    """Every frame keeps at least one token."""

    method = "vidcom2"

    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        return max(frames, round(self.retention_ratio * frames * tokens_per_frame))


class DyCokeConfig(UntouchedConfig):
    """One frame of every `GROUP` stays whole; the others keep equal numbers of tokens."""

    method = "dycoke"
    GROUP: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retention_ratio < 1 / self.GROUP:
            raise UserError(
                f"dycoke keeps one frame of {self.GROUP} whole, so retention_ratio must be at least "
                f"{1 / self.GROUP:g}, got {self.retention_ratio}"
            )

    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        whole = -(-frames // self.GROUP)
        return whole * tokens_per_frame + (frames - whole) * self.of_others(tokens_per_frame)

    def of_others(self, tokens_per_frame: int) -> int:
        """Tokens kept of a frame that is not whole: rounded down, after removing floating-point noise."""
        share = (self.GROUP * self.retention_ratio - 1) / (self.GROUP - 1)
        return min(tokens_per_frame, math.floor(round(share * tokens_per_frame, 9)))


class ToMeConfig(UntouchedConfig):
    """Tokens are merged after the projector, within clips of gcd(F, `CLIP`) frames."""

    method = "tome"
    CLIP: ClassVar[int] = 1

    def tokens(self, frames: int, tokens_per_frame: int) -> int:
        clip = math.gcd(frames, self.CLIP)
        return frames // clip * tokens_of_clip(clip * tokens_per_frame, self.retention_ratio)


class TempMeConfig(ToMeConfig):
    """As ToMe, across the frames that its released schedule joins."""

    method = "tempme"
    CLIP = 8


def tokens_of_clip(tokens: int, ratio: float, protected: int = 0) -> int:
    """How many of a clip's `tokens` remain after merging, at least one more than the `protected` ones."""
    return max(protected + 1, round(ratio * tokens))


UNTOUCHED: tuple[type[UntouchedConfig], ...] = (
    VisionZipConfig,
    EVSConfig,
    VidCom2Config,
    DyCokeConfig,
    ToMeConfig,
    TempMeConfig,
)
