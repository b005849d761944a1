"""Marks of tests that need a package which may be missing."""

from __future__ import annotations

import importlib.util

import pytest

from runtime import trt

needs_rtx = pytest.mark.skipif(
    "tensorrt-rtx" not in trt.flavours(), reason="tensorrt-rtx is not installed (pip install .[rtx])"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install .[plugin])"
)
