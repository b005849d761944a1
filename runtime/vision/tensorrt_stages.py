"""Several engines of one folder on an NVIDIA GPU, that run one after the other on memory that others own.

Through either TensorRT flavour. Written for a GPU and unverified without one, as those that use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import trt as seam
from runtime.errors import EngineError
from runtime.manifest import REBUILD
from runtime.vision.tensorrt import all_tensors, complaint, load_engine, make_context, require_gpu


class Stages:
    """One engine and one context a file, made once.

    Args:
        paths: the engines in order.
        flavour: "tensorrt" or "tensorrt-rtx", the one they were built with.
        device: the CUDA device to run on.

    Attributes:
        tensors: name to shape and dtype, of each engine.

    Raises:
        EngineError: a file is missing, no GPU that torch can use, the flavour is missing, or an engine was built by
            another version or for another GPU.
    """

    def __init__(self, paths: Sequence[Path], flavour: str, device: torch.device | str) -> None:
        for path in paths:
            if not path.is_file():
                raise EngineError(f"{path} is missing: {REBUILD}")
        require_gpu(flavour)
        trt = seam.load(flavour)
        self._flavour = flavour
        self._logger = seam.collecting_logger(trt)
        with torch.cuda.device(device):
            self._loaded: list[Any] = [load_engine(path, flavour, trt, self._logger) for path in paths]
            engines = list(zip(paths, (engine for _, engine in self._loaded), strict=True))
            self.tensors = [all_tensors(path, engine) for path, engine in engines]
            self._contexts: list[Any] = [make_context(path, flavour, engine, self._logger) for path, engine in engines]

    def run(self, stage: int, tensors: Mapping[str, Tensor], stream: Any, inputs: Sequence[str] = ()) -> None:
        """Queue an engine's run on these tensors, its inputs and outputs by name, contiguous and on the GPU.

        Args:
            stream: a `torch.cuda.Stream`, whose device is the current one.
            inputs: those of which the engine is to be told the shape, where it is not fixed.

        Raises:
            EngineError: the library refused.
        """
        context = self._contexts[stage]
        for name in inputs:
            shape = tuple(tensors[name].shape)
            if not context.set_input_shape(name, shape):
                raise EngineError(
                    f"{self._flavour} refused {name} {list(shape)} of stage {stage}: {complaint(self._logger)}; "
                    f"{REBUILD}"
                )
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"{self._flavour} refused a buffer for {name}: {complaint(self._logger)}; {REBUILD}")
        if not context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"{self._flavour} refused to run stage {stage}: {complaint(self._logger)}")

    def free(self) -> None:
        """Let go of the engines, of which none may be running."""
        # In this order: a context must not outlive its engine, nor an engine its runtime.
        self._contexts = []
        self._loaded = [(runtime, None) for runtime, _ in self._loaded]
        self._loaded = []
