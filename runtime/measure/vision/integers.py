"""The integer peak: what an int8 engine is held against, as a product in PyTorch is what one in floats is held against.

One product of the tower's, alone: uint8 rows times int8 weights that are known beforehand, sums in int32, in ONNX
Runtime with the options of an engine's session.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from earlytom.families import geometry
from runtime.checkpoint import Checkpoint
from runtime.measure.clock import timed
from runtime.vision.onnxruntime import open_session

Whole = NDArray[np.integer]


def integer_peak(checkpoint: Checkpoint, frames: int) -> float:
    """Operations a second of the first product of an MLP of the tower, on all patches of `frames` frames, in int8."""
    frame = geometry(checkpoint.config)
    return integer_rate(frames * frame.patches, frame.width, frame.inner)


def integer_rate(rows: int, width: int, inner: int) -> float:
    """Operations a second of a product of `[rows, width]` by `[width, inner]`, the best of a few; the CPU's, with as
    many threads as torch has."""
    random = np.random.default_rng(0)
    entering = random.integers(0, 256, (rows, width), np.uint8)
    weights = random.integers(-127, 128, (width, inner), np.int8)
    return 2 * rows * width * inner / _product(entering, weights, times=8)[1]


def integer_product(entering: Whole, weights: Whole) -> Whole:
    """`(entering - 128) @ weights`, uint8 [M, K] and int8 [K, N], as int32 [M, N]."""
    return _product(entering, weights, times=1)[0]


def _product(entering: Whole, weights: Whole, times: int) -> tuple[Whole, float]:
    """The product, and the least of the seconds that it took."""
    from onnx import TensorProto, helper, numpy_helper, save

    zero = np.array(128, np.uint8)
    stored = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(zero, "zero")]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["entering", "weights", "zero"], ["sums"])],
        "product",
        [helper.make_tensor_value_info("entering", TensorProto.UINT8, entering.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, (len(entering), weights.shape[1]))],
        stored,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
        session = open_session(path, torch.get_num_threads())
    runs = [timed(torch.device("cpu"), lambda: session.run(None, {"entering": entering})[0]) for _ in range(times)]
    return runs[0][0], min(seconds for _, seconds in runs)
