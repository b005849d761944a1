"""The vision encoder with a method inside: pixels of a video in, the tokens that reach the LLM out.

`encode` runs a model's vision tower and projector (`earlytom.families.Vision`) and asks a `Method` which frames and
which tokens stay. PyTorch and the exported graph both run it; they differ in how the method's steps are computed.

It has two parts. Up to the method's first layer frames do not interact, so `head` can run on any of a clip's frames as
they arrive; `rest` needs them all. Both also take the frames of several videos, one video after the other: the layers
run on all of them at once, and the method decides for each.

Some towers also give the LLM states of earlier layers (`Tower.streams`). Between spans these are concatenated to the
hidden states along D, so that they are merged with their frames; after the projector they are concatenated to their
token, along E.

Notation: B videos, F frames, F' frames left, T = S + prefix tokens a frame inside the tower, S patch tokens, P tokens
after pooling, D tower width, E width of a token (the LLM's, or a multiple with such states), N tokens kept. A frame is
`Tower.step` pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import Features, Vision
from earlytom.merge import segments_of
from earlytom.method import Method, Note
from earlytom.spans import check_watched, layer_spans
from earlytom.towers import Tower


@dataclass(frozen=True)
class VisualTokens:
    """A video's visual tokens for the LLM (without what closes them).

    Attributes:
        tokens: [N, E] projected tokens, in the method's order: time, then raster order within a frame.
        positions: [N] int64, `frame * P + cell`, frame counted among the F' frames.
        hidden: [F', S, D] patch hidden states after the last layer that runs.
        received: [F', S] fp32 received attention of the watched layer, merged like the frames; [F', 0] if the method
            watches none.
        segment_start: [F'] int64, first frame of each remaining frame's final segment.
        frames_per_stage: frames before the first merge and after each one.
        sources: [F', F] fp32, weight of each input frame in each remaining frame; rows sum to one.
        place: [N] int64, `frame of the video * P + cell`, with the frame that has the largest share in the token.
        bias: [N] fp32, log of the number of the video's tokens that each stands for (`earlytom.standing`).
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    received: Tensor
    segment_start: Tensor
    frames_per_stage: tuple[int, ...]
    sources: Tensor
    place: Tensor
    bias: Tensor

    @property
    def segments(self) -> Tensor:
        """[G, 2] int64: first and last frame of each final segment, inclusive."""
        return segments_of(self.segment_start)


@torch.no_grad()
def encode(
    vision: Vision,
    pixels: Tensor,
    method: Method,
    *,
    depth: int | None = None,
    trace: dict[str, Tensor] | None = None,
    every_layer: bool = False,
) -> VisualTokens:
    """Encode one video with a method.

    Args:
        vision: from `earlytom.families.Family.vision`.
        pixels: [F * step, 3, H, W] normalised pixels in the tower's dtype. For the B videos of a batched method
            [B * F * step, 3, H, W], one after the other; tokens, positions, sources, place and bias then have a leading
            B.
        method: decides which frames and tokens stay.
        depth: number of layers to run; default: all (the post layer norm is never applied).
        trace: filled with the intermediate tensors by name, hidden states of every layer if `every_layer` is set.

    Raises:
        UserError: no frames, not four dimensions, pictures that do not fill a frame, a depth or a method's layer that
            the tower does not have, or a method that does not support states of earlier layers.
    """
    if pixels.dim() != 4 or pixels.shape[0] < 1:
        raise UserError(f"pixels must be [frames, 3, height, width] with a frame, got {list(pixels.shape)}")
    step = vision.tower.step
    if pixels.shape[0] % (step * method.videos):
        raise UserError(f"a frame is {step} pictures here, so their number must be a multiple, got {pixels.shape[0]}")
    depth = checked_depth(vision.tower, method, depth)

    def note(**values: Tensor) -> None:
        if trace is not None:
            trace.update(values)

    frames = pixels.shape[0] // (step * method.videos)
    entering = list(method.frames(frames))
    if len(entering) < frames:
        pixels = pixels.unflatten(0, (method.videos, frames, step))[:, entering].flatten(0, 2)
    hidden, received = head(vision.tower, pixels, method, depth, note, every_layer)
    chosen = torch.eye(frames, device=pixels.device)[entering] if len(entering) < frames else None
    return rest(vision, hidden, received, method, depth, note, every_layer, entering=chosen)


def checked_depth(tower: Tower, method: Method, depth: int | None) -> int:
    """The number of layers to run, default all; UserError if tower and method are incompatible."""
    if tower.streams and not method.streams:
        raise UserError(
            f"method {method.name!r} knows nothing of the states of earlier layers that this model's LLM is given: use "
            "earlytom or cells"
        )
    if tower.places_patches and method.layers and not method.streams:
        raise UserError(
            f"method {method.name!r} merges tokens of a frame inside the tower, where this one has a place for each: "
            "leave out its depth"
        )
    available = len(list(tower.layers))
    if depth is not None and not 1 <= depth <= available:
        raise UserError(f"depth must be between 1 and {available} (the tower's layers), got {depth}")
    depth = depth or available
    method.check(depth)
    check_watched(method.watched(depth), tower.full)
    return depth


def head(
    tower: Tower,
    pixels: Tensor,
    method: Method,
    depth: int,
    note: Note = lambda **_: None,
    every_layer: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The layers up to the method's first, on any n frames: pixels [n * step, 3, H, W] to `run_span`'s result."""
    hidden = embed(tower, pixels)
    if method.layers:
        # The patch convolution's output is not contiguous, and sums keep the layout of their first term: all layers up
        # to the first merge would run on strided memory, and comparing frames took 36 times as long. With merging off
        # nothing is changed, so that results equal the original tower's to the last bit.
        hidden = hidden.contiguous()
    return run_span(tower, layer_spans(method.layers, depth)[0], hidden, method, depth, note, every_layer)


def rest(
    vision: Vision,
    hidden: Tensor,
    received: Tensor | None,
    method: Method,
    depth: int,
    note: Note = lambda **_: None,
    every_layer: bool = False,
    *,
    entering: Tensor | None = None,
) -> VisualTokens:
    """Everything after the method's first layer: hidden states [F, T, D] and received attention [F, S] from `head`, of
    all frames, to visual tokens. `entering`: which of the video's frames these are, as rows of the identity; default:
    all."""
    tower = vision.tower
    state = method.begin(vision, hidden.shape[0] // method.videos, hidden.device)
    if entering is not None:
        state.sources = entering
    kept: Tensor | None = None
    for stage, span in enumerate(layer_spans(method.layers, depth)):
        column = received if stage == 0 else None
        if stage > 0:
            hidden, column = run_span(tower, span, hidden, method, depth, note, every_layer)
        kept = kept if column is None else column
        if stage < len(method.layers):
            hidden, kept = method.after_layer(method.layers[stage], hidden, kept, state, note)
        if column is not None:
            method.look(hidden, state)

    hidden = hidden[:, tower.prefix :]
    if state.static is not None:
        note(static=state.static)
    found = project(vision, hidden, kept, note, every_layer)
    state.cells = found.cells
    tokens, positions = method.choose(found.features, found.relevance, state)
    place, bias = method.standing(found.features, positions, state)
    note(tokens=tokens, positions=positions, sources=state.sources, place=place, bias=bias)
    return VisualTokens(
        tokens,
        positions,
        tower.own(hidden),
        hidden.new_empty(len(hidden), 0) if kept is None else kept,
        torch.arange(len(hidden), device=hidden.device) if state.start is None else state.start,
        tuple(state.stages),
        state.sources,
        place,
        bias,
    )


def embed(tower: Tower, pixels: Tensor) -> Tensor:
    """Normalised pixels [F * step, 3, H, W] to the hidden states [F, T, D] that enter the first layer."""
    hidden = tower.embed(pixels)
    return hidden.to(tower.residual_dtype or hidden.dtype)


def run_span(
    tower: Tower,
    span: range,
    hidden: Tensor,
    method: Method,
    depth: int,
    note: Note = lambda **_: None,
    every_layer: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run one of `layer_spans` on `hidden [F, T, D]`, without the method's `after_layer` at its end.

    Returns the new hidden states, with those of `Tower.streams` concatenated, and the received attention [F, S] if the
    watched layer is in this span, else None.
    """
    received, watched = None, method.watched(depth)
    along = [hidden[..., tower.width :]] if tower.streams else []
    hidden = tower.own(hidden)
    for index in span:
        layer = tower.layers[index]
        inside = index == watched and index in method.layers
        if index == watched and not inside:
            # Computed beside the layer, not within, so that without a merge the layer runs as in the original tower.
            received = tower.received(layer, hidden)
        hidden, column = tower.run_layer(layer, hidden, receive=inside)
        received = received if column is None else column
        if every_layer or index in method.layers:
            note(**{f"hidden_{index}": hidden})
        along += [hidden] * (index in tower.streams)
    return torch.cat([hidden, *along], dim=-1) if along else hidden, received


def project(
    vision: Vision, hidden: Tensor, received: Tensor | None, note: Note = lambda **_: None, every_layer: bool = False
) -> Features:
    """Patch hidden states [F', S, D] and received attention [F', S] to features [F', P, E] and relevance [F', P]."""
    found = vision.features(hidden, received)
    if every_layer:
        note(projected=found.projected)
    note(features=found.features)
    if found.relevance is not None:
        note(relevance=found.relevance)
    return found
