"""The compiler of the LLM decoder: torch_tensorrt's dynamo front end, which is imported here and nowhere else.

It compiles an exported program to a file and loads a callable from it; it knows nothing of decoders. The library cannot
be imported without an NVIDIA driver, so it is imported when a `TorchTensorRT` is made; every failure is an
`EngineError` of one line.

Written for a GPU and unverified without one: what a test on a CPU can reach is the errors. Checked by hand on a CPU,
with torch-tensorrt-rtx 2.13 and its checks for a GPU switched off: its lowering makes one engine of each program,
nothing is left to PyTorch, and TensorRT-RTX builds both for compute capability 8.0 in fp32, fp16 and bf16.
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
_LARGE = 2 << 30  # bytes of weights: with base64 engines the file may reach 4 GiB, which needs pickle protocol 4


class Compiler(Protocol):
    """Compiles an exported program to a file, and loads a callable program from it."""

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
    """The `Compiler` of torch_tensorrt's dynamo front end.

    Make it before anything imports TensorRT itself: torch_tensorrt must be imported first.

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
                    use_fp32_acc=half,  # as in PyTorch; sums of 18,944 products lose precision in float16
                    disable_tf32=True,
                )
        except Exception as error:  # the library's converters and TensorRT raise any type
            raise self._error(error, "compile the decoder", REMEDY) from error
        try:
            self._library.save(compiled, str(file), arg_inputs=inputs, pickle_protocol=4 if large else 2)
        except OSError:
            raise  # its own message is the best
        except Exception as error:  # torch raises RuntimeError for a full disk
            raise self._error(error, f"write {file}", f"see that the disk has room, or {REMEDY}") from error

    def load(self, file: Path) -> Program:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints a traceback before it raises
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
        with contextlib.redirect_stdout(sys.stderr):  # it prints notes; our stdout may be for JSON
            return importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "torch_tensorrt":
            raise EngineError(f"torch-tensorrt is not installed: {INSTALL}, or {REMEDY}") from error
        raise _broken(error) from error
    except Exception as error:  # a bare Exception without its libraries, other types with the wrong torch
        raise _broken(error) from error


def _broken(error: Exception) -> EngineError:
    return EngineError(
        f"torch-tensorrt is installed but cannot be loaded ({type(error).__name__}: {first_line(error)}): install the "
        f"release that was made for torch {torch.__version__}, {INSTALL}, or {REMEDY}"
    )
