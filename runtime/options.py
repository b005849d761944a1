"""Checks arguments of a `Pipeline` before anything is loaded; an invalid one raises a `UserError` of one line with its
name. Numbers are checked by `earlytom.numbers`, videos by `runtime.video`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch

from earlytom.errors import UserError
from earlytom.numbers import shown
from runtime.checkpoint import Checkpoint, Source
from runtime.decoder.sampling import Sampling

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

T = TypeVar("T")


class Options(TypedDict, total=False):
    """Keywords of `Pipeline.submit`, `stream` and `ask`; see `submit`."""

    deadline: float | None
    max_new_tokens: int
    sampling: Sampling | None
    system: str | None
    frames: int | None
    stop: Sequence[str]
    kept: bool


def instance(name: str, value: Any, kind: type[T], remedy: str) -> T:
    """`value` if it is a `kind`; else raise UserError."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be a {kind.__name__}, got {shown(value)}: give {remedy}")
    return value


def engine_folder(engine: Any) -> Path:
    """The path of an engine folder. Raises UserError for other than a path."""
    path = _path(engine)
    if path is None:
        raise UserError(f"engine must be the path of an engine folder, a str or a Path, got {shown(engine)}")
    return Path(path)


def model_source(model: Any) -> Source:
    """A checkpoint's source, checked to be None, a `Checkpoint`, a str or a path; paths become `Path`."""
    if model is None or isinstance(model, Checkpoint):
        return model
    path = _path(model)
    if path is None:
        raise UserError(f"model must be the path or the name of a checkpoint, a str or a Path, got {shown(model)}")
    return path if isinstance(model, str) else Path(path)


def device_of(device: Any) -> torch.device:
    """The decoder's device; default: the GPU if torch can use one. cuda is accepted even if there is no GPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refused = UserError(f"device is {shown(device)}: give cpu or cuda")
    if not isinstance(device, str | torch.device):
        raise refused
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise refused from error
    if found.type not in ("cpu", "cuda"):
        raise refused
    if found.type == "cuda" and torch.cuda.is_available() and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {shown(device)}, and there are {torch.cuda.device_count()} GPUs: give a lower number"
        )
    return found


def dtype_of(dtype: Any) -> torch.dtype | None:
    """The decoder's dtype; None: the default."""
    if dtype is not None and not any(dtype is known for known in _DTYPES):
        names = ", ".join(map(str, _DTYPES))
        raise UserError(f"dtype must be one of {names}, got {shown(dtype)}: give one of them, or leave it out")
    return dtype


def _path(value: Any) -> str | None:
    """A path as str; None for other values, an empty path and one with a null character."""
    if isinstance(value, os.PathLike):
        value = value.__fspath__()
    return value if isinstance(value, str) and value and "\0" not in value else None
