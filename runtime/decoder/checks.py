"""Checks of a prompt before its prefill, and the errors for values that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.decoder.placing import Placed

_BROKEN = "the prompt's {} values that are not finite: check the vision engine with its report.json"


def checked_length(embeds: Tensor, width: int) -> int:
    """L of embeddings [1, L, D]. Raises ValueError if they are something else."""
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds must be [1, L, {width}], got {list(embeds.shape)}")
    if embeds.shape[1] < 1:
        raise ValueError("the prompt is empty: give at least one embedding")
    return embeds.shape[1]


def refuse_prefix(*, merging: bool) -> None:
    """Raise UserError for a prompt with a prefix if inner merging is on and has visual tokens to merge."""
    if merging:
        raise UserError(
            "inner merging ranks the visual tokens by the question, so they cannot be read before it: leave out "
            "--inner-layer (inner=...), or ask without a prefix"
        )


def refuse_long_prefix(length: int, limit: int) -> None:
    """Raise UserError for the beginning of a prompt with which no question and no answer fit in `limit` positions."""
    if length > limit - 2:
        raise UserError(
            f"a prefix of {length} tokens leaves no room for a question and an answer in the decoder's {limit} "
            "positions: use an engine with fewer frames or tokens"
        )


def refuse_places(placed: Placed, config: Any, *, merging: bool) -> None:
    """Refuse a prompt that cannot be placed like that.

    Args:
        config: of the language model.
        merging: inner merging has something to merge in the prompt.

    Raises:
        UserError: the model, or inner merging, knows nothing of what is given.
        ValueError: positions on other axes than the model's rotary embedding has.
    """
    *axes, length = placed.positions.shape
    section = (getattr(config, "rope_parameters", None) or {}).get("mrope_section", ())
    if axes and axes != [len(section)]:
        wanted = f"[{length}] or [{len(section)}, {length}]" if section else f"[{length}]"
        raise ValueError(f"positions must be int64 {wanted}, got {list(placed.positions.shape)}")
    if (kind := config._attn_implementation) not in ("sdpa", "eager"):
        raise UserError(
            f"positions and an attention bias need attention by sdpa, this model's is {kind}: load it with "
            "attn_implementation='sdpa', or use --no-bias --positions consecutive"
        )
    if placed.states is not None and merging:
        raise UserError("inner merging does not know states of layers: leave out --inner-layer (inner=...)")
    if placed.bias is None:
        return
    if merging:
        raise UserError(
            "inner merging does not know what a merged key weighs: leave out --inner-layer (inner=...), or use "
            "--no-bias"
        )
    refuse_bias(config)


def refuse_bias(config: Any) -> None:
    """Raise UserError if a language model of this `config` does not support an attention bias."""
    if not _sees_all(config):
        raise UserError(
            "an attention bias needs full attention, and this language model has others (sliding windows, say): use "
            "--no-bias"
        )


def broken_prompt(embeds: Tensor, placed: Placed | None) -> str | None:
    """The error of a prompt with values that are not finite, else None. The host waits for the device."""
    if not bool(torch.isfinite(embeds).all()):
        return _BROKEN.format("embeddings hold")
    if placed is not None and placed.bias is not None and not bool(torch.isfinite(placed.bias).all()):
        return _BROKEN.format("attention bias holds")
    if placed is not None and placed.states is not None and not bool(torch.isfinite(placed.states).all()):
        return _BROKEN.format("states of layers hold")
    return None


def overflow(dtype: torch.dtype, count: int) -> str:
    """The error if the logits of token `count` are not finite although the prompt is."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"the language model's logits are not finite at token {count} in {name}: its activations overflow; "
        "load it in bfloat16 or float32"
    )


def _sees_all(config: Any) -> bool:
    """Whether every layer has full causal attention."""
    from runtime.decoder.cache import DecoderCache

    return DecoderCache(config, 1).on_device
