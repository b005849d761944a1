"""Heads and losses of the first stage: vision tower and projector are trained on single frames with dense labels.

The tower predicts for every patch the colour, shape and digit that it shows and its object's centre, and from the mean
of the empty patches the objects in the frame. The projector's tokens, after the model's pooling, are aligned with the
decoder's embeddings of the words for what they show, and must give the object's place linearly, so that the decoder
starts from tokens in its own embedding space. The heads are dropped afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from builder.micro.labels import CELL_WORDS, COLOUR_NAMES, IGNORE, LOOKS, PATCH
from earlytom.families import DEFAULT_FAMILY
from earlytom.micro.data.scene import DIGITS, SIDE

_COLOUR_LEVELS = 3


class PerceptionHeads(nn.Module):
    """The linear heads of the first stage."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, len(COLOUR_NAMES) + 1 + len(LOOKS) + 1 + len(DIGITS) + 1)
        self.offset = nn.Linear(width, 3)
        self.ground = nn.Linear(width, _COLOUR_LEVELS)
        self.present = nn.Linear(width, len(COLOUR_NAMES) * len(LOOKS))
        self.place = nn.Linear(token_width, 3)
        self.tint = nn.Linear(token_width, _COLOUR_LEVELS)
        self.word_bias = nn.Parameter(torch.full((2, len(CELL_WORDS)), -4.0))
        self.word_scale = nn.Parameter(torch.tensor(1.0))


def perception_loss(
    hidden: Tensor, tokens: Tensor, words: Tensor, heads: PerceptionHeads, pixels: Tensor, labels: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the accuracies of a batch.

    Args:
        hidden: [B, S, D] states after the tower's last layer.
        tokens: [B, S, E] the projector's output for them.
        words: [2, W, E] from `word_embeddings`.
        heads: see there.
        pixels: [B, 3, H, H] normalised pixels.
        labels: the tensors of `labels.FrameLabels` by name.

    Returns:
        The loss, and scalars by name: accuracies on patches that show something, the shares of shown and of other
        words with a positive logit, and the mean error of places in pixels.
    """
    colour, look, digit = heads.patch(hidden).split((len(COLOUR_NAMES) + 1, len(LOOKS) + 1, len(DIGITS) + 1), -1)
    parts = {
        "colour": _balanced(colour, labels["colour"]),
        "look": _balanced(look, labels["look"]),
        "digit": _balanced(digit, labels["digit"]),
    }
    seen = (labels["look"] >= 0) & (labels["look"] < len(LOOKS))
    parts["offset"] = 2 * functional.smooth_l1_loss(heads.offset(hidden)[seen], labels["offset"][seen], beta=0.2)
    ground = functional.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2)
    parts["ground"] = functional.mse_loss(heads.ground(hidden), ground)
    # From empty patches only, which so have to attend to the objects, as in a tower trained on whole images.
    empty = (labels["look"] == len(LOOKS)).to(hidden)[..., None]
    present = heads.present((hidden * empty).sum(1) / empty.sum(1).clamp_min(1))
    parts["present"] = 5 * functional.binary_cross_entropy_with_logits(present, labels["present"])
    cells = DEFAULT_FAMILY.pool(tokens)  # [B, P, E]
    logits = heads.word_scale * torch.einsum("bpe,kwe->bpkw", cells, words) + heads.word_bias
    target = labels["words"][:, :, None].expand_as(logits)
    known = ~target.isnan()
    error = functional.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none")
    positive, negative = known & (target > 0.5), known & (target < 0.5)
    parts["words"] = 2 * (error[positive].mean() + 4 * error[negative].mean())
    placed = ~labels["place"][..., 0].isnan()
    parts["place"] = 20 * functional.smooth_l1_loss(heads.place(cells)[placed], labels["place"][placed], beta=0.05)
    parts["tint"] = functional.mse_loss(heads.tint(cells), DEFAULT_FAMILY.pool(ground))
    with torch.no_grad():
        right = {
            name: _accuracy(logit, labels[name])
            for name, logit in (("colour", colour), ("look", look), ("digit", digit))
        }
        right["words"] = (logits[positive] > 0).float().mean()
        right["false_words"] = (logits[negative] > 0).float().mean()
        right["place_px"] = (heads.place(cells)[placed] - labels["place"][placed])[:, :2].abs().mean() * SIDE
    return sum(parts.values(), torch.zeros(())), right


def word_embeddings(model: Any, tokenizer: Any) -> Tensor:
    """[2, W, E]: the decoder's embeddings of `CELL_WORDS`, with and without a leading space."""
    vocabulary = tokenizer.get_vocab()
    # digits are separate tokens, with or without a space
    spaced = [vocabulary.get(f"Ġ{word}", vocabulary[word]) for word in CELL_WORDS]
    bare = [vocabulary[word] for word in CELL_WORDS]
    return model.get_input_embeddings().weight[torch.tensor([spaced, bare])]


def _balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in which patches that show something weigh, in all, as much as those that show nothing."""
    none = logits.shape[-1] - 1
    error = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none")
    shown, empty = ((target >= 0) & (target < none)).flatten(), (target == none).flatten()
    return (error * shown).sum() / shown.sum().clamp_min(1) + (error * empty).sum() / empty.sum().clamp_min(1)


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    none = logits.shape[-1] - 1
    shown = (target >= 0) & (target < none)
    return ((logits.argmax(-1) == target) & shown).sum() / shown.sum().clamp_min(1)
