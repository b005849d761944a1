"""From calls of ONNX functions to plugin nodes.

TensorRT's parser runs the body of a function it knows, unless it finds a plugin for the call. It looks for one under
the namespace that the node's attribute `plugin_namespace` gives (the empty one without it, whatever the node's domain),
and silently takes the body where it finds none. So every call gets the attribute, the bodies are taken out, and what
the parser made of the calls is counted (`builder.compile.process`): an engine has the plugins or is not built.

Functions that no plugin is meant for (`BODIES`) keep their bodies, which the parser runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from builder.export import cells, functions
from builder.plugins import NATIVE
from earlytom.errors import UserError

BODIES = frozenset({cells.CELL_PLAN, cells.SELECT_ROUNDS})


def as_plugin_calls(model: Any, name: str, plugins: Collection[str], version: str) -> int:
    """Turn the calls of the `earlytom` functions in an ONNX model into plugin nodes, in place.

    Args:
        model: an `onnx.ModelProto`; weights may lie outside.
        name: of its file, for messages.
        plugins: operator names that TensorRT has a plugin for.
        version: of those plugins.

    Returns:
        how many plugin nodes there are.
    """
    calls = [node for node in model.graph.node if node.domain == functions.DOMAIN and node.op_type not in BODIES]
    missing = [f"{node.name!r} ({node.domain}::{node.op_type})" for node in calls if node.op_type not in plugins]
    if missing:
        raise UserError(
            f"{name} has nodes that TensorRT's registry has no plugin for: {', '.join(missing[:5])}; it has "
            f"{', '.join(sorted(plugins)) or 'none'} in namespace {functions.DOMAIN}; {NATIVE}"
        )
    for node in calls:
        for key, value in (("plugin_namespace", functions.DOMAIN), ("plugin_version", version)):
            attribute = node.attribute.add()
            attribute.name, attribute.type, attribute.s = key, attribute.STRING, value.encode()
    kept = [one for one in model.functions if one.domain != functions.DOMAIN or one.name in BODIES]
    del model.functions[:]
    model.functions.extend(kept)
    return len(calls)
