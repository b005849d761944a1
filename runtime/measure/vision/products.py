"""The peak rates of ONNX Runtime on the CPU.

One matrix product of the tower with constant weights, with the session options of an engine: in fp32, or of uint8 rows
and int8 weights with int32 accumulation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from earlytom.families import geometry
from runtime.checkpoint import Checkpoint
from runtime.measure.clock import timed
from runtime.vision.onnxruntime import open_session

Matrix = NDArray[Any]


def float_peak(checkpoint: Checkpoint, frames: int) -> float:
    """Flops a second of an MLP's first product in the tower, on all patches of `frames` frames, in fp32."""
    return _rate(*_sizes(checkpoint, frames), np.dtype(np.float32))


def integer_peak(checkpoint: Checkpoint, frames: int) -> float:
    """Operations a second of the same product in int8."""
    return _rate(*_sizes(checkpoint, frames), np.dtype(np.uint8))


def product(entering: Matrix, weights: Matrix) -> Matrix:
    """`entering @ weights` [M, N] of fp32; `(entering - 128) @ weights`, as int32, of uint8 [M, K] and int8 [K, N]."""
    return _product(entering, weights, times=1)[0]


def _sizes(checkpoint: Checkpoint, frames: int) -> tuple[int, int, int]:
    frame = geometry(checkpoint.config)
    return frames * frame.patches, frame.width, frame.inner


def _rate(rows: int, width: int, inner: int, dtype: np.dtype[Any]) -> float:
    """The best rate of a few products of `[rows, width]` by `[width, inner]`, with torch's number of threads."""
    random, kind = np.random.default_rng(0), np.dtype(np.int8) if dtype == np.uint8 else dtype
    entering = random.integers(0, 128, (rows, width)).astype(dtype)
    weights = random.integers(-127, 128, (width, inner)).astype(kind)
    return 2 * rows * width * inner / _product(entering, weights, times=8)[1]


def _product(entering: Matrix, weights: Matrix, times: int) -> tuple[Matrix, float]:
    """The product, and the least seconds of `times` runs."""
    from onnx import helper, numpy_helper, save

    whole = entering.dtype == np.uint8
    stored = [numpy_helper.from_array(weights, "weights")]
    stored += [numpy_helper.from_array(np.array(128, np.uint8), "zero")] if whole else []
    node = helper.make_node(
        "MatMulInteger" if whole else "MatMul", ["entering", *(one.name for one in stored)], ["sums"]
    )
    sums = np.dtype(np.int32) if whole else entering.dtype
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("entering", helper.np_dtype_to_tensor_dtype(entering.dtype), entering.shape)],
        [helper.make_tensor_value_info("sums", helper.np_dtype_to_tensor_dtype(sums), (len(entering), len(weights.T)))],
        stored,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
        session = open_session(path, torch.get_num_threads())
    runs = [timed(torch.device("cpu"), lambda: session.run(None, {"entering": entering})[0]) for _ in range(times)]
    return runs[0][0], min(seconds for _, seconds in runs)
