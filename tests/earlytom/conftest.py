"""The models of these tests are tiny: a second thread would only wait for the first."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Every module of this folder runs on one thread."""


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: compiled on a GPU, or on CPU tensors in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
