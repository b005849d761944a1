"""TempMe's schedule: how many tokens each layer of the encoder merges. It depends on settings and token counts only.

Before the first merge layer each layer merges a few tokens in every frame. At a merge layer neighbouring clips (of one
frame at first) are joined; a share of their tokens is merged before attention, and another share after it. The layers
after the first merge layer merge the second share only.

The released form (`faithful`) has three quirks: a too large `each` is an error, not capped; a merge layer that joins
nothing computes its second share as if the first had been merged; and no temporal embedding is added where nothing is
merged before attention (see `earlytom.tempme.block`).

Notation: m clips are joined to one, n tokens a clip, the first c of them protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from earlytom.bipartite import set_sizes
from earlytom.errors import UserError
from earlytom.numbers import real, whole


@dataclass(frozen=True)
class LayerMerge:
    """One layer's merging in every clip.

    Attributes:
        group: m.
        across: tokens of the joined clip merged before attention.
        within: tokens merged after attention.
        protected: c after joining.
        clips, tokens: clips of a video and tokens of each after the layer.
        merge_layer: which of the merge layers this is; None for others.
    """

    group: int
    across: int
    within: int
    protected: int
    clips: int
    tokens: int
    merge_layer: int | None = None


@dataclass(frozen=True)
class TempMeSchedule:
    """Settings of TempMe.

    Attributes:
        each: tokens that each layer before the first merge layer merges in every frame.
        merge_layers: 0-based, ascending.
        groups: clips that each merge layer joins to one.
        across, within: percent of the tokens that a merge layer merges before and after attention; other layers after
            the first merge layer merge `within` only.
        faithful: the released form.
    """

    each: int = 2
    merge_layers: tuple[int, ...] = (8, 9, 10)
    groups: tuple[int, ...] = (2, 2, 3)
    across: int = 30
    within: int = 10
    faithful: bool = False

    def __post_init__(self) -> None:
        whole("each", self.each, 0)
        for name in ("merge_layers", "groups"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise UserError(f"{name} must be a list of whole numbers, got {values!r}")
            object.__setattr__(
                self, name, tuple(whole(f"each of {name}", value, 1 if name == "groups" else 0) for value in values)
            )
        if list(self.merge_layers) != sorted(set(self.merge_layers)):
            raise UserError(f"merge_layers must be different and ascending, got {self.merge_layers}")
        if len(self.groups) != len(self.merge_layers):
            raise UserError(
                f"groups names {len(self.groups)} sizes for {len(self.merge_layers)} merge layers: give one per layer"
            )
        real("across", self.across, 0, 100)
        real("within", self.within, 0, 100)

    def plan(self, frames: int, tokens: int, depth: int, *, protected: int = 0) -> list[LayerMerge]:
        """The merging of `depth` layers on `frames` frames of `tokens` tokens, of which the first are `protected`."""
        clips, plan, started = frames, [], False
        for layer in range(depth):
            which = self.merge_layers.index(layer) if layer in self.merge_layers else None
            group, across = 1, 0
            if which is not None:
                started, group = True, self.groups[which]
                if clips % group:
                    raise UserError(f"merge layer {layer} joins {group} clips each, and {clips} arrive: change groups")
                across, within = self._shares(tokens, group, protected)
                protected, tokens, clips = protected * group, tokens * group - across, clips // group
            elif started:
                within = min((tokens - protected) // 2, int(tokens * (self.within / 100)))
            else:
                within = self._each(tokens, protected)
            tokens -= within
            plan.append(LayerMerge(group, across, within, protected, clips, tokens, which))
        return plan

    def _shares(self, tokens: int, group: int, protected: int) -> tuple[int, int]:
        """Tokens that a merge layer merges before and after attention."""
        free, all_of = (tokens - protected) * group, tokens * group
        across = min(free // 2, int(all_of * (self.across / 100)))
        if group == 1 and not self.faithful:
            across = 0
        within = min((free - across) // 2, int((all_of - across) * (self.within / 100)))
        return across if group > 1 else 0, within

    def _each(self, tokens: int, protected: int) -> int:
        most = min(set_sizes(tokens, protected))
        if self.faithful and self.each > most:
            raise UserError(f"of {tokens} tokens, {protected} protected, at most {most} merge, got each={self.each}")
        return min(self.each, most)
