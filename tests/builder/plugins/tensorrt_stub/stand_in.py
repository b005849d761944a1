"""NVIDIA's own Python bindings of TensorRT, on a machine without TensorRT.

The package `tensorrt-cu13-bindings` imports when the nine functions that it wants from NVIDIA's libraries exist
(`native.c`). Then everything of `tensorrt.plugin` that is Python is the real thing: registration and its checks of
signatures, creators, how attributes are decoded, shape functions, type combinations, launch parameters, the choice
between an ahead-of-time and a just-in-time implementation; and so are all enumerations.

Not the real thing, but written here after the public sources of the parser (onnx-tensorrt, for TensorRT 10):

* `OnnxParser`: which nodes become plugins, and what their attributes look like to a plugin (floats in fp32, whole
  numbers in int32, texts with a final zero byte). It knows shapes from the file and computes nothing.
* `Builder`, networks, the plugin registry, symbolic dimensions (they are native classes without constructors).
* building: every plugin is asked in the order in which TensorRT's documentation says it is; an exception in a callback
  is logged and ends the build with "no engine". The "engine" is a list of what would be launched, as JSON.

So it cannot show that TensorRT accepts a plugin with these types, that its parser still works as the sources say, that
a driver loads the PTX out of an engine, how fast the kernels are beside TensorRT's own, or that two GPUs agree.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

DISTRIBUTION, VERSION = "tensorrt-cu13-bindings", "11.4.0.106"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# A matrix product in the words of the build log, so that the engine has a precision.
PRODUCT = (
    "Name: gemm, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [4,8], Format/Datatype: Half }, "
    "{ Name: b, Dimensions: [8,4], Format/Datatype: Half }], Outputs: [ { Name: c, Dimensions: [4,4], "
    "Format/Datatype: Half }], TacticName: none,"
)


def missing() -> str | None:
    """Why the bindings cannot be used here, None if they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "NVIDIA's bindings are tried on 64-bit Linux only"
    try:
        found = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed (pip install --no-deps {DISTRIBUTION}=={VERSION})"
    if found != VERSION:
        return f"the stand-in is for {DISTRIBUTION} {VERSION}, not {found}"
    if importlib.util.find_spec("tensorrt_libs") is not None:
        return "TensorRT's own libraries are installed, and the stand-in is for machines without them"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install .[plugin])"
    if shutil.which("gcc") is None:
        return "there is no C compiler for the stub library (gcc)"
    return None


def load(folder: Path) -> Any:
    """The module `tensorrt`: NVIDIA's bindings with the stand-ins of this file in them; the stub goes to `folder`."""
    if "tensorrt" in sys.modules:
        return sys.modules["tensorrt"]
    for name in LIBRARIES:
        library = folder / f"lib{name}.so.11"
        source = Path(__file__).with_name("native.c")
        soname = f"-Wl,-soname,{library.name}"
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), soname, "-o", str(library)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    trt: Any = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.Builder, trt.OnnxParser = Builder, OnnxParser
    trt.IDimensionExpr, trt.DimsExprs = Dimension, Dimensions
    tensor: Any = importlib.import_module("tensorrt.plugin._tensor")
    tensor.SymExprImpl = lambda expression: expression._expr.get_constant_value()
    return trt


def _trt() -> Any:
    return sys.modules["tensorrt"]


class Registry:
    """Creators by name, version and namespace."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        return self.creators.setdefault(key, creator) is creator

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


class Dimension:
    """A symbolic dimension whose value is known, as all of a network with static shapes are."""

    def __init__(self, value: int) -> None:
        self.value = int(value)

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Dimensions(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class ExpressionBuilder:
    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, kind: Any, first: Dimension, second: Dimension) -> Dimension:
        a, b = first.value, second.value
        names = {"SUM": a + b, "SUB": a - b, "PROD": a * b, "MAX": max(a, b), "MIN": min(a, b)}
        return Dimension(names[kind.name])


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.layers: list[Any] = []
        self.inputs: list[Any] = []

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))

    def get_layer(self, index: int) -> Any:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        return self.inputs[index]


class OnnxParser:
    """Imports nodes as the parser's sources do, as far as plugins and functions go."""

    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.logger = network, logger
        self.flags: set[str] = set()
        self.errors: list[Any] = []

    num_errors = property(lambda self: len(self.errors))

    def get_error(self, index: int) -> Any:
        return self.errors[index]

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def parse_from_file(self, path: str) -> bool:
        return self.parse(Path(path).read_bytes(), path)

    def parse(self, data: bytes, path: str | None = None) -> bool:
        model = onnx.load_from_string(data)
        values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
        tensors = {value.name: _tensor(value) for value in values}
        self.network.inputs = [SimpleNamespace(name=v.name, shape=_tensor(v)[1]) for v in model.graph.input]
        functions = {function.name for function in model.functions}
        for index, node in enumerate(model.graph.node):
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            namespace, version = (
                given.get(f"plugin_{k}", d).decode() for k, d in (("namespace", b""), ("version", b"1"))
            )
            creator = _trt().get_plugin_registry().get_creator(node.op_type, version, namespace)
            if creator is not None and ("ENABLE_PLUGIN_OVERRIDE" in self.flags or "plugin_namespace" in given):
                plugin = self._create(creator, node, namespace)
                self.network.layers.append(_plugin_layer(node, plugin, tensors))
            elif node.domain in ("", "ai.onnx") or node.op_type in functions:
                self.network.layers.append(SimpleNamespace(type=_trt().LayerType.IDENTITY))
            else:
                self.errors.append(_no_importer(index, node))
        return not self.errors

    def _create(self, creator: Any, node: onnx.NodeProto, namespace: str) -> Any:
        trt = _trt()
        ahead = bool(self.network.flags & 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS))
        request = trt.QuickPluginCreationRequest.PREFER_AOT if ahead else trt.QuickPluginCreationRequest.UNKNOWN
        attributes = {a.name: a for a in node.attribute}
        fields = [_field(attributes[f.name]) for f in creator.field_names if f.name in attributes]
        collection = trt.PluginFieldCollection(fields)
        return creator.create_plugin(node.op_type, namespace, collection, trt.TensorRTPhase.BUILD, request)


def _no_importer(index: int, node: onnx.NodeProto) -> Any:
    text = {"node_name": node.name, "node_operator": node.op_type, "desc": "No importer registered"}
    calls = {name: (lambda value=value: value) for name, value in text.items()}
    return SimpleNamespace(node=lambda: index, local_function_stack=list, **calls)


def _field(attribute: onnx.AttributeProto) -> Any:
    trt = _trt()
    kinds = trt.PluginFieldType
    if attribute.type == onnx.AttributeProto.FLOAT:
        return trt.PluginField(attribute.name, np.array([attribute.f], np.float32), kinds.FLOAT32)
    if attribute.type == onnx.AttributeProto.INT:
        return trt.PluginField(attribute.name, np.array([attribute.i], np.int32), kinds.INT32)
    return trt.PluginField(attribute.name, attribute.s + b"\0", kinds.CHAR)


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...]]:
    """ONNX type name and shape, -1 where it is not fixed."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape


def _plugin_layer(node: onnx.NodeProto, plugin: Any, tensors: dict[str, Any]) -> Any:
    return SimpleNamespace(
        type=_trt().LayerType.PLUGIN_V3,
        node=node.name,
        operator=node.op_type,
        plugin=plugin,
        inputs=[tensors[name] for name in node.input],
        outputs=[tensors.get(name) for name in node.output],
    )


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Any:
        names = ("clear_flag", "set_memory_pool_limit")
        return SimpleNamespace(**{name: lambda *arguments: None for name in names})

    def build_serialized_network_to_stream(self, network: Network, config: Any, writer: Any) -> bool:
        launches = []
        for layer in network.layers:
            if layer.type != _trt().LayerType.PLUGIN_V3:
                continue
            try:
                launches.append(launch_of(layer))
            except Exception as error:
                self.logger.log("Severity.ERROR", f"exception thrown from a plugin of {layer.node}: {type(error)}")
                return False
        self.logger.log("Severity.VERBOSE", PRODUCT)
        writer.write(json.dumps(launches).encode())
        return True


def launch_of(layer: Any) -> dict[str, Any]:
    """Ask a plugin for everything that TensorRT asks for, in its order; what would be launched."""
    trt, plugin = _trt(), layer.plugin
    types = [_DATA_TYPES[name] for name, _ in layer.inputs]
    inputs = [getattr(trt.DataType, name) for name in types]
    outputs = plugin.get_output_data_types(inputs, [len(shape) for _, shape in layer.inputs])
    symbols = []
    for _, shape in layer.inputs:
        symbols.append(Dimensions(len(shape)))
        symbols[-1][:] = map(Dimension, shape)
    shapes = [[d.value for d in s] for s in plugin.get_output_shapes(symbols, [], ExpressionBuilder())]
    tensors = [shape for _, shape in layer.inputs] + shapes
    every = [*inputs, *outputs]
    offered = _rows(plugin.get_supported_format_combinations(list(map(_dynamic, every, tensors)), len(inputs)), every)
    if [t.name for t in every] not in offered:
        raise RuntimeError(f"no combination for {every}")
    descriptors = list(map(_dynamic, every, tensors))
    plugin.configure_plugin(descriptors[: len(inputs)], descriptors[len(inputs) :])
    plugin.set_tactic(next(iter(plugin.get_valid_tactics()), 0))
    parameters, scalars = SimpleNamespace(), _Scalars()
    plugin.get_launch_params(symbols, descriptors, len(inputs), parameters, scalars, ExpressionBuilder())
    plain = [d.desc for d in descriptors]
    name, ptx = plugin.get_kernel(plain[: len(inputs)], plain[len(inputs) :])
    return {
        "node": layer.node,
        "operator": layer.operator,
        "kind": type(plugin).__name__,
        "attributes": plugin.attrs,
        "types": [t.name for t in every],
        "inputs": [list(shape) for _, shape in layer.inputs],
        "outputs": shapes,
        "offered": offered,
        "scalars": scalars.nbSymExprs,
        "parameters": vars(parameters),
        "kernel": name,
        "ptx": ptx.decode(),
    }


_DATA_TYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "BOOL": "BOOL", "INT64": "INT64"}


class _Scalars(list[Any]):
    nbSymExprs = -1  # noqa: N815


def _dynamic(data_type: Any, shape: Any) -> Any:
    trt = _trt()
    plain, dynamic = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
    plain.type, plain.dims, plain.format, plain.scale = data_type, tuple(shape), trt.TensorFormat.LINEAR, 1.0
    dynamic.desc = plain
    return dynamic


def _rows(flat: list[Any], every: list[Any]) -> list[list[str]]:
    """The flat list of descriptors as one list of type names a combination; all of them linear."""
    if any(d.format != _trt().TensorFormat.LINEAR for d in flat):
        raise RuntimeError("a combination that is not linear")
    names = [d.type.name for d in flat]
    return [names[i : i + len(every)] for i in range(0, len(names), len(every))]
