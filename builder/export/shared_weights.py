"""One file of weights for several graphs.

Graphs of one model for several frame counts have the same weights. Those of the first graph go into one file beside it;
each later graph refers to that file for every tensor it shares, and keeps its other tensors (tables for its own frame
count) inside. Tensors are shared if dtype, shape and bytes are equal, whatever their names. The path is relative, so
that the folder can be moved; offsets are page-aligned, so that the file can be mapped.

This covers the ONNX files. A TensorRT engine holds its own weights (sharing needs stripped plans and a GPU to refit
them), so a compiled folder has them once for each frame count. Knows tensors and files, not what a graph computes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

# Smaller tensors (axes, shapes, scalars) stay in the graph, where tools that read no data files see them.
LEAST_BYTES = 1024
ALIGNMENT = 4096  # of a page


class SharedWeights:
    """The file, which the first `move` creates. Call `move` for each graph in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str, tuple[int, ...], str], tuple[int, int]] = {}  # tensor -> (offset, bytes)
        self._filled = False

    def move(self, model: ir.Model) -> None:
        """Make the weights of `model` refer to the file, which the first model fills."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < LEAST_BYTES:
                continue
            content = tensor.tobytes()
            shape = tuple(tensor.shape.numpy())
            key = (tensor.dtype.name, shape, hashlib.sha256(content).hexdigest())
            if not self._filled and key not in self._places:
                self._places[key] = self._append(content), len(content)
            if key in self._places:
                offset, length = self._places[key]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    name=value.name or "",
                    shape=ir.Shape(shape),
                    base_dir=self.path.parent,
                )
        self._filled = True

    def _append(self, content: bytes) -> int:
        """Write at the next aligned offset; returns that offset."""
        with open(self.path, "ab") as file:
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.write(bytes(offset - file.tell()) + content)
        return offset
