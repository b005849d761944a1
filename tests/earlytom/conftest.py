"""The models of these tests are tiny: a second thread would only wait for the first."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Every module of this folder runs on one thread."""
