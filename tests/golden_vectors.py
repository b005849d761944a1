"""Golden vectors: those in `tests/golden/METHOD`, or in another folder of the same form that `--golden DIR` names.

    pytest tests/earlytom/methods/test_cells.py --golden DIR

`DIR` belongs to one method, so the option goes with that method's tests. A test asks for its cases where pytest
collects it: `def pytest_generate_tests(metafunc): parametrize(metafunc, "case", read_cases(metafunc.config, "cells"))`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HOME = Path(__file__).parent / "golden"


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", help="folder of golden vectors for the method whose tests are run")


def folder_of(config: pytest.Config, method: str) -> Path:
    """Where the vectors of a method are.

    Raises:
        pytest.UsageError: `--golden` names no folder.
    """
    given = config.getoption("--golden")
    folder = HOME / method if given is None else Path(given)
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden {given}: no such folder")
    return folder


def read_cases(config: pytest.Config, method: str, file: str | None = None) -> Any:
    """The cases in a JSON file of the folder, `METHOD.json` by default: most are a list.

    Raises:
        pytest.UsageError: there is no such file.
    """
    path = folder_of(config, method) / (file or f"{method}.json")
    if not path.is_file():
        raise pytest.UsageError(f"{path}: no such file; --golden names the folder of the vectors of {method!r}")
    return json.loads(path.read_text("utf-8"))


def parametrize(metafunc: pytest.Metafunc, name: str, cases: Sequence[dict[str, Any]]) -> None:
    """Run a test that has the argument `name` once with each case."""
    if name in metafunc.fixturenames:
        metafunc.parametrize(name, cases, ids=[str(case.get("case", n)) for n, case in enumerate(cases)])


@functools.cache
def _arrays(path: Path) -> Any:
    return np.load(path)


def tensor(path: Path, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One array of an .npz file."""
    found = torch.from_numpy(_arrays(path)[name])
    return found if dtype is None else found.to(dtype)
