"""A checkpoint that breaks careless half precision: the function of another one, at magnitudes of thousands.

Every step below changes the weights and, in exact arithmetic, not the function:

* The residual stream times a constant. Layer norms divide by it (their epsilon grows with its square), the cosine of
  frames does not see it, the projector's first weights take it out.
* A number added to all channels of the stream, from the embeddings up to the MLP of a layer before the first merge:
  the mean that every layer norm subtracts.
* Values times a constant, output projection divided by it. Queries times a constant, keys divided by it.
* A number added to one channel of every head's keys: the same for all keys, so softmax does not see it.
* Pairs of loud neurons with opposite output weights. (GELU is not homogeneous, so that an existing neuron cannot be
  scaled and scaled back.)

Factors are powers of two, which leave the digits of a float as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder.export.vision import SymbolicDecisions, VisionGraph
from builder.precision.islands import Islands
from builder.settings.config import BuildConfig
from earlytom.attention import column_means
from earlytom.families.adapters import SiglipTower
from earlytom.methods.earlytom import EarlyTom
from runtime.checkpoint import load_vision

Weights = dict[str, Tensor]
NEURONS = 8
LOUDNESS = 1200.0  # standard deviation of what enters a loud neuron
FIRST_MERGE = 1  # layer at which the raised mean ends


def stress_checkpoint(
    source: Path,
    folder: Path,
    *,
    stream: float = 2.0**11,
    mean: float = 8.0,
    values: float = 2.0**10,
    queries: float = 2.0**10,
    key_bias: float = 60.0,
) -> Path:
    """Write a stressed copy of a SigLIP LLaVA-OneVision checkpoint folder, in fp32.

    Args:
        stream: factor of the residual stream.
        mean: what is added to its channels up to layer `FIRST_MERGE`, before that factor.
        values, queries: factors of values and of queries.
        key_bias: what is added to the first channel of each head's keys.
    """
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    vision = config["vision_config"]
    head = vision["hidden_size"] // vision["num_attention_heads"]
    vision["layer_norm_eps"] *= stream**2
    vision["intermediate_size"] += 2 * NEURONS
    (folder / "config.json").write_text(json.dumps(config))

    weights = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    (tower,) = (name[: -len("embeddings.patch_embedding.bias")] for name in weights if "patch_embedding.bias" in name)
    (linear,) = (name for name in weights if name.endswith("linear_1.weight"))
    random = torch.Generator().manual_seed(0)
    for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"):
        weights[f"{tower}embeddings.{name}"] *= stream
    weights[f"{tower}embeddings.position_embedding.weight"] += mean * stream
    weights[linear] /= stream
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{index}."
        for name in ("self_attn.out_proj", "mlp.fc2"):
            _scale(weights, layer + name, stream)
        weights[f"{layer}self_attn.out_proj.weight"] /= values
        _scale(weights, f"{layer}self_attn.v_proj", values)
        _scale(weights, f"{layer}self_attn.q_proj", queries)
        _scale(weights, f"{layer}self_attn.k_proj", 1 / queries)
        weights[f"{layer}self_attn.k_proj.bias"][::head] += key_bias
        if index == FIRST_MERGE:
            weights[f"{layer}mlp.fc2.bias"] -= mean * stream
        _add_neurons(weights, f"{layer}mlp", stream, random)
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _scale(weights: Weights, linear: str, factor: float) -> None:
    for kind in ("weight", "bias"):
        weights[f"{linear}.{kind}"] *= factor


def _add_neurons(weights: Weights, mlp: str, stream: float, random: torch.Generator) -> None:
    """Neurons in pairs: equal input weights, opposite output weights."""
    width = weights[f"{mlp}.fc2.weight"].shape[0]
    rows, columns = (torch.randn(NEURONS, width, generator=random, dtype=torch.float64) for _ in range(2))
    rows *= LOUDNESS / rows.norm(dim=1, keepdim=True)
    columns = columns.T * stream / 32
    weights[f"{mlp}.fc1.weight"] = torch.cat([weights[f"{mlp}.fc1.weight"], rows, rows])
    weights[f"{mlp}.fc1.bias"] = torch.cat([weights[f"{mlp}.fc1.bias"], torch.zeros(2 * NEURONS)])
    weights[f"{mlp}.fc2.weight"] = torch.cat([weights[f"{mlp}.fc2.weight"], columns, -columns], 1)


class NaiveTower(SiglipTower):
    """Attention written down carelessly: logits scaled after the product, everything in the dtype of the model."""

    def attention(self, module: Any, hidden: Tensor, receive: bool) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden.shape[:2], -1, module.head_dim)
        projections = (module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (projection(hidden).view(shape).transpose(1, 2) for projection in projections)
        attention = torch.softmax((query @ key.transpose(2, 3)) * module.head_dim**-0.5, dim=-1)
        return (attention @ value).transpose(1, 2).flatten(2), column_means(attention) if receive else None


def _naive_similarity(method: EarlyTom, hidden: Tensor) -> Tensor:
    frames = hidden.transpose(0, 1)
    gram = frames @ frames.transpose(1, 2)
    norm = (gram * torch.eye(gram.shape[-1], dtype=gram.dtype)).sum(-1).sqrt()
    return (gram / (norm[:, :, None] * norm[:, None, :])).mean(0).float()  # the plan knows fp32 only


class NaiveDecisions(EarlyTom):
    similarity = _naive_similarity


class NaiveSymbols(SymbolicDecisions):
    similarity = _naive_similarity


def naive_graph(config: BuildConfig, dtype: torch.dtype) -> VisionGraph:
    """The vision part as `module.to(dtype)` makes it: every weight and every operator, nothing kept, nothing left out.

    Wants `NaiveTower` in the place of `earlytom.families.adapters.tower_of`, and to be exported with
    `NaiveSymbols`.
    """
    graph = plain_graph(config, dtype)
    graph.islands, graph.decisions = Islands(frozenset()), NaiveDecisions(config.earlytom)
    return graph


def plain_graph(config: BuildConfig, dtype: torch.dtype) -> VisionGraph:
    """The vision part in `dtype`, its weights converted and nothing else done to it."""
    part, preprocessing = load_vision(config.checkpoint, torch.float32), config.checkpoint.preprocessing
    return VisionGraph(
        part.vision_tower.to(dtype),
        part.projector.to(dtype),
        config.earlytom,
        mean=preprocessing.mean,
        std=preprocessing.std,
        depth=config.depth,
    )
