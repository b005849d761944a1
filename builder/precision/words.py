"""Words for layers, as options that choose parts of a tower take them: "mlp:20-25" is the MLPs of layers 20 to 25."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from earlytom.errors import UserError


def layers_in(text: str, word: str, depth: int, option: str) -> range:
    """The layers named by `text`, the part of `word` after its colon, in a tower of which `depth` layers run."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < depth:
        raise UserError(f"{option} {word!r}: give a layer, or a range such as {word.partition(':')[0]}:0-{depth - 1}")
    return range(first, last + 1)


def runs_of(name: str, layers: Iterable[int]) -> Iterator[str]:
    """Runs of layers as words: {1, 2, 3, 7} to "mlp:1-3" and "mlp:7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return (f"{name}:{run[0]}" if len(run) == 1 else f"{name}:{run[0]}-{run[-1]}" for run in runs)
