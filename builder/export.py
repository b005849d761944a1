"""Stage one of a build: the vision part with EarlyTom inside, as one portable ONNX graph with static shapes.

In: uint8 frames [F, 3, H, W]. Out: tokens [N, E] and positions [N] (names in `runtime.contract`). Normalisation is in
the graph. The two decisions are calls of ONNX functions (`builder.functions`), so nothing forks the graph per backend.
Values that the accuracy gate looks at keep the names of the encoder's trace ("hidden_6", "weights_6", "features", ...).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from builder import functions
from earlytom.config import EarlyTomConfig
from earlytom.encoder import Decisions, encode, trace_names
from earlytom.errors import UserError
from earlytom.towers import tower_of
from runtime import contract

# Attention is one operator from opset 23 on; before, it is decomposed with a half-precision softmax.
OPSET = 23
# Weights beside the graph from this size on: protobuf ends at 2 GB, and a copy of the bytes is spared.
EXTERNAL_DATA_BYTES = 256 * 2**20


class SymbolicDecisions(Decisions):
    """Calls of the ONNX functions in place of the computation."""

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
    """What is exported: uint8 frames to every named value of the encoder.

    Args:
        vision_tower, projector: Hugging Face modules, already in the precision of the graph.
        config: the method's settings, budget schedule.
        mean, std: the model's normalisation, per channel, for pixels in [0, 1].
        depth: encoder layers to run.
        decisions: who decides; the reference in PyTorch by default.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module,
        config: EarlyTomConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        depth: int | None = None,
        decisions: Decisions | None = None,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.config = config
        self.depth = depth
        self.decisions = decisions or Decisions(config)
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.scale = nn.Buffer(scale.float().view(1, 3, 1, 1), persistent=False)
        self.shift = nn.Buffer(shift.float().view(1, 3, 1, 1), persistent=False)

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 [F, 3, H, W] to normalised pixels in the tower's dtype; the arithmetic is fp32."""
        dtype = next(self.projector.parameters()).dtype
        return (frames.float() * self.scale + self.shift).to(dtype)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        trace: dict[str, Tensor] = {}
        encode(
            tower_of(self.vision_tower),
            self.projector,
            self.pixels(frames),
            self.config,
            self.decisions,
            depth=self.depth,
            trace=trace,
        )
        return trace


@dataclass(frozen=True)
class ExportedGraph:
    """An exported graph: its path and the names of all its files, the graph first."""

    path: Path
    files: tuple[str, ...]


def export_onnx(graph: VisionGraph, frames: int, size: tuple[int, int], path: Path) -> ExportedGraph:
    """Write the ONNX file (and, for large models, one file of weights beside it).

    Args:
        graph: from `VisionGraph`, in the precision of the engine; calls stand in for its decisions while it is
            exported.
        frames: F.
        size: (H, W) of a frame.
        path: the .onnx file to write.

    Raises:
        UserError: the adaptive schedule, whose shapes depend on the video.
    """
    if graph.config.schedule != "budget":
        raise UserError(
            "a single engine needs static shapes, so the schedule must be budget, not "
            f"{graph.config.schedule}: build with --schedule budget (the adaptive schedule runs in PyTorch)"
        )
    reference = graph.decisions
    graph.decisions = SymbolicDecisions(graph.config)
    try:
        model = _trace(graph, torch.zeros(frames, 3, *size, dtype=torch.uint8))
    finally:
        graph.decisions = reference
    _add_functions(model, graph.config, frames)
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name in contract.OUTPUTS]
    # The exporter notes the Python source of every node: file names of this machine, and other bytes at every export.
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "earlytom-engine-builder", None
    tensors = (value.const_value for value in model.graph.initializers.values())
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) >= EXTERNAL_DATA_BYTES
    data = f"{path.name}.data" if external else None
    ir.save(model, path, external_data=data)
    onnx.checker.check_model(str(path), full_check=True)
    return ExportedGraph(path, (path.name, data) if data else (path.name,))


def _trace(graph: VisionGraph, example: Tensor) -> ir.Model:
    """torch.onnx.export without the chatter of its passes; outputs carry the names of the encoder's trace."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[contract.FRAMES],
                output_names=trace_names(graph.config),
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    return program.model


def _add_functions(model: ir.Model, config: EarlyTomConfig, frames: int) -> None:
    """Give the model the bodies of the functions that its nodes call."""
    for node in model.graph:
        if node.domain != functions.DOMAIN or (node.domain, node.op_type, "") in model.functions:
            continue
        if node.op_type == functions.FRAME_PLAN:
            body = functions.frame_plan(
                max_frames=frames, max_window=config.max_window, trailing=config.trailing, opset=OPSET
            )
        else:
            features = node.inputs[0]
            assert features is not None
            assert features.shape is not None
            per_frame = features.shape[1]
            assert isinstance(per_frame, int)  # shapes are static
            body = functions.select_tokens(per_frame=per_frame, places=node.attributes["places"].as_int(), opset=OPSET)
        model.functions[body.identifier()] = body
