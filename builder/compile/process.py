"""The process in which `builder.compile.engine` runs TensorRT's builder: one request in, progress and one answer out.

Reads a `CompileRequest` as a line of JSON from stdin and writes JSON lines to stdout: any number of `{"phase", "done",
"steps"}`, then one of `{"result"}`, `{"error", "kind"}` (a `UserError`), `{"oserror"}`, `{"defect"}` (our own
traceback). Writes the engine and the layer list to the temporary paths of the request; the caller publishes or removes
them. The caller keeps its end of the stdin pipe open; this process ends when it closes.

    python -c "import sys; from builder.compile.process import serve; sys.exit(serve())" < request.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from builder.compile.child import end_with_parent
from builder.compile.layers import LayerSummary, check_precision, of_one_frame, parse_layers, summarise
from builder.plugins import NATIVE, kernel_target
from earlytom.errors import UserError
from runtime import trt as seam
from runtime.cli import limit_reached
from runtime.errors import EngineError

if TYPE_CHECKING:
    from builder.plugins.registry import Plugins

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class CompileRequest:
    """The request to the build process. Plain types only: it crosses a pipe as JSON."""

    onnx: str
    engine: str
    layers: str
    flavour: str
    target: seam.Capability
    dtype: str
    hardware_compatible: bool
    workspace_bytes: int
    expected_share: float = 1.0
    int8_share: float = 0.0
    folded: tuple[int, int] = (1, 1)
    compression: str = "native"
    profile: tuple[int, int, int] | None = None


def serve() -> int:
    """Read a request from stdin, write progress and one answer as JSON lines. Returns the exit status."""
    request = CompileRequest(**json.loads(sys.stdin.readline()))
    # TensorRT may print to stdout: that goes to stderr, so that the channel carries our messages alone.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Ctrl-C reaches this process, too: end at once instead of raising inside a callback. Likewise if the caller dies.
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(sys.stdin.fileno())
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(message) + "\n")

    try:
        say({"result": _build(request, say)})
    except UserError as error:
        say({"error": str(error), "kind": type(error).__name__})
        return 2
    except OSError as error:
        # The user does not know the temporary files: name their folder.
        ours = error.filename in (None, request.engine, request.layers)
        name = str(Path(request.engine).parent) if ours else str(error.filename)
        say({"oserror": [error.errno, error.strerror, name]})
        return 2
    except Exception as error:
        if (line := limit_reached(error)) is not None:
            say({"error": line, "kind": "UserError"})
            return 2
        say({"defect": traceback.format_exc()})
        return 1
    return 0


def _build(request: CompileRequest, say: Say) -> dict[str, Any]:
    trt = seam.load(request.flavour)
    say({"phase": "Parsing", "done": 0, "steps": 0})
    started = time.monotonic()
    nodes = check_nodes(Path(request.onnx))
    logger = seam.collecting_logger(trt, verbose=True)
    plugins = _register_plugins(trt, request)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, plugins))
    calls = _parse(trt, network, logger, request.onnx, plugins)
    dynamic = _dynamic_inputs(network, request)
    if dynamic:
        _allow_decomposition(trt, network)
    parsed = time.monotonic()
    config = _configure(trt, builder, request)
    _add_profile(builder, config, dynamic, request)
    monitor = seam.progress_monitor(trt, _throttled(say))
    config.progress_monitor = monitor
    with open(request.engine, "wb") as file:
        writer = seam.stream_writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if plugins is not None:
        plugins.check()
    if not built or not writer.written:
        raise UserError(_refusal(trt, logger, request))
    if plugins is not None and calls and not plugins.kernels:
        raise EngineError(f"{request.flavour} {trt.__version__} asked for no plugin kernel: {NATIVE}")
    done = time.monotonic()
    summary = _save_layers(trt, logger, request, nodes)
    check_precision(summary, request.dtype, expected=request.expected_share, int8=request.int8_share)
    return {
        "version": str(trt.__version__),
        "engine_bytes": writer.written,
        "peak_rss_bytes": _peak_rss(),
        "seconds": {"parse": parsed - started, "build": done - parsed},
        "warnings": sorted({" ".join(m.text.split()) for m in logger.messages if _is_warning(m)}),
        "layers": asdict(summary),
        "plugins": [] if plugins is None else msgspec.to_builtins(plugins.records),
    }


def _register_plugins(trt: Any, request: CompileRequest) -> Plugins | None:
    """Register the compression stage's plugins with TensorRT, if the request asks for them."""
    if request.compression != "plugin":
        return None
    from builder.plugins.registry import register

    major, minor = request.target
    target = kernel_target((major, minor), request.hardware_compatible)
    return register(trt, seam.load_plugins(request.flavour), target)


def _network_flags(trt: Any, plugins: Plugins | None) -> int:
    known = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 knows strongly typed networks only.
    flags = [known.STRONGLY_TYPED] if hasattr(known, "STRONGLY_TYPED") else []
    if plugins is not None:
        flags.append(known.PREFER_AOT_PYTHON_PLUGINS)
    return sum(1 << int(flag) for flag in flags)


def _parse(trt: Any, network: Any, logger: Any, path: str, plugins: Plugins | None) -> int:
    """Parse the file, whose external data lies beside it, into the network; returns the number of plugin layers."""
    parser = trt.OnnxParser(network, logger)
    calls = 0
    if plugins is None:
        good = parser.parse_from_file(path)
    else:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        model, calls = _with_plugin_calls(trt, Path(path))
        good = parser.parse(model, path)
        plugins.check()
    if not good or parser.num_errors:
        errors = seam.parser_errors(parser) or seam.errors_of(logger) or ["no reason given"]
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise UserError(f"TensorRT cannot parse {Path(path).name}: {'; '.join(errors[:5])}{more}")
    if plugins is not None:
        _check_network(trt, network, calls)
    return calls


def _dynamic_inputs(network: Any, request: CompileRequest) -> dict[str, tuple[int, ...]]:
    """Name and shape of every input whose first dimension is dynamic (-1)."""
    found = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        if request.profile is None or -1 in shape[1:]:
            expected = "a fixed one" if request.profile is None else "no other size than the first to be"
            raise UserError(
                f"input {tensor.name!r} of {Path(request.onnx).name} has dynamic shape {shape}, expected {expected}: "
                f"export with a fixed number of --frames"
            )
        found[str(tensor.name)] = shape
    return found


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Allow decomposing fp32 attention, which has no fused kernels; with static shapes TensorRT does so unasked."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.float32:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _add_profile(builder: Any, config: Any, dynamic: dict[str, tuple[int, ...]], request: CompileRequest) -> None:
    """Add an optimisation profile: least, usual and largest first dimension of the dynamic inputs."""
    if not dynamic or request.profile is None:
        return
    profile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        profile.set_shape(name, *((size, *shape[1:]) for size in request.profile))
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{request.flavour} refused the profile {request.profile} of {Path(request.onnx).name}")


def _with_plugin_calls(trt: Any, path: Path) -> tuple[bytes, int]:
    """The file's graph, serialised, with plugin nodes for the compression stage, and their number."""
    import onnx

    from builder.plugins.graph import as_plugin_calls
    from builder.plugins.registry import DOMAIN, PLUGINS, VERSION

    registry = trt.get_plugin_registry()
    registered = {name for name in PLUGINS if registry.get_creator(name, VERSION, DOMAIN) is not None}
    model = onnx.load(str(path), load_external_data=False)
    calls = as_plugin_calls(model, path.name, registered, VERSION)
    return model.SerializeToString(), calls


def _check_network(trt: Any, network: Any, calls: int) -> None:
    """Refuse a parsed network that has not one plugin layer per call."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    layers = kinds.count(trt.LayerType.PLUGIN_V3)
    if layers != calls:
        raise EngineError(f"TensorRT made {layers} plugin layers of {calls} calls of the compression stage: {NATIVE}")


def _configure(trt: Any, builder: Any, request: CompileRequest) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.flavour == "tensorrt-rtx":
        # No timing cache, STRIP_PLAN or REFIT: each needs a GPU.
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, "SM{}{}".format(*request.target))
        if not config.set_compute_capability(capability, 0):
            raise EngineError(f"tensorrt-rtx refused compute capability {request.target}: choose another --target")
        # A CUDA graph holds addresses: memory that the library allocates during a run may move at the next run.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    elif request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _refusal(trt: Any, logger: Any, request: CompileRequest) -> str:
    reason = next(iter(seam.errors_of(logger)), "it gave no reason")
    room = f" within {request.workspace_bytes / 2**30:.4g} GiB (--workspace)" if "workspace" in reason.lower() else ""
    return f"{request.flavour} {trt.__version__} cannot build this graph{room}: {reason}"


def _throttled(say: Say, interval: float = 0.1) -> Callable[[str, int, int], None]:
    """Report each change of phase, but steps at most every `interval` seconds: there are thousands of short ones."""
    last = ("", 0.0)

    def report(phase: str, done: int, steps: int) -> None:
        nonlocal last
        now = time.monotonic()
        if phase != last[0] or now - last[1] >= interval:
            last = (phase, now)
            say({"phase": phase, "done": done, "steps": steps})

    return report


def _save_layers(trt: Any, logger: Any, request: CompileRequest, nodes: OnnxNodes) -> LayerSummary:
    source, layers = "build log", parse_layers("\n".join(m.text for m in logger.messages if "LayerType: " in m.text))
    if not layers and seam.has_gpu():
        source, layers = "engine inspector", parse_layers(_inspect(trt, logger, request.engine))
    layers = of_one_frame(layers, *request.folded)
    summary = summarise(layers, nodes.attention, nodes.matrix)
    document = {
        "source": source,
        "flavour": request.flavour,
        "version": str(trt.__version__),
        "summary": summary.to_dict(),
        "layers": [asdict(layer) for layer in layers],
    }
    Path(request.layers).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return summary


def _inspect(trt: Any, logger: Any, engine_path: str) -> str:
    """The engine inspector's layer list, for a log without one. Needs a GPU; untested on one so far."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(engine_path).read_bytes())
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def _peak_rss() -> int:
    """Peak resident bytes of this process. Not from `getrusage`, whose maximum is inherited across fork."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ------------------------------------------------------------------------------------------------- the ONNX file


@dataclass(frozen=True)
class OnnxNodes:
    """Names of Attention nodes and of all nodes with matrix products (Attention included), function bodies included."""

    attention: tuple[str, ...]
    matrix: tuple[str, ...]


def check_nodes(path: Path) -> OnnxNodes:
    """Refuse a file with a node that is neither a standard ONNX operator nor a call of one of its own functions.

    Needed before TensorRT parses the file: its parser goes by the operator name alone, takes any unknown node for a
    plugin, and aborts the process for some of them.
    """
    import onnx

    if not path.is_file():
        raise UserError(f"no such ONNX file: {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the protobuf library's own errors, which differ with its implementation
        raise UserError(f"{path.name} is not an ONNX model ({' '.join(str(error).split())})") from error
    if not model.graph.node:
        raise UserError(f"{path.name} is not an ONNX model, or has no node")
    functions = {(function.domain, function.name) for function in model.functions}
    attention, matrix, foreign = [], [], []
    for node in _walk(model):
        standard = node.domain in ("", "ai.onnx")
        if not standard and (node.domain, node.op_type) not in functions:
            foreign.append(f"{node.name!r} ({node.domain}::{node.op_type})")
        if standard and node.op_type == "Attention":
            attention.append(node.name)
        if standard and node.op_type in ("MatMul", "Gemm", "Conv", "Einsum", "Attention"):
            matrix.append(node.name)
    if foreign:
        raise UserError(
            f"{path.name} has nodes that are neither standard ONNX nor a function of the model: "
            f"{', '.join(foreign[:5])}; add their bodies to model.functions"
        )
    return OnnxNodes(tuple(attention), tuple(matrix))


def _walk(model: Any) -> Iterator[Any]:
    """Every node of an ONNX model: the graph's, the functions', and those of the subgraphs of If, Loop and Scan."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _is_warning(message: seam.Message) -> bool:
    """Leaves out the warning, one per node, that nodes of a function called several times share their names."""
    return message.severity == "WARNING" and "already exists, the output tensors" not in message.text
