"""The plugins, and their registration with TensorRT.

    earlytom::FramePlan     similarity fp32 [F, F] -> weights fp32 [frames_out, F], static bool [F]
    earlytom::SelectTokens  features [F', P, E], received fp32 [F', P], static bool [F'] -> tokens, positions int64
    earlytom::SelectGreedy  salient fp32 [M], alike fp32 [M, M] -> taken int64 [count]

with the inputs, outputs and attributes of the ONNX functions of those names. They are quickly-deployable plugins with
an implementation compiled ahead of time: `register` describes the outputs, `autotune` names the type combinations, and
`aot_impl` answers with PTX, the launch and no further arguments, since every shape is a constant of the kernel.

Observed with the bindings of 11.4 and in the parser's sources, and handled here:
* a float attribute arrives in fp32 (0.8 as 0.800000012, so the shortest decimal of that fp32 number is taken), a string
  with the C string's final zero byte;
* all attributes are passed by position, in the order of registration;
* an exception inside a callback may not propagate to the builder's caller, so the first is kept in `Plugins.error`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias
from typing import TYPE_CHECKING, Any

import numpy as np

from builder.export import cells, functions
from builder.export.functions import DOMAIN
from builder.plugins import NATIVE
from builder.plugins.ptx import CompiledKernel, compile_launch
from runtime.engine.manifest import PluginRecord
from runtime.errors import EngineError
from runtime.trt import Capability

if TYPE_CHECKING:
    from earlytom.kernels.launch import Launch

VERSION = "1"  # tensorrt.plugin gives every plugin this one
FLOATS = ("FP32", "FP16", "BF16")
# TensorRT's type names, as autotune takes them -> member of DataType, Triton's type, name in records.
TYPES = {
    "FP32": ("FLOAT", "*fp32", "fp32"),
    "FP16": ("HALF", "*fp16", "fp16"),
    "BF16": ("BF16", "*bf16", "bf16"),
    "BOOL": ("BOOL", "*i1", "bool"),
    "INT64": ("INT64", "*i64", "int64"),
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    Attributes:
        inputs, outputs: tensor names to their allowed types. Tensors with the same allowed types have the same type.
        attributes: names to Python types, in the order of registration.
        output_shapes: (input shapes, attributes) to the output shapes. Dimensions may be symbols: * and + only.
        launch: (input shapes, attributes) to the kernel's launch.
    """

    name: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    attributes: Mapping[str, type]
    output_shapes: Callable[[Sequence[Any], Mapping[str, Any]], tuple[tuple[Any, ...], ...]]
    launch: Callable[[Sequence[Shape], Mapping[str, Any]], Launch]

    @property
    def id(self) -> str:
        return f"{DOMAIN}::{self.name}"


def _launch_plan(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    from earlytom.kernels.frame_plan import launch

    return launch(shapes[0][0], **attributes, bounds=False)


def _launch_selection(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    from earlytom.kernels.select_tokens import launch

    return launch(*shapes[0], **attributes)


def _launch_greedy(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> Launch:
    from earlytom.kernels.select_greedy import launch

    return launch(shapes[0][0], **attributes)


FRAME_PLAN = Plugin(
    functions.FRAME_PLAN,
    inputs={"similarity": ("FP32",)},
    outputs={"weights": ("FP32",), "static": ("BOOL",)},
    attributes={"frames_out": int, "tau": float, "ema": float, "max_window": int, "trailing": str},
    output_shapes=lambda shapes, attributes: ((attributes["frames_out"], shapes[0][0]), (shapes[0][0],)),
    launch=_launch_plan,
)
SELECT_TOKENS = Plugin(
    functions.SELECT_TOKENS,
    inputs={"features": FLOATS, "received": ("FP32",), "static": ("BOOL",)},
    outputs={"tokens": FLOATS, "positions": ("INT64",)},
    attributes={"places": int},
    output_shapes=lambda shapes, attributes: (
        (shapes[0][0] * attributes["places"], shapes[0][2]),
        (shapes[0][0] * attributes["places"],),
    ),
    launch=_launch_selection,
)
SELECT_GREEDY = Plugin(
    cells.SELECT_GREEDY,
    inputs={"salient": ("FP32",), "alike": ("FP32",)},
    outputs={"taken": ("INT64",)},
    attributes={"count": int},
    output_shapes=lambda shapes, attributes: ((attributes["count"],),),
    launch=_launch_greedy,
)
PLUGINS = {plugin.name: plugin for plugin in (FRAME_PLAN, SELECT_TOKENS, SELECT_GREEDY)}


@dataclass
class Plugins:
    """The registered plugins' state during the build of an engine.

    Attributes:
        target: compute capability that kernels are compiled for.
        kernels: the compiled kernels, by plugin, types, shapes and attributes.
        error: the first exception in a callback.
    """

    target: Capability
    kernels: dict[tuple[Any, ...], tuple[CompiledKernel, PluginRecord]] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """One record per kernel, in the order of compilation."""
        return tuple(record for _, record in self.kernels.values())

    def check(self) -> None:
        """Raise the first error inside TensorRT's callbacks, if any."""
        if self.error is not None:
            raise self.error

    def kernel(
        self, plugin: Plugin, types: Sequence[str], shapes: Sequence[Shape], attributes: Mapping[str, Any]
    ) -> CompiledKernel:
        """The kernel of one plugin call, compiled at first use.

        Args:
            types: TensorRT's names of the input and output types.
            shapes: of the inputs.
        """
        for name, shape in zip(plugin.inputs, shapes, strict=True):
            if min(shape, default=0) < 0:
                raise EngineError(
                    f"{plugin.id} takes static shapes, {name} has {list(shape)}: export with a fixed number of --frames"
                )
        key = (plugin.id, tuple(types), tuple(shapes), tuple(attributes.items()))
        if key not in self.kernels:
            made = compile_launch(plugin.launch(shapes, attributes), [TYPES[word][1] for word in types], self.target)
            self.kernels[key] = made, record(plugin, types, shapes, attributes, made)
        return self.kernels[key][0]


def record(
    plugin: Plugin,
    types: Sequence[str],
    shapes: Sequence[Shape],
    attributes: Mapping[str, Any],
    made: CompiledKernel,
) -> PluginRecord:
    """The manifest's record of a compiled kernel; arguments as in `Plugins.kernel`."""
    every = [*shapes, *plugin.output_shapes(shapes, attributes)]
    tensors = [f"{TYPES[word][2]} {list(shape)}" for word, shape in zip(types, every, strict=True)]
    inputs = len(plugin.inputs)
    return PluginRecord(
        name=plugin.id,
        version=VERSION,
        kernel=made.name,
        tensors=f"{', '.join(tensors[:inputs])} -> {', '.join(tensors[inputs:])}",
        ptx_sha256=made.sha256,
        grid=made.grid,
        threads=made.threads,
        registers=made.registers,
        shared_bytes=made.shared_bytes,
        spill_bytes=made.spill_bytes,
    )


def register(trt: Any, module: Any, target: Capability) -> Plugins:
    """Register the plugins with TensorRT; once a process.

    Args:
        trt: the module from `runtime.trt.load`.
        module: the one from `runtime.trt.load_plugins`.
        target: compute capability that kernels are compiled for.
    """
    plugins = Plugins(target)
    for plugin in PLUGINS.values():
        describe, combinations, implement = _callbacks(plugin, plugins, trt, module)
        module.register(plugin.id)(describe)
        module.autotune(plugin.id)(combinations)
        module.aot_impl(plugin.id)(implement)
        if trt.get_plugin_registry().get_creator(plugin.name, VERSION, DOMAIN) is None:
            raise EngineError(f"TensorRT {trt.__version__} did not take the plugin {plugin.id}: {NATIVE}")
    return plugins


def _callbacks(
    plugin: Plugin, plugins: Plugins, trt: Any, module: Any
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The functions that `tensorrt.plugin` registers: outputs, type combinations, implementation."""
    data_types = {word: getattr(trt.DataType, member) for word, (member, _, _) in TYPES.items()}
    words = {data_type: word for word, data_type in data_types.items()}
    inputs = len(plugin.inputs)

    def word_of(name: str, descriptor: Any, allowed: tuple[str, ...]) -> str:
        word = words.get(descriptor.dtype)
        if word not in allowed:
            raise EngineError(f"{plugin.id} takes {name} in {' or '.join(allowed)}, got {descriptor.dtype}")
        return str(word)

    def describe(*tensors: Any, **attributes: Any) -> tuple[Any, ...]:
        chosen = {
            allowed: word_of(name, tensor, allowed)
            for (name, allowed), tensor in zip(plugin.inputs.items(), tensors, strict=True)
        }
        shapes = plugin.output_shapes([tensor.shape_expr for tensor in tensors], plain(attributes))
        return tuple(
            module.from_shape_expr(shape, data_types[chosen.get(allowed, allowed[0])])
            for shape, allowed in zip(shapes, plugin.outputs.values(), strict=True)
        )

    def combinations(*arguments: Any) -> list[Any]:
        types = [*plugin.inputs.values(), *plugin.outputs.values()]
        return [module.AutoTuneCombination(", ".join("|".join(choice) for choice in types), "LINEAR")]

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        tensors, values, outputs = arguments[:inputs], arguments[inputs:-2], arguments[-2]
        kernel = plugins.kernel(
            plugin,
            [words[tensor.dtype] for tensor in (*tensors, *outputs)],
            [tuple(int(n) for n in tensor.shape) for tensor in tensors],
            plain(dict(zip(plugin.attributes, values, strict=True))),
        )
        x, y, z = kernel.grid
        launch = module.KernelLaunchParams(
            grid_x=x, grid_y=y, grid_z=z, block_x=kernel.threads, shared_mem=kernel.shared_bytes
        )
        return kernel.name, kernel.ptx, launch, module.SymIntExprs(0)

    tensors = dict.fromkeys(plugin.inputs, module.TensorDesc)
    several = GenericAlias(tuple, (module.TensorDesc,) * len(plugin.outputs))
    made = GenericAlias(tuple, (str, str, module.KernelLaunchParams, module.SymExprs))
    return (
        _signed(plugins, describe, {**tensors, **plugin.attributes}, several),
        _signed(
            plugins, combinations, {**tensors, "outputs": several}, GenericAlias(list, (module.AutoTuneCombination,))
        ),
        _signed(plugins, implement, {**tensors, **plugin.attributes, "outputs": several, "tactic": int}, made),
    )


def _signed(
    plugins: Plugins, function: Callable[..., Any], parameters: Mapping[str, Any], returned: Any
) -> Callable[..., Any]:
    """`function` with the signature that `tensorrt.plugin` reads, and with its first exception kept."""

    @functools.wraps(function)
    def kept(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except BaseException as error:
            plugins.error = plugins.error or error
            raise

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    described = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    kept.__signature__ = inspect.Signature(described, return_annotation=returned)  # type: ignore[attr-defined]
    return kept


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as written in the graph, from those that TensorRT passes (see the module's docstring)."""

    def value(given: Any) -> Any:
        if isinstance(given, str):
            return given.rstrip("\0")
        return shortest_decimal(given) if isinstance(given, float) else given

    return {name: value(given) for name, given in attributes.items()}


def shortest_decimal(number: float) -> float:
    """The shortest decimal with the same fp32 value: 0.800000011920929 to 0.8."""
    return float(str(np.float32(number))) if math.isfinite(number) else number
