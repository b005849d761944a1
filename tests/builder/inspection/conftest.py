"""The command that shows engine folders, and copies of one that tests change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builder.inspection.engine_folders import Command, copy_of, inspect_command, look_compiled


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return inspect_command(capsys)


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return copy_of(engine, tmp_path)


@pytest.fixture
def compiled(copy: Path) -> Path:
    return look_compiled(copy)
