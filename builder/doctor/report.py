"""Findings and outcomes as one record in plain JSON types and as one page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.doctor.findings import Finding
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK
from builder.doctor.machine import Machine
from builder.doctor.treatment import Tried

JSON_FILE, MARKDOWN_FILE = "doctor.json", "doctor.md"
_STATUSES = (OK, FAILED, NOT_HERE, NOT_TRIED)


def record(
    machine: Machine, findings: Sequence[Finding], tried: Sequence[Tried], *, build: bool, ask: bool
) -> dict[str, Any]:
    """ "build" and "ask" (whether the defaults can work), "findings", "machine", "parts" and their "counts"."""
    parts = [{"name": one.part.name, **dataclasses.asdict(one.outcome)} for one in tried]
    return dict(
        _plain(
            {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "build": build,
                "ask": ask,
                "findings": [dataclasses.asdict(one) for one in findings],
                "machine": dataclasses.asdict(machine),
                "counts": {status: sum(p["status"] == status for p in parts) for status in _STATUSES},
                "parts": parts,
            }
        )
    )


def _plain(value: Any) -> Any:
    """Lists for tuples, None for infinities and NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """`doctor.json` and `doctor.md` in a folder; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    written = (folder / JSON_FILE, folder / MARKDOWN_FILE)
    written[0].write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    written[1].write_text(markdown(record), encoding="utf-8")
    return written


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    lines = [f"# This machine, {record['created'][:10]}", ""]
    lines += _table(
        ("", "what", "here", "so"),
        [(f["state"], f["name"], f["value"], f"{f['allows']}{_mended(f['mend'])}") for f in record["findings"]],
    )
    if record["parts"]:
        counts = ", ".join(f"{number} {status}" for status, number in record["counts"].items())
        lines += ["", f"## What was tried: {counts}", ""]
        rows = [
            (p["name"], p["status"], f"{p['seconds']:.1f}", p["why"] or words(p["figures"]))
            for p in record["parts"]
            if p["status"] in (OK, FAILED)
        ]
        lines += _table(("part", "", "s", "why, or figures"), rows)
        for status in (NOT_HERE, NOT_TRIED):
            reasons = by_reason(record["parts"], status)
            lines += ["", f"## {status.capitalize()}", ""] if reasons else []
            lines += [f"* {why}: {'; '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def by_reason(parts: Sequence[dict[str, Any]], status: str) -> dict[str, list[str]]:
    """Names of the parts with a status, by reason."""
    found: dict[str, list[str]] = {}
    for part in parts:
        if part["status"] == status:
            found.setdefault(part["why"], []).append(part["name"])
    return found


def _mended(command: str) -> str:
    """The fix as the end of a cell; "" if there is none."""
    return f"; mend it: {command}" if command else ""


def words(figures: dict[str, Any]) -> str:
    """Figures in one line."""
    return "; ".join(_figure(name, value) for name, value in figures.items() if name != "folder")


def _figure(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name}: ({words(value)})"
    if isinstance(value, list):
        return f"{name}: {len(value)}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(columns), f"|{'---|' * len(columns)}", *map(line, rows)]
