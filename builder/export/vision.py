"""The export stage of a build: the vision tower with the method inside, as one portable ONNX graph of static shapes.

In: uint8 frames [F, 3, H, W]. Out: the tensors of `runtime.engine.layout.OUTPUTS`. For B videos all of them have a
leading B; inside, frames are [B * F, ...], and the decisions are called once for each video. Normalisation is in the
graph. Decisions are calls of ONNX functions (`builder.export.functions`), so that one graph serves all backends. Values
that the accuracy gate and the drift table compare keep the names of the encoder's trace ("hidden_6", "weights_6",
"features", ...).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from builder.export import functions
from builder.export.cells import SymbolicCells
from builder.export.cells import body as cells_body
from builder.export.shared_weights import SharedWeights
from builder.precision.calibration import Int8Plan, put_in
from builder.precision.casts import set_vision_precision
from builder.precision.islands import DEFAULT, Islands
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, Family, Vision, family_of
from earlytom.merge import frame_similarity
from earlytom.method import Method
from earlytom.methods import method_of, several
from earlytom.methods.cells import Cells
from earlytom.methods.earlytom import EarlyTom
from earlytom.methods.published import PUBLISHED
from earlytom.methods.published.compressing import Exported
from earlytom.settings import MethodSettings
from earlytom.spans import trace_names
from earlytom.towers import Tower
from runtime.checkpoint import load_vision
from runtime.engine import layout

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig

# Opset 23 has attention as one operator; earlier ones decompose it, with a half-precision softmax.
OPSET = 23
# From this size on weights go into a file beside the graph: protobuf is limited to 2 GB, and a copy is saved.
EXTERNAL_DATA_BYTES = 256 * 2**20


class SymbolicDecisions(EarlyTom):
    """EarlyTom with calls of the ONNX functions in place of its decisions; the similarity is standard operators."""

    def __init__(self, config: EarlyTomConfig, similarity_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        self.similarity_dtype = similarity_dtype

    def similarity(self, hidden: Tensor) -> Tensor:
        return frame_similarity(hidden, self.similarity_dtype)

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        assert frames_out is not None  # the adaptive schedule is refused before tracing
        c = self.config
        frames = similarity.shape[0]
        weights, static = torch.onnx.ops.symbolic_multi_out(
            f"{functions.DOMAIN}::{functions.FRAME_PLAN}",
            (similarity,),
            {
                "frames_out": frames_out,
                "tau": c.tau,
                "ema": c.ema,
                "max_window": c.max_window,
                "trailing": c.trailing,
            },
            dtypes=(torch.float32, torch.bool),
            shapes=((frames_out, frames), (frames,)),
            version=functions.VERSION,
        )
        return weights, similarity.new_zeros(()), static

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        kept = features.shape[0] * places
        tokens, positions = torch.onnx.ops.symbolic_multi_out(
            f"{functions.DOMAIN}::{functions.SELECT_TOKENS}",
            (features, received, static),
            {"places": places},
            dtypes=(features.dtype, torch.int64),
            shapes=((kept, features.shape[2]), (kept,)),
            version=functions.VERSION,
        )
        return tokens, positions


class VisionGraph(nn.Module):
    """The module to export: maps uint8 frames to every named value of the encoder.

    Args:
        vision_tower, projector: Hugging Face modules, already in the precision of the graph
            (`builder.precision.casts`).
        config: the method's settings.
        mean, std: the model's normalisation, per channel, for pixels in [0, 1].
        depth: encoder layers to run.
        dtype: of the graph; default: that of the projector.
        islands: what is fp32 in it; used here for values without weights, which have no dtype of their own.
        family: of the model.

    Attributes:
        decisions: the method that decides; the PyTorch reference unless replaced.
        every_layer: whether `forward` returns the values of every layer, not only those of the merge layers.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module,
        config: MethodSettings,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        depth: int | None = None,
        dtype: torch.dtype | None = None,
        islands: Islands = DEFAULT,
        family: Family = DEFAULT_FAMILY,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.config = config
        self.depth = depth
        self.decisions: Method = method_of(config)
        self.family = family
        self.dtype = dtype or next(projector.parameters()).dtype
        self.islands = islands
        self.every_layer = False
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.scale = nn.Buffer(scale.float().view(1, 3, 1, 1), persistent=False)
        self.shift = nn.Buffer(shift.float().view(1, 3, 1, 1), persistent=False)

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 [F, 3, H, W] to normalised pixels in the dtype of the embeddings; [B, F, 3, H, W] to [B * F, ...]."""
        dtype = self._island("pixels")
        values = frames.to(dtype).flatten(0, -4)  # in this order: TensorRT reshapes no uint8
        pixels = values * self.scale.to(dtype) + self.shift.to(dtype)
        return pixels.to(self._island("embeddings"))

    @property
    def vision(self) -> Vision:
        """Tower and projector as `earlytom.encoder` takes them, in the precision of the graph."""
        vision = self.family.vision(self.vision_tower, self.projector)
        vision.tower.residual_dtype = self._island("residual")
        vision.tower.matrix_dtype = torch.float32 if "softmax" in self.islands else None
        vision.tower.logits_dtype = torch.float32 if "logits" in self.islands else None
        return vision

    @property
    def tower(self) -> Tower:
        """The vision tower's adapter, in the precision of the graph."""
        return self.vision.tower

    @property
    def layers(self) -> int:
        """Encoder layers that run."""
        return len(self.tower.layers) if self.depth is None else self.depth

    @property
    def similarity_dtype(self) -> torch.dtype:
        """The dtype of the matrix product that compares frames."""
        return self._island("similarity")

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        trace: dict[str, Tensor] = {}
        encode(
            self.vision,
            self.pixels(frames),
            self.decisions,
            depth=self.depth,
            trace=trace,
            every_layer=self.every_layer,
        )
        return trace | {layout.TOKENS: trace[layout.TOKENS].to(self.dtype)}

    def _island(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.islands else self.dtype

    @property
    def trace_names(self) -> list[str]:
        """The keys of what `forward` returns."""
        return trace_names(self.config, self.layers if self.every_layer else None)


def vision_graph(config: BuildConfig, dtype: torch.dtype, int8: Int8Plan | None = None) -> VisionGraph:
    """The checkpoint's vision tower with the method inside, in `dtype` (islands in fp32, products as `int8` says).

    Weights are read in fp32, so that islands keep full precision and an overflow in `dtype` is noticed.
    """
    part = load_vision(config.checkpoint, torch.float32)
    preprocessing = config.checkpoint.preprocessing
    family = family_of(config.model)
    if int8 is not None:
        layers = list(family.vision(part.vision_tower, part.projector).tower.layers)
        # TensorRT has signed int8 only; ONNX Runtime multiplies integers only in a graph that is otherwise fp32.
        unsigned = config.backend == "onnx" and dtype == torch.float32
        put_in(layers, part.projector, int8, dtype, unsigned=unsigned)
    set_vision_precision(part.vision_tower, part.projector, dtype, config.islands, family)
    return VisionGraph(
        part.vision_tower,
        part.projector,
        config.earlytom,
        mean=preprocessing.mean,
        std=preprocessing.std,
        depth=config.depth,
        dtype=dtype,
        islands=config.islands,
        family=family,
    )


@dataclass(frozen=True)
class Form:
    """How a method is exported.

    Attributes:
        calls: maps a graph to its method with ONNX function calls in place of data-dependent steps.
        body: the body of the function that a node calls, given the method's settings and F.
    """

    calls: Callable[[VisionGraph], Method]
    body: Callable[[ir.Node, Any, int], ir.Function]


def form_of(method: Method) -> Form:
    """Raises UserError for a method that cannot be exported."""
    if method.name not in FORMS:
        raise UserError(f"method {method.name!r} cannot be built into an engine: only {', '.join(FORMS)} can")
    return FORMS[method.name]


@dataclass(frozen=True)
class ExportedGraph:
    """An exported graph: its path and the names of all its files, the graph first."""

    path: Path
    files: tuple[str, ...]


def export_onnx(
    graph: VisionGraph,
    frames: int,
    size: tuple[int, int],
    path: Path,
    *,
    batch: int = 1,
    shared: SharedWeights | None = None,
) -> ExportedGraph:
    """Write the ONNX file, with a weights file beside it for large models.

    Args:
        graph: in the precision of the engine; its decisions are replaced by function calls during the export.
        frames: F, pictures of a clip.
        size: (H, W) of a frame.
        path: the .onnx file to write.
        batch: B, videos at once.
        shared: the weights file of several graphs.
    """
    if graph.config.schedule != "budget":
        raise UserError(
            "a single engine needs static shapes, so the schedule must be budget, not "
            f"{graph.config.schedule}: build with --schedule budget (builder.export.chain exports the adaptive one)"
        )
    kept, form = (graph.decisions, graph.every_layer), form_of(graph.decisions)
    calls = form.calls(graph)
    graph.decisions = several(calls, batch) if batch > 1 else calls
    graph.every_layer = True  # so that all values have their names
    shape = (frames, 3, *size) if batch == 1 else (batch, frames, 3, *size)
    try:
        model = trace(graph, {layout.FRAMES: torch.zeros(shape, dtype=torch.uint8)}, graph.trace_names)
    finally:
        graph.decisions, graph.every_layer = kept
    steps = frames // graph.tower.step
    return save(model, path, layout.OUTPUTS, lambda node: form.body(node, graph.config, steps), shared)


def trace(
    graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], dynamic_shapes: Any = None
) -> ir.Model:
    """`torch.onnx.export` without its log messages.

    Args:
        graph: returns values by name.
        inputs: example inputs by name.
        outputs: the names of what `graph` returns, in its order.
        dynamic_shapes: as `torch.export.export` takes them.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    return program.model


def save(
    model: ir.Model,
    path: Path,
    outputs: Sequence[str],
    body_of: Callable[[ir.Node], ir.Function],
    shared: SharedWeights | None = None,
) -> ExportedGraph:
    """Finish a traced model and write it, large weights beside it.

    Args:
        outputs: the outputs that the graph keeps; the other traced values stay inside under their names.
        body_of: makes the body of the function that a node of domain `earlytom` calls.
        shared: the weights file of several graphs; without it, large weights get a file of their own.
    """
    for node in model.graph:
        if node.domain == functions.DOMAIN and (node.domain, node.op_type, "") not in model.functions:
            body = body_of(node)
            model.functions[body.identifier()] = body
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name in outputs]
    # The exporter records the Python source of every node: local file names, and different bytes at every export.
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "earlytom-engine-builder", None
    data = None
    if shared is not None:
        shared.move(model)
    elif _weight_bytes(model) >= EXTERNAL_DATA_BYTES:
        data = f"{path.name}.data"
    ir.save(model, path, external_data=data)
    onnx.checker.check_model(str(path), full_check=True)
    beside = data if shared is None else shared.path.name
    return ExportedGraph(path, (path.name,) if beside is None else (path.name, beside))


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def budget_body(node: ir.Node, config: EarlyTomConfig, frames: int) -> ir.Function:
    """The body of the function that a node of the budget schedule's graph calls."""
    if node.op_type == functions.FRAME_PLAN:
        return functions.frame_plan(
            max_frames=frames, max_window=config.max_window, trailing=config.trailing, opset=OPSET
        )
    places = node.attributes["places"].as_int()
    return functions.select_tokens(per_frame=tokens_per_frame(node), places=places, opset=OPSET)


def tokens_per_frame(node: ir.Node) -> int:
    """P, from the shape of the features [F', P, E], a selection's first input."""
    features = node.inputs[0]
    assert features is not None
    assert features.shape is not None
    per_frame = features.shape[1]
    assert isinstance(per_frame, int)  # only the number of frames is dynamic, if anything
    return per_frame


def no_body(node: ir.Node, config: MethodSettings, frames: int) -> ir.Function:
    """For a method of ordinary operators only, whose graph calls no function."""
    raise AssertionError(f"the graph of {config.method} calls {node.op_type}")


FORMS: dict[str, Form] = {
    EarlyTom.name: Form(lambda graph: SymbolicDecisions(graph.config, graph.similarity_dtype), budget_body),  # type: ignore[arg-type]
    Cells.name: Form(lambda graph: SymbolicCells(graph.config), lambda node, _, frames: cells_body(node, OPSET)),  # type: ignore[arg-type]
} | {
    name: Form(lambda graph: graph.decisions, no_body) for name, kind in PUBLISHED.items() if issubclass(kind, Exported)
}
"""The methods that can be exported, by name."""
