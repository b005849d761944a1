"""Turns calls of ONNX functions into plugin nodes.

For a call, TensorRT's parser looks for a plugin in the namespace of the node's attribute `plugin_namespace` (default:
the empty one, whatever the node's domain), and silently uses the function's body if it finds none. So every call gets
the attribute, the bodies are removed, and the plugin layers are counted after parsing (`builder.compile.process`): an
engine has its plugins or is not built. Functions without a plugin (`BODIES`) keep their bodies.
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
        model: an `onnx.ModelProto`; its weights may be external.
        name: file name, for messages.
        plugins: operator names with a registered plugin.
        version: of those plugins.

    Returns:
        the number of plugin nodes.
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
