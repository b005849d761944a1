"""In what two engines differ, and why one was built although the other was there.

`compare` takes two records as `builder.inspection.record.describe` makes them, and returns a third. It opens no file;
that a folder was renamed it tells from its path. What a part of the cache key is set by follows from the options of a
build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.inspection import Record
from builder.settings.parser import flags

# What to type, or to look at, for a part of the cache key that differs, where that is not the option of its name.
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
    """Where two records of `describe` differ, and what that means for the cache.

    Returns:
        "engine" and "other": their folders; "same_key"; "reasons": sentences that say why the one was not taken for the
        other; "key_parts": the parts of the key that differ, with both values and "set_by"; "differences": the fields
        of the manifest and the figures of the layers that differ. What one of them lacks is None there.
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
    """Why an engine of the same key was not taken."""
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
    """{"field", "engine", "other"} of every field that differs; nested fields are named with dots."""
    one, other = _by_check(one), _by_check(other)
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [{"field": name, "engine": one, "other": other}]
    keys = dict.fromkeys([*one, *other])
    return [row for k in keys for row in _differences(one.get(k), other.get(k), f"{name}.{k}" if name else k)]


def _by_check(values: Any) -> Any:
    """The checks of the gate are a list: by what they check."""
    if isinstance(values, list) and values and all(isinstance(value, dict) and "what" in value for value in values):
        return {_check_name(value): {k: v for k, v in value.items() if k not in ("what", "frames")} for value in values}
    return values


def _check_name(check: Record) -> str:
    return f"{check['what']} ({check['frames']} frames)" if "frames" in check else str(check["what"])
