"""A row of the table: a way of getting visual tokens of a clip, and what the decoder is told of them.

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
# Choices of merge layers, of frames that stay there, and the field's methods are measured at these ratios only.
FEW_RATIOS = {"layers": (0.1,), "budgets": (0.05, 0.1), "compared": (0.05, 0.1, 0.2)}
NOTHING, BOTH = Placing(), Placing(original=True, bias=True)


@dataclass(frozen=True)
class Visual:
    """What the decoder sees of a clip, and what the tower did for it.

    Attributes:
        tokens: [N, E].
        stages: frames that the tower ran on before the first merge and after each one.
        merge_layers: after which layers the frames were merged.
        place, bias: [N] int64 and fp32, see `earlytom.standing`; None where nobody knows.
        ran: where tokens were merged inside the tower, (sequences, tokens of each) that each of its layers ran on.
        inner: what the decoder does with them on its way; None lets all of them through.
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
    """One way, as a row of the table.

    Attributes:
        name: on the command line; title: in tables; group: what it is compared as.
        scaled: whether the retention ratio matters.
        visual: of a clip at a ratio.
        told: what the decoder is told of the tokens, as far as it is known.
    """

    name: str
    title: str
    group: Group
    scaled: bool
    visual: Callable[[ClipPasses, float], Visual]
    told: Placing = NOTHING

    def ratios(self, wanted: Sequence[float]) -> tuple[float | None, ...]:
        """At which of the wanted ratios it is measured; (None,) where the ratio does not matter."""
        if not self.scaled:
            return (None,)
        few = FEW_RATIOS.get(self.group, wanted)
        return tuple(ratio for ratio in wanted if ratio in few) or tuple(wanted)


def seen(clip: ClipPasses, method: Method, of: Method | None = None) -> Visual:
    """What `method` keeps of its own pass, or of that of another method that leaves the tower as it does."""
    done = clip.run(of or method)
    kept = done.choose(method)
    layers = () if done.ran else (of or method).layers
    return Visual(kept.tokens, done.stages, layers, kept.place, kept.bias, done.ran, method.inner)
