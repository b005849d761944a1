"""A line in a shell, as somebody would run it who activated the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[3]


def shell(line: str, folder: Path, *, torch: bool = True) -> subprocess.CompletedProcess[str]:
    """What came of it. Polygraphy needs no `torch`, but imports it for a second where it is."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = ROOT if torch else Path(__file__).parent / "without_torch"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(modules)}
    command = ["sh", "-ec", line]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
