"""Results as JSON: the file of a run, and the bundled model's record, which a test compares with a new measurement.

`accuracy.json` beside the bundled weights is such a file, written by `python -m builder.evaluate --record` on the test
split. It has the weights' digest, so that a record of other weights is noticed. A part of the table, measured on the
same clips, can be merged into it (`joined`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from builder.evaluation.options import CLIPS, FULL
from earlytom import micro
from earlytom.errors import UserError
from runtime.checkpoint import MICRO, Checkpoint
from runtime.files.partial import partial

PATH = micro.PATH / micro.ACCURACY_FILE
_WEIGHTS = "model.safetensors"


def check_recordable(
    checkpoint: Checkpoint, *, split: str, seed: int, clips: int, whole: bool, overruled: bool = False
) -> None:
    """Raise UserError unless the results would be the bundled model's accuracy.

    Args:
        whole: whether all default methods and ratios are measured; if not, there must be a record of as many clips.
        overruled: whether bias, positions or form of the methods are overridden.
    """
    if checkpoint.source != MICRO or not checkpoint.trained:
        what = "are not trained" if checkpoint.source == MICRO else f"are those of {checkpoint.source}"
        raise UserError(f"--record is for the trained bundled model, and these weights {what}: use --json FILE")
    if (split, seed) != ("test", 0) or clips < CLIPS or overruled:
        raise UserError(
            f"--record is for the test split with seed 0, {CLIPS} clips or more: leave out --split, --seed, --clips, "
            "--bias, --positions and --faithful, or use --json FILE"
        )
    if not whole and (recorded := read()["clips"]) != clips:
        raise UserError(
            f"--record of a part of the table goes into the record, which is of {recorded} clips: give --clips "
            f"{recorded}, or leave out --methods and --ratios"
        )


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old record with the rows of a new measurement on the same clips added or replaced."""
    for name in ("weights", "split", "seed", "clips", "questions", "settings"):
        if _rounded(old[name]) != _rounded(new[name]):
            raise UserError(f"--record: {name} is {new[name]}, and {old[name]} in the record: make the whole one again")
    before, after = (next(one for one in record["results"] if one["method"] == FULL) for record in (old, new))
    if _rounded(before["accuracy"]) != _rounded(after["accuracy"]):
        raise UserError(
            f"--record: the full tokens were {100 * after['accuracy'][0]:.2f} % right, and are "
            f"{100 * before['accuracy'][0]:.2f} % in the record: make the whole one again"
        )
    kept = old | {name: new[name] for name in ("cells", "told") if name in new}
    kept["ratios"] = sorted({*old["ratios"], *new["ratios"]})
    for name, keys in (("results", ("method", "ratio")), ("comparisons", ("name", "ratio", "to", "to_ratio"))):
        rows = {tuple(row[key] for key in keys): row for row in old[name]}
        measured = {tuple(row[key] for key in keys): row for row in new[name] if row.get("method") != FULL}
        kept[name] = [*(rows | measured).values()]
    return kept


def weights_digest(folder: Path = micro.PATH) -> str:
    """SHA-256 (hex) of the bundled model's weights."""
    return hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically.

    Numbers have six decimals and each result and comparison a line, so that two records can be diffed.
    """
    fields = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in record.items())
    with partial(path) as staging:
        staging.write_text(f"{{\n{fields}\n}}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    """JSON on one line; a list of objects has a line for each."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n  " + ",\n  ".join(_lines(item) for item in value) + "\n ]"
    return json.dumps(_rounded(value), allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def read(path: Path = PATH) -> dict[str, Any]:
    """The bundled model's record."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        weights = record["weights"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it with python -m builder.evaluate --record") from error
    if weights != weights_digest(path.parent):
        raise UserError(
            f"{path} is the record of other weights; make it again with python -m builder.evaluate --record"
        )
    return record
