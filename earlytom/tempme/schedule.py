"""TempMe's schedule: how many tokens each layer of the encoder merges. It follows from numbers alone.

Before the first merge layer each frame merges a few of its tokens. At a merge layer neighbouring clips (of one frame,
at first) are joined and merge a share of their tokens before attention, and another share behind it; so do the layers
that follow.

The released form (`faithful`) has three quirks: too many tokens to merge are an error, not capped; a merge layer that
joins nothing counts its second share as if the first had been merged; and no temporal embedding is added where nothing
is merged before attention (see `earlytom.tempme.block`).

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
    """What one layer does to every clip.

    Attributes:
        group: m.
        across: tokens merged before attention, of the joined clip.
        within: tokens merged behind attention.
        protected: c once clips are joined.
        clips, tokens: clips of a video and tokens of each behind the layer.
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
    """Settings.

    Attributes:
        each: tokens that each layer before the first merge layer merges in every frame.
        merge_layers: 0-based, ascending.
        groups: how many clips each merge layer joins.
        across, within: percent of the tokens that a merge layer merges before attention and behind it; layers that
            follow the first merge layer merge `within`, too.
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
        """What each of `depth` layers does to `frames` frames of `tokens` tokens, of which `protected` lead each."""
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
        """What a merge layer merges before attention and behind it."""
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
