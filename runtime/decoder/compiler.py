"""The compiler of the LLM decoder: torch_tensorrt's dynamo front end, which is imported here and nowhere else.

It turns an exported program into a file and a file into something to call; it knows nothing of decoders. The library
cannot be imported without an NVIDIA driver, so that happens when a `TorchTensorRT` is made, and everything that can be
wrong with it ends in an `EngineError` of one line.

Written for a GPU and unverified without one: what a test on a CPU can reach is the errors. Seen on a CPU, by hand, with
torch-tensorrt-rtx 2.13 and its checks for a GPU switched off: its lowering makes one engine of each program, nothing is
left to PyTorch, and TensorRT-RTX builds both for compute capability 8.0 in fp32, fp16 and bf16.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.export import ExportedProgram

from runtime import trt
from runtime.checkpoint.files import first_line
from runtime.decoder.programs import Program
from runtime.errors import EngineError

INSTALL = 'pip install "earlytom-engine-builder[torch-tensorrt]"'
REMEDY = "use --decoder torch"
_LARGE = 2 << 30  # bytes of weights; a file's pickle needs protocol 4 from 4 GiB on, and engines are written in base64


class Compiler(Protocol):
    """What turns an exported program into a file and a file into something to call."""

    device: torch.device

    def identity(self) -> Mapping[str, str]:
        """Everything about the compiler and the device that a compiled file depends on."""
        ...

    def compile(self, program: ExportedProgram, file: Path) -> None:
        """Compile `program` for its example inputs and write it to `file`.

        Raises:
            EngineError: in one line, what went wrong.
        """
        ...

    def load(self, file: Path) -> Program:
        """The program in `file`, on the device.

        Raises:
            EngineError: in one line, the file cannot be loaded here.
        """
        ...


class TorchTensorRT:
    """`Compiler` of torch_tensorrt's dynamo front end, imported here and nowhere else.

    Make it before anything imports TensorRT itself: torch_tensorrt wants to be the first.

    Raises:
        EngineError: no NVIDIA GPU, another device, or the package is missing or does not load.
    """

    def __init__(self, device: torch.device) -> None:
        if not trt.has_gpu():
            raise EngineError(
                f"the decoder torch-tensorrt needs an NVIDIA GPU and its driver, none was found: {REMEDY}"
            )
        if device.type != "cuda" or not torch.cuda.is_available():
            raise EngineError(
                f"the decoder torch-tensorrt runs on a GPU, torch {torch.__version__} has it on {device}: use "
                f"--device cuda with a CUDA build of torch, or {REMEDY.removeprefix('use ')}"
            )
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._library = _import_torch_tensorrt()

    def identity(self) -> Mapping[str, str]:
        major, minor = torch.cuda.get_device_capability(self.device)
        return {
            "compiler": f"torch-tensorrt {self._library.__version__}",
            "tensorrt": str(trt.load("tensorrt").__version__),
            "capability": f"{major}.{minor}",
            "gpu": torch.cuda.get_device_name(self.device),
        }

    def compile(self, program: ExportedProgram, file: Path) -> None:
        inputs = list(program.example_inputs[0])
        half = any(tensor.dtype == torch.float16 for tensor in inputs)
        large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _LARGE
        try:
            with contextlib.redirect_stdout(sys.stderr):
                compiled = self._library.dynamo.compile(
                    program,
                    arg_inputs=inputs,
                    device=self.device,
                    min_block_size=1,
                    use_fp32_acc=half,  # as PyTorch accumulates; sums of 18,944 products lose digits in float16
                    disable_tf32=True,
                )
        except Exception as error:  # whatever the library's converters and TensorRT raise
            raise self._error(error, "compile the decoder", REMEDY) from error
        try:
            self._library.save(compiled, str(file), arg_inputs=inputs, pickle_protocol=4 if large else 2)
        except OSError:
            raise  # says more of the disk than we could
        except Exception as error:  # of a full disk torch says RuntimeError
            raise self._error(error, f"write {file}", f"see that the disk has room, or {REMEDY}") from error

    def load(self, file: Path) -> Program:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints the traceback of what it then raises
                program = self._library.load(str(file))
            return cast(Program, program.module())
        except Exception as error:
            remedy = f"delete {file.parent}, so that it is compiled again, or {REMEDY}"
            raise self._error(error, f"load {file}", remedy) from error

    def _error(self, error: Exception, what: str, remedy: str) -> EngineError:
        return EngineError(
            f"torch-tensorrt {self._library.__version__} cannot {what} ({type(error).__name__}: {first_line(error)}): "
            f"{remedy}"
        )


def _import_torch_tensorrt() -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses; stdout may be for JSON
            return importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "torch_tensorrt":
            raise EngineError(f"torch-tensorrt is not installed: {INSTALL}, or {REMEDY}") from error
        raise _broken(error) from error
    except Exception as error:  # without its libraries it raises a bare Exception, with the wrong torch others
        raise _broken(error) from error


def _broken(error: Exception) -> EngineError:
    return EngineError(
        f"torch-tensorrt is installed but cannot be loaded ({type(error).__name__}: {first_line(error)}): install the "
        f"release that was made for torch {torch.__version__}, {INSTALL}, or {REMEDY}"
    )
