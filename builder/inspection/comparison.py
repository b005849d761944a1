"""The differences of two engines, and why the cache did not reuse one for the other.

`compare` takes two records of `builder.inspection.record.describe` and opens no files; a renamed folder shows by its
path. The option that sets a part of the cache key follows from the build's command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.inspection import Record
from builder.settings.parser import flags

# The option or cause of each part of the cache key, if it is not the option of the same name.
SET_BY = {
    "model": "--model (the weights of its vision part)",
    "answers": "--model (its decoder, tokenizer and chat template)",
    "earlytom": "settings without an option",
    "earlytom.merge_layers": "--merge-layers, --preset",
    "earlytom.tau": "--tau, --preset",
    "frame_counts": "--frames",
    "islands": "--islands",
    "int8_keep": "--int8, --int8-keep",
    "backend_version": "the installed library that compiles",
    "workspace_gib": "--workspace",
    "calibration": "--calibration (the bytes of the clips)",
    "code": "this project's sources",
    "libraries": "installed libraries",
    "triton": "installed libraries",
}


def compare(one: Record, other: Record) -> Record:
    """The differences of two records of `describe`, and what they mean for the cache.

    Returns:
        "engine" and "other": their folders; "same_key"; "reasons": sentences about why one was not reused for the
        other; "key_parts": differing parts of the key, with both values and "set_by"; "differences": differing fields
        of the manifest and of the layers' figures. Missing values are None.
    """
    same = one["manifest"]["key"] == other["manifest"]["key"]
    recorded = one["key_parts"] is not None and other["key_parts"] is not None
    parts = _differences(one["key_parts"], other["key_parts"]) if recorded and not same else []
    for part in parts:
        part["set_by"] = set_by(part["field"])
    return {
        "engine": one["folder"],
        "other": other["folder"],
        "same_key": same,
        "reasons": _reuse(one, other) if same else _other_key(one, other, parts),
        "key_parts": parts,
        "differences": _differences(_comparable(one), _comparable(other)),
    }


def set_by(part: str) -> str:
    """What sets a part of the cache key, such as "chunk", "earlytom.tau" or "libraries.torch"."""
    top, _, rest = part.partition(".")
    if part in SET_BY:
        return SET_BY[part]
    return flags().get(rest if top == "earlytom" else top) or SET_BY.get(top, top)


def _comparable(record: Record) -> Record:
    layers = {k: v for k, v in (record["layers"] or {}).items() if k not in ("kinds", "biggest")}
    return {**record["manifest"], "layers": layers}


def _other_key(one: Record, other: Record, parts: list[Record]) -> list[str]:
    silent = [record["folder"] for record in (one, other) if record["key_parts"] is None]
    if silent:
        return [f"the keys differ; what that of {' and '.join(silent)} is made of was not recorded"]
    if not parts:
        return ["the keys differ, in nothing that is recorded: two versions of the builder made them"]
    causes = dict.fromkeys(part["set_by"] for part in parts)
    return [f"the keys differ, so neither is taken for the other. What differs comes from: {'; '.join(causes)}"]


def _reuse(one: Record, other: Record) -> list[str]:
    """Why an engine with an equal key was not reused."""
    found = []
    for record in (one, other):
        manifest, folder = record["manifest"], record["folder"]
        gate = record["verification"]
        if gate is None or not gate["passed"]:
            found.append(f"{folder} was not verified: only a build with --no-verify takes it")
        elif all(check["step"] != "text" for check in gate["checks"]):
            found.append(f"{folder} was verified without the step text: a build with --verify-text does not take it")
        if Path(folder).resolve().name != manifest["name"]:
            found.append(f"{folder} was renamed: a build looks for {manifest['name']}")
    return ["the keys are equal: the same was asked for"] + (
        found or ["either is taken as it is; it was built again for --force, another --out, or damage that it mended"]
    )


def _differences(one: Any, other: Any, name: str = "") -> list[Record]:
    """{"field", "engine", "other"} of every differing field; nested names are joined by dots."""
    one, other = _by_check(one), _by_check(other)
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [{"field": name, "engine": one, "other": other}]
    keys = dict.fromkeys([*one, *other])
    return [row for k in keys for row in _differences(one.get(k), other.get(k), f"{name}.{k}" if name else k)]


def _by_check(values: Any) -> Any:
    """The gate's list of checks as a dict by what they check; other values unchanged."""
    if isinstance(values, list) and values and all(isinstance(value, dict) and "what" in value for value in values):
        return {_check_name(value): {k: v for k, v in value.items() if k not in ("what", "frames")} for value in values}
    return values


def _check_name(check: Record) -> str:
    return f"{check['what']} ({check['frames']} frames)" if "frames" in check else str(check["what"])
