"""TempMe as published: frames of a video through a CLIP encoder with trained adapters and temporal embeddings.

`TempMeVideo` refuses to run without trained weights. The schedule and the merge step alone need no training.

Notation: V videos, F frames, D width, E output width, R rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.bipartite import Matching
from earlytom.errors import UserError
from earlytom.tempme.block import BlockForm, block
from earlytom.tempme.schedule import TempMeSchedule

EPS = 1e-5
LAYER_WEIGHTS = (
    *("qkv_w", "qkv_b", "lora_a", "lora_b", "out_w", "out_b", "ln1_w", "ln1_b", "ln2_w", "ln2_b"),
    *("fc_w", "fc_b", "pr_w", "pr_b"),
)
WHOLE_WEIGHTS = ("conv1", "class_embedding", "ln_pre_w", "ln_pre_b", "ln_post_w", "ln_post_b", "proj")

Watch = Callable[[int, Tensor, Tensor, int, int], None]
"""A callback after each layer: its number, hidden states, sizes, protected tokens a clip, clips a video."""


@dataclass(frozen=True)
class VideoFeatures:
    """frames [V, F, E] of unit length; video [V, E], the mean of valid frames; hidden [V * clips, n, D]."""

    frames: Tensor
    video: Tensor
    hidden: Tensor


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class TempMeVideo:
    """The published path.

    Args:
        weights: `WHOLE_WEIGHTS`, `position` [1 + patches, D], and `LAYER_WEIGHTS` stacked along a first axis of layers.
        temporal: for each merge layer the embeddings [clips, D] of the clips before joining; None: no embeddings.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        schedule: TempMeSchedule,
        *,
        heads: int,
        temporal: Sequence[Tensor] | None = None,
        proportional: bool = True,
    ) -> None:
        missing = [name for name in (*WHOLE_WEIGHTS, "position", *LAYER_WEIGHTS) if name not in weights]
        if missing:
            raise UserError(f"TempMe's encoder is trained and has no {missing[0]!r}: load the weights of a checkpoint")
        if temporal is not None and len(temporal) != len(schedule.merge_layers):
            raise UserError(f"give a temporal embedding for each of {len(schedule.merge_layers)} merge layers")
        self.weights, self.schedule, self.temporal = weights, schedule, temporal
        self.form = BlockForm(heads, EPS, quick_gelu, proportional, schedule.faithful)

    @torch.no_grad()
    def __call__(
        self,
        pixels: Tensor,
        valid: Tensor,
        *,
        watch: Watch = lambda *_: None,
        note: Callable[[int, str, Matching], None] = lambda *_: None,
    ) -> VideoFeatures:
        """Features of `pixels [V * F, 3, height, width]`, video after video; `valid [V, F]`: False for padding."""
        w, frames = self.weights, valid.shape[1]
        hidden = self._embed(pixels)
        size = torch.ones(hidden.shape[:2], device=hidden.device)
        plan = self.schedule.plan(frames, hidden.shape[1], len(w["qkv_w"]), protected=1)
        protected = 1
        for number, merge in enumerate(plan):
            temporal = None
            if self.temporal is not None and merge.merge_layer is not None:
                temporal = self.temporal[merge.merge_layer].repeat(len(valid), 1)
            layer = {name: w[name][number] for name in LAYER_WEIGHTS}
            told = self._teller(note, number)
            hidden, size = block(
                hidden, size, layer, self.form, merge, protected=protected, temporal=temporal, note=told
            )
            protected = merge.protected
            watch(number, hidden, size, protected, merge.clips)
        found = hidden[:, :protected].unflatten(0, (len(valid), -1)).flatten(1, 2)  # [V, F, D]
        found = functional.layer_norm(found, found.shape[-1:], w["ln_post_w"], w["ln_post_b"], EPS) @ w["proj"]
        found = found / found.norm(dim=-1, keepdim=True)
        counted = valid.to(found.dtype)[..., None]
        return VideoFeatures(found, (found * counted).sum(1) / counted.sum(1).clamp_min(1), hidden)

    def _embed(self, pixels: Tensor) -> Tensor:
        w = self.weights
        patches = functional.conv2d(pixels, w["conv1"], stride=w["conv1"].shape[-1]).flatten(2).transpose(1, 2)
        start = w["class_embedding"].expand(len(patches), 1, -1)
        hidden = torch.cat([start, patches], 1) + w["position"]
        return functional.layer_norm(hidden, hidden.shape[-1:], w["ln_pre_w"], w["ln_pre_b"], EPS)

    @staticmethod
    def _teller(note: Callable[[int, str, Matching], None], number: int) -> Callable[[str, Matching], None]:
        return lambda kind, found: note(number, kind, found)
