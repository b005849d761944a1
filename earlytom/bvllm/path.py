"""B-VLLM as published: features of a video and a question to the tokens that the language model sees.

Two Q-Formers, a layer norm and three linear layers are trained, for one vision tower; `BVLLMPath` refuses to run
without their weights. Noise is an argument: the published path draws it at every call, so that two calls differ.

Notation: T frames, S patch tokens a frame, C vision width, E LLM width, L surviving frames, q frame-selecting queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.bvllm.frames import CandidateMerge, frame_tokens, merge_candidates, merge_tokens
from earlytom.bvllm.qformer import QFormer
from earlytom.errors import UserError

CHOOSERS = 16  # queries of the temporal Q-Former that select frames
TEMPERATURE = 0.5
EPS = 1e-5


@dataclass(frozen=True)
class Selection:
    """logits and selector (softmax weights) [q, T], candidates [q, S, C], and how they are merged."""

    logits: Tensor
    selector: Tensor
    candidates: Tensor
    merge: CandidateMerge


@dataclass(frozen=True)
class BVLLMTokens:
    """tokens [N, E] of a video ([prompts, 32, E] of an image), spatial [L, 32, h] from the second Q-Former, frames
    [L, S, C] after merging, and their selection (None for an image)."""

    tokens: Tensor
    spatial: Tensor
    frames: Tensor
    selection: Selection | None


class BVLLMPath:
    """The published path.

    Args:
        weights: under `temporal.` and `spatial.` a Q-Former (`QFormer`) and a `projector` each; `ln`, `val_projector`.
        heads: of both Q-Formers.
        faithful: as in `earlytom.bvllm.frames`.
    """

    def __init__(self, weights: Mapping[str, Tensor], heads: int, *, faithful: bool = False) -> None:
        self.temporal, self.spatial = (
            QFormer({k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}, heads)
            for part in ("temporal.", "spatial.")
        )
        modules = ("temporal.projector", "spatial.projector", "ln", "val_projector")
        for name in (f"{module}.{part}" for module in modules for part in ("weight", "bias")):
            if name not in weights:
                raise UserError(f"B-VLLM is trained and has no {name!r}: load the weights of a checkpoint")
        self.weights, self.faithful = weights, faithful

    def select(self, features: Tensor, ids: Tensor, mask: Tensor, noise: Tensor | None) -> Selection:
        """Candidates for `features [T, 1 + S, C]`, a class token first, and one question; `noise [q, T]` or None."""
        first = features[:, 0]
        chosen = self._linear("temporal.projector", self.temporal(ids, mask, first[None], queries=CHOOSERS)[0])
        logits = chosen @ first.T / first.shape[-1] ** 0.5
        selector = torch.softmax((logits if noise is None else logits + noise) / TEMPERATURE, -1)
        candidates = (selector @ self._patches(features).flatten(1)).unflatten(1, (-1, features.shape[-1]))
        return Selection(logits, selector, candidates, merge_candidates(selector))

    @torch.no_grad()
    def __call__(self, features: Tensor, ids: Tensor, mask: Tensor, *, noise: Tensor | None = None) -> BVLLMTokens:
        """The tokens of a video for one question, or of an image (one frame) for several.

        Args:
            features: [T, 1 + S, C]; ids: [prompts, L] int64; mask: [prompts, L].
            noise: [q, T], Gumbel noise for a video; None: no noise.
        """
        selection = None
        if len(features) == 1:
            frames = self._patches(features).expand(len(ids), -1, -1)
        elif len(ids) > 1:
            raise UserError(f"a video takes one question at a time, got {len(ids)}")
        else:
            selection = self.select(features, ids, mask, noise)
            frames = selection.merge.merge(selection.candidates, faithful=self.faithful)
            ids, mask = ids.expand(len(frames), -1), mask.expand(len(frames), -1)
        spatial = self.spatial(ids, mask, frames)
        reduced = spatial if selection is None else merge_tokens(spatial, frame_tokens(len(frames))).values
        tokens = self._linear("val_projector", self._linear("spatial.projector", reduced))
        return BVLLMTokens(tokens if selection is None else tokens.flatten(0, 1), spatial, frames, selection)

    def _patches(self, features: Tensor) -> Tensor:
        w = self.weights
        return functional.layer_norm(features[:, 1:], features.shape[-1:], w["ln.weight"], w["ln.bias"], EPS)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
