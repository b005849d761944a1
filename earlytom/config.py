"""The settings of EarlyTom.

`EarlyTomConfig` is frozen and validates itself: an invalid value is refused when the object is made, with one line that
says what is accepted. It knows no tensors and no model; where the model is known, `EarlyTomConfig.check_layers` checks
that the merge layers exist.

Released settings and their source: *EarlyTom: Early Token Compression Completes Fast Video Understanding*
(CVPR 2026, arXiv 2605.30010) and the scripts published with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from earlytom.errors import UserError
from earlytom.numbers import real, whole

Schedule = Literal["adaptive", "budget"]
Trailing = Literal["released", "keep"]

SCHEDULES: tuple[Schedule, ...] = ("adaptive", "budget")
TRAILINGS: tuple[Trailing, ...] = ("released", "keep")

# The depth for which the released merge layers were chosen: that of the tower they were released for.
RELEASED_LAYERS = 26

Released = tuple[str, float]
"""A benchmark and a retention ratio."""
Settings = tuple[float, tuple[int, ...]]
"""tau and merge layers."""

PRESETS: dict[str, dict[float, Settings]] = {
    "mvbench": {
        0.10: (0.65, (8, 14, 20)),
        0.15: (0.8, (6, 14, 20)),
        0.20: (0.8, (6, 14, 20)),
        0.25: (0.8, (6, 14, 20)),
    },
    "videomme": {
        0.10: (0.3, (10, 21, 23)),
        0.15: (0.4, (8, 21, 23)),
        0.20: (0.5, (8, 21, 23)),
        0.25: (0.7, (10, 21, 23)),
    },
    "longvideobench": {
        0.10: (0.3, (10, 21, 23)),
        0.15: (0.5, (10, 21, 23)),
        0.20: (0.6, (10, 21, 23)),
        0.25: (0.8, (4, 14, 24)),
    },
    "egoschema": {
        0.10: (0.3, (10, 21, 23)),
        0.15: (0.5, (10, 21, 23)),
        0.20: (0.6, (10, 21, 23)),
        0.25: (0.7, (10, 21, 23)),
    },
}


@dataclass(frozen=True)
class EarlyTomConfig:
    """Settings of the method.

    Attributes:
        retention_ratio: share of the `F * P` visual tokens that should reach the LLM, in (0, 1]; 1 keeps all.
        merge_layers: 0-based encoder layers after which frames are merged, ascending; empty turns merging off.
        tau: a new segment starts where the smoothed similarity to the segment's first frame falls below this, in
            [-1, 1].
        max_window: a segment holds at most `max(1, max_window - 1)` frames.
        ema: weight of the newest similarity in the running one, in (0, 1].
        trailing: an unpaired last middle frame of a segment is dropped ("released", as for the published numbers) or
            kept ("keep", as in the paper's text).
        schedule: "adaptive": the number of remaining frames depends on the video; "budget": it is fixed beforehand, so
            that every shape is static.
        frame_budget: budget schedule only: the share of frames that stays at each merge layer, in (0, 1], or one
            number of frames per merge layer.
        inner_layer: layer of the language model, from 1 on, before which visual tokens are merged during prefill (18 in
            the release); None turns that off.
        inner_ratio: share of the visual tokens that is merged away there, in [0, 1); 0 changes nothing.

    The class variables are no settings: see `earlytom.settings`.
    """

    method: ClassVar[str] = "earlytom"
    bias: ClassVar[bool] = False
    original_positions: ClassVar[bool] = False
    watches: ClassVar[bool] = True

    retention_ratio: float = 0.1
    merge_layers: tuple[int, ...] = (6, 14, 20)
    tau: float = 0.8
    max_window: int = 6
    ema: float = 0.9
    trailing: Trailing = "released"
    schedule: Schedule = "adaptive"
    frame_budget: float | tuple[int, ...] = 0.75
    inner_layer: int | None = None
    inner_ratio: float = 0.5

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the class is frozen; values are normalised once, here
        set_(self, "retention_ratio", real("retention_ratio", self.retention_ratio, 0, 1, low_open=True))
        set_(self, "tau", real("tau", self.tau, -1, 1))
        set_(self, "ema", real("ema", self.ema, 0, 1, low_open=True))
        set_(self, "max_window", whole("max_window", self.max_window, 1))
        set_(self, "merge_layers", layer_numbers(self.merge_layers))
        one_of("trailing", self.trailing, TRAILINGS)
        one_of("schedule", self.schedule, SCHEDULES)
        set_(self, "frame_budget", budget_counts(self.frame_budget, len(self.merge_layers)))
        if self.inner_layer is not None:
            set_(self, "inner_layer", whole("inner_layer", self.inner_layer, 1))
        set_(self, "inner_ratio", real("inner_ratio", self.inner_ratio, 0, 1, high_open=True))

    @classmethod
    def preset(
        cls, benchmark: str, retention_ratio: float, *, own: Mapping[Released, Settings] | None = None, **changes: Any
    ) -> EarlyTomConfig:
        """The released settings for a benchmark and a retention ratio, or the family's `own` (see `Family.presets`).

        Raises:
            UserError: there is no such benchmark, or it was not released at this ratio.
        """
        wanted = real("retention_ratio", retention_ratio, 0, 1, low_open=True)
        name = str(benchmark).lower().replace("-", "").replace("_", "")
        if name not in PRESETS:
            raise UserError(f"preset {benchmark!r} is not known: choose one of {', '.join(PRESETS)}")
        released = PRESETS[name]
        ratio = next((r for r in released if math.isclose(r, wanted, abs_tol=1e-9)), None)
        if ratio is None:
            raise UserError(
                f"preset {benchmark!r} was not released at retention ratio {wanted}: choose one of "
                f"{', '.join(map(str, released))}, or give --merge-layers and --tau without a preset"
            )
        tau, layers = (own or {}).get((name, ratio), released[ratio])
        settings: dict[str, Any] = {"retention_ratio": ratio, "tau": tau, "merge_layers": layers}
        return cls(**(settings | changes))

    @staticmethod
    def layers_for(depth: int, full: Sequence[int] | None = None) -> tuple[int, ...]:
        """The default merge layers of a tower with `depth` layers: the released 6, 14, 20 of 26 at the same relative
        depth, the last one moved to the nearest of `full`, those that may be watched (None: all). A tower with fewer
        than four layers has room for fewer merges."""
        return layers_for(depth, full)

    def check_layers(self, depth: int) -> None:
        """Raise UserError if a merge layer is not one of the tower's `depth` layers."""
        check_layers(self.merge_layers, depth)

    @property
    def merges_inside(self) -> bool:
        """Whether visual tokens are merged inside the language model, too (see `earlytom.inner`)."""
        return self.inner_layer is not None and self.inner_ratio > 0

    def replace(self, **changes: Any) -> EarlyTomConfig:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse.

        Without inner merging its settings are left out, so that older manifests and cache keys still match.
        """
        values = dataclasses.asdict(self)
        if self.inner_layer is None:
            del values["inner_layer"]
            if self.inner_ratio == type(self).inner_ratio:
                del values["inner_ratio"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EarlyTomConfig:
        """Inverse of `to_dict`. Raises UserError on a key that is not a setting."""
        return cls(**known(cls, cls.method, values))


def known(kind: Any, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from plain values, lists as tuples. Raises UserError on a key that is no field of `kind`."""
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(names)):
        raise UserError(f"unknown setting {unknown[0]!r} of method {method!r}: the settings are {', '.join(names)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def layers_for(depth: int, full: Sequence[int] | None = None) -> tuple[int, ...]:
    """See `EarlyTomConfig.layers_for`."""
    scaled = {round(layer * depth / RELEASED_LAYERS) for layer in (6, 14, 20)}
    layers = sorted(layer for layer in scaled if 0 <= layer < depth - 1)
    if full is None or not layers:
        return tuple(layers)
    *before, last = layers
    near = [layer for layer in full if layer > max(before, default=-1)]
    return *before, min(near, key=lambda layer: abs(layer - last), default=last)


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise UserError if one of the merge layers `layers` is not one of the tower's `depth` layers."""
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise UserError(
            f"merge layer {wrong[0]} does not exist: the vision tower has layers 0 to {depth - 1}; "
            f"choose others with --merge-layers, for example {','.join(map(str, layers_for(depth) or (0,)))}"
        )


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def layer_numbers(value: Any) -> tuple[int, ...]:
    """`merge_layers` as a setting: different layers, ascending. Raises UserError."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise UserError(f"merge_layers must be a list of layer numbers, got {value!r}")
    layers = tuple(whole("each of merge_layers", layer, 0) for layer in value)
    if list(layers) != sorted(set(layers)):
        raise UserError(f"merge_layers must be different and ascending, got {value!r}")
    return layers


def budget_counts(value: Any, merges: int) -> float | tuple[int, ...]:
    """`frame_budget` as a setting: a share, or a count for each of `merges` merge layers. Raises UserError."""
    if isinstance(value, (list, tuple)):
        counts = tuple(whole("each of frame_budget", count, 1) for count in value)
        if len(counts) != merges:
            raise UserError(
                f"frame_budget names {len(counts)} frame counts for {merges} merge layers: give one count per "
                "merge layer, or one share such as 0.75"
            )
        if list(counts) != sorted(counts, reverse=True):
            raise UserError(f"frame_budget must not grow from one merge layer to the next, got {list(counts)}")
        return counts
    return real("frame_budget", value, 0, 1, low_open=True)
