"""The process of one part: `python -m builder.doctor.child MODULE:FUNCTION ARGUMENTS OUTCOME`.

Calls the function with the arguments (a JSON object) and writes {"status", "why", "figures"} to the file OUTCOME. If a
library crashes the process before that, `builder.doctor.isolated` reports it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from builder.compile.child import end_with_parent
from builder.doctor.isolated import FAILED, NOT_HERE, OK, NotPossible, Wrong
from earlytom.errors import UserError
from runtime.cli import limit_reached


def main(target: str, arguments: str, answer: str) -> int:
    """Run the part and write its outcome; returns 0 for any outcome."""
    end_with_parent(sys.stdin.fileno())
    with suppress(OSError):  # out of memory, the kernel should kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    outcome = _outcome(target, json.loads(arguments))
    unfinished = Path(f"{answer}.part")
    unfinished.write_text(json.dumps(outcome), encoding="utf-8")
    os.replace(unfinished, answer)
    return 0


def _outcome(target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = target.partition(":")
    try:
        figures = getattr(importlib.import_module(module), name)(**arguments)
        return {"status": OK, "why": "", "figures": dict(figures or {})}
    except NotPossible as reason:
        return {"status": NOT_HERE, "why": str(reason), "figures": {}}
    except (UserError, Wrong) as error:
        return {"status": FAILED, "why": str(error), "figures": {}}
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        return {"status": FAILED, "why": limit_reached(error) or f"{type(error).__name__}: {first}", "figures": {}}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
