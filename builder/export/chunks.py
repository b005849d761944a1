"""The budget schedule as two graphs, cut at the first merge, for clips whose frames arrive one by one.

    head    frames [C, 3, H, W] -> the layers up to the first merge -> hidden [C, T, D]
    rest    hidden [F, T, D] -> the merge, the remaining layers, projector, pooling, selection -> the engine's outputs

A clip of F frames runs the head F / C times and the rest once. With at most one merge the head also returns received
attention [C, S], for methods that use it. Each graph holds its own layers, so no weight is stored twice; both have
static shapes. `runtime.engine.layout` names files and tensors; values keep the names of the encoder's trace.

Notation: F frames, C frames of a chunk, T = S + prefix tokens a frame inside the tower, D its width.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from builder.export.vision import ExportedGraph, VisionGraph, form_of, save, trace
from builder.settings.options import check_chunk
from earlytom.encoder import head, rest
from earlytom.methods import method_of
from runtime.engine import layout


class HeadGraph(nn.Module):
    """The head, for the exporter: uint8 frames [C, 3, H, W] to its values by name; `part` is its layout."""

    def __init__(self, whole: VisionGraph, part: layout.Graph) -> None:
        super().__init__()
        self.whole = whole
        self.part = part

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        whole = self.whole
        method = method_of(whole.config)
        _, received = head(
            whole.tower, whole.pixels(frames), method, whole.layers, lambda **found: values.update(found), True
        )
        return values if received is None else values | {layout.RECEIVED: received}

    @property
    def last(self) -> str:
        """The name of the last layer's result."""
        return self.part.taps[-1]

    @property
    def names(self) -> list[str]:
        """The keys of what `forward` returns, in its order."""
        return [*self.part.taps, *(tensor.name for tensor in self.part.outputs if tensor.name != layout.HIDDEN)]


class RestGraph(nn.Module):
    """The rest, for the exporter: the head's outputs for all F frames to the other values of the encoder's trace.

    `names` are the keys of what `forward` returns, in its order.
    """

    def __init__(self, whole: VisionGraph, part: layout.Graph) -> None:
        super().__init__()
        self.whole = whole
        self.names = list(part.taps)

    def forward(self, hidden: Tensor, received: Tensor | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        whole = self.whole
        rest(
            whole.vision,
            hidden,
            received,
            form_of(whole.decisions).calls(whole),
            whole.layers,
            lambda **found: values.update(found),
            True,
        )
        return values | {layout.TOKENS: values[layout.TOKENS].to(whole.dtype)}


def export_chunks(
    graph: VisionGraph, frames: int, chunk: int, size: tuple[int, int], folder: Path
) -> tuple[ExportedGraph, ExportedGraph]:
    """Write the head and the rest, each with a weights file beside it where its weights are large.

    Args:
        graph: from `VisionGraph`, in the precision of the engine.
        frames: F.
        chunk: C.
        size: (H, W) of a frame.
        folder: where the files go, see `runtime.engine.layout.Graph.file`.
    """
    check_chunk(chunk, frames, graph.config.schedule)
    parts = layout.Layout(graph.config, frames, chunk=chunk, sizes=layout.Sizes(layers=graph.layers)).graphs
    first, second, form = HeadGraph(graph, parts[0]), RestGraph(graph, parts[1]), form_of(graph.decisions)
    paths = [folder / part.file(layout.ONNX_FILE) for part in parts]
    between, outputs = ([tensor.name for tensor in part.outputs] for part in parts)
    some = torch.zeros(chunk, 3, *size, dtype=torch.uint8)
    model = trace(first, {layout.FRAMES: some}, first.names)
    _name_output(model, first.last, layout.HIDDEN)
    written = save(model, paths[0], between, lambda node: form.body(node, graph.config, frames))
    with torch.no_grad():
        values = first(some[:1])
    values = {layout.HIDDEN: values[first.last], **values}
    entering = {name: torch.cat([values[name]] * frames) for name in between}
    model = trace(second, entering, second.names)
    return written, save(model, paths[1], outputs, lambda node: form.body(node, graph.config, frames))


def _name_output(model: ir.Model, value: str, name: str) -> None:
    """Return a graph output under the additional name `name`."""
    (found,) = (output for output in model.graph.outputs if output.name == value)
    node = ir.node("Identity", [found])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, found.type, found.shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
