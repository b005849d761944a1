"""A row of the table: a way to make visual tokens of a clip, and the decoder's side information about them.

Notation: N tokens, E width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from builder.evaluation.passes import ClipPasses
from earlytom.inner import InnerSettings
from earlytom.method import Method
from runtime.text.places import Placing

Group = Literal["reference", "earlytom", "cells", "compared", "parts", "layers", "budgets", "controls", "engine"]
# Rows of these groups are measured at these ratios only, unless none of them is asked for.
FEW_RATIOS = {"layers": (0.1,), "budgets": (0.05, 0.1), "compared": (0.05, 0.1, 0.2)}
NOTHING, BOTH = Placing(), Placing(original=True, bias=True)


@dataclass(frozen=True)
class Visual:
    """The visual tokens of a clip, and what determines their cost.

    Attributes:
        tokens: [N, E].
        stages: numbers of frames in the tower before the first merge and after each one.
        merge_layers: layers after which frames were merged.
        place, bias: [N] int64 and fp32, see `earlytom.standing`; None if unknown.
        ran: with tokens merged inside the tower: (sequences, tokens of each) of each of its layers.
        inner: inner merging in the decoder, or None.
    """

    tokens: Tensor
    stages: tuple[int, ...]
    merge_layers: tuple[int, ...] = ()
    place: Tensor | None = None
    bias: Tensor | None = None
    ran: tuple[tuple[int, int], ...] = ()
    inner: InnerSettings | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: on the command line; title: in tables; group: see `Group`.
        scaled: whether it depends on the retention ratio.
        visual: makes the tokens of a clip at a ratio.
        told: the side information for the decoder, as far as `visual` has it.
    """

    name: str
    title: str
    group: Group
    scaled: bool
    visual: Callable[[ClipPasses, float], Visual]
    told: Placing = NOTHING

    def ratios(self, wanted: Sequence[float]) -> tuple[float | None, ...]:
        """The ratios at which it is measured, see `FEW_RATIOS`; (None,) if it does not depend on one."""
        if not self.scaled:
            return (None,)
        few = FEW_RATIOS.get(self.group, wanted)
        return tuple(ratio for ratio in wanted if ratio in few) or tuple(wanted)


def seen(clip: ClipPasses, method: Method, of: Method | None = None) -> Visual:
    """What `method` keeps of its own pass, or of that of `of`, a method with the same tower pass."""
    done = clip.run(of or method)
    kept = done.choose(method)
    layers = () if done.ran else (of or method).layers
    return Visual(kept.tokens, done.stages, layers, kept.place, kept.bias, done.ran, method.inner)
