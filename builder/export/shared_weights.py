"""One file of weights for several graphs.

Graphs of one model for several frame counts hold the same weights. The first graph's go into one file beside it, and
every later one points to the place there of each tensor that it has, too; what only it has (a table for its own number
of frames) stays inside of it. Tensors are the same if dtype, shape and bytes are, whatever they are called. Places are
relative, so that a folder can be moved, and aligned, so that they can be mapped.

That is the ONNX files. A TensorRT engine of static shapes holds its own weights: letting several of them share some
takes stripped plans and a GPU to refit them on, so a compiled folder has them once for each frame count.

Knows tensors and files; nothing of what a graph computes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

# Smaller tensors (axes, shapes, scalars) stay in the graph, where tools that read no data files see them.
LEAST_BYTES = 1024
ALIGNMENT = 4096  # of a page


class SharedWeights:
    """The file, at first not there. `move` takes the graphs one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str, tuple[int, ...], str], tuple[int, int]] = {}  # tensor -> (offset, bytes)
        self._filled = False

    def move(self, model: ir.Model) -> None:
        """Let the weights of `model` point into the file, which the first model fills."""
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
        """Write at the next aligned place; returns where."""
        with open(self.path, "ab") as file:
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.write(bytes(offset - file.tell()) + content)
        return offset
