"""The gate's result: a line for each check, and the report of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from builder.gate.limits import STEPS
from earlytom.errors import UserError


@dataclass(frozen=True)
class Check:
    """One line of the report: the measured value, its limit, and whether it passed (NaN never does)."""

    step: str
    what: str
    value: float
    limit: float
    passed: bool
    frames: int | None = None  # the frame count, where the engine has several

    @classmethod
    def at_least(cls, step: str, what: str, value: float, limit: float) -> Check:
        return cls(step, what, value, limit, value >= limit)

    @classmethod
    def at_most(cls, step: str, what: str, value: float, limit: float) -> Check:
        return cls(step, what, value, limit, value <= limit)

    def to_dict(self) -> dict[str, Any]:
        values = {"what": self.what, "value": self.value, "limit": self.limit, "passed": self.passed}
        return values if self.frames is None else {"frames": self.frames, **values}


@dataclass(frozen=True)
class Report:
    """The outcome of the gate."""

    checks: tuple[Check, ...]
    clips: tuple[str, ...]
    notes: tuple[str, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, checks grouped by step."""
        steps: dict[str, list[dict[str, Any]]] = {}
        for check in self.checks:
            steps.setdefault(check.step, []).append(check.to_dict())
        return {"passed": self.passed, "clips": list(self.clips), "notes": list(self.notes), "steps": steps}

    def require(self) -> None:
        """Raise UserError for the first failed check, if any."""
        for check in self.checks:
            if not check.passed:
                raise UserError(
                    f"the graph does not reproduce the model: {check.what} is {check.value:.5g}, it must be "
                    f"{'at most' if check.what.endswith(('error', 'difference')) else 'at least'} {check.limit:.5g} "
                    f"(step {check.step}); build with --fp32 to see whether the precision is the cause, and with "
                    "--no-verify to see where it drifts: python -m builder.verify ENGINE --layers"
                )


def joined(reports: Mapping[int, Report]) -> Report | None:
    """The reports of several frame counts as one; its checks and notes name their count."""
    if not reports:
        return None
    checks = [replace(check, frames=frames) for frames, report in reports.items() for check in report.checks]
    checks.sort(key=lambda check: STEPS.index(check.step))
    notes = [f"{frames} frames: {note}" for frames, report in reports.items() for note in report.notes]
    clips = dict.fromkeys(clip for report in reports.values() for clip in report.clips)
    return Report(tuple(checks), tuple(clips), tuple(notes), max(report.tolerance for report in reports.values()))
