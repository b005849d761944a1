"""The base class of a chain's stages, for every method; see `builder.export.chain`."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from torch import Tensor, nn

from builder.export.vision import VisionGraph
from earlytom.encoder import embed
from runtime.engine import layout


class StageGraph(nn.Module):
    """One stage, for the exporter: maps its inputs to all its values by name, the encoder's trace included.

    Args:
        whole: the vision part.
        stage: which one, from 0.
        frames: F.

    Attributes:
        of_tokens: ONNX functions it calls whose first two outputs have a row for each token.
    """

    of_tokens: ClassVar[tuple[str, ...]]

    def __init__(self, whole: VisionGraph, stage: int, frames: int) -> None:
        super().__init__()
        self.whole = whole  # "graph" is taken: the exporter has an attribute of that name
        self.stage = stage
        self.frames = frames
        self.stages = layout_of(whole, frames).graphs
        span = self.stages[stage].span
        assert span is not None  # the number of layers is known
        self.span = span

    @property
    def last(self) -> bool:
        return self.stage == len(self.stages) - 1

    @property
    def names(self) -> list[str]:
        """The keys of what `forward` returns, in its order."""
        graph = self.stages[self.stage]
        return [*graph.taps, *(tensor.name for tensor in graph.outputs if tensor.name not in graph.taps)]

    def enter(self, entering: Tensor) -> Tensor:
        """The hidden states to start from: the previous stage's, or the embeddings of frames."""
        return entering if self.stage else embed(self.whole.tower, self.whole.pixels(entering))

    def body(self, node: ir.Node) -> ir.Function:
        """The body of the function that a node of the stage calls."""
        raise NotImplementedError


def layout_of(graph: VisionGraph, frames: int) -> layout.Layout:
    """The layout of a chain, as far as its graphs need it."""
    return layout.Layout(graph.config, frames, sizes=layout.Sizes(layers=graph.layers))
