"""Counts of arithmetic: the published figures, and torch's own counter on tiny models.

The counter sees matrix products, convolutions and attention as what they run as, so attention is made to run as two
products (the MATH kernel); it counts nothing else, and nor does `earlytom.flops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig

from earlytom import EarlyTomConfig, encode_video, flops
from earlytom.budget import frames_per_stage

from .tiny import llava, tower, video

SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations by operator, as torch counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def test_so400m_is_641_gflop_a_frame_and_20_5_tflop_for_32() -> None:
    frame = flops.vision_encoder(SO400M, (1,), (), 26)
    assert round(frame / 1e9) == 641
    assert round(flops.vision_encoder(SO400M, (32,), (), 26) / 1e12, 1) == 20.5
    assert flops.vision_encoder(SO400M, (32,), (), 26) == 32 * frame


def test_default_budget_saves_what_the_layer_counts_say() -> None:
    """32, 24, 18, 14 frames in 7, 8, 6 and 5 layers: all layers cost the same, so the share is a weighted mean."""
    full = flops.vision_encoder(SO400M, (32,), (), 26)
    less = flops.vision_encoder(SO400M, (32, 24, 18, 14), (6, 14, 20), 26)
    layer = flops.encoder_layer(729, 1152, 4304)
    assert full - less == layer * (26 * 32 - (7 * 32 + 8 * 24 + 6 * 18 + 5 * 14))


@pytest.mark.parametrize("layers", [(), (1,), (0, 2)], ids=str)
def test_vision_encoder_equals_the_counter(layers: tuple[int, ...]) -> None:
    """A tiny tower with and without merging.

    The method's own products (similarity, plan, merging, and with merging off the attention matrix that received
    attention is read from) are left out of the figure by definition, so they are counted apart and taken off.
    """
    model, frames, depth = tower("siglip"), 8, 4
    config = EarlyTomConfig(retention_ratio=0.5, merge_layers=layers, tau=0.5, schedule="budget", frame_budget=0.75)
    stages = frames_per_stage(frames, merges=len(layers), frame_budget=0.75)
    pixels = video("drift", frames)
    kinds = counted(lambda: encode_video(model, nn.Identity(), pixels, config))
    own = flops.vision_encoder(model.config, stages, layers, depth)
    extra = method_flops(model.config, stages, layers)
    assert sum(kinds.values()) - extra == own
    assert extra > 0
    if not layers:  # and the untouched tower, where there is nothing to take off
        assert sum(counted(lambda: model(pixels)).values()) == own


def method_flops(config: Any, stages: tuple[int, ...], layers: tuple[int, ...]) -> int:
    """What EarlyTom itself multiplies, by the shapes of `earlytom.merge` and `earlytom.encoder`."""
    patches, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    orbits = [(frames - 1).bit_length() * 2 * frames**3 for frames in (*stages, stages[-1])]  # squarings of [F, F]
    total = 0
    for index, (before, after) in enumerate(zip(stages, stages[1:], strict=False)):
        total += 2 * patches * before * before * width  # Gram products
        total += 2 * orbits[index] if after < before else orbits[index]  # segments, and which frames are visited
        total += 2 * before**3 + 2 * after * before * before if after < before else 0  # fold, then pick
        total += 2 * after * before * patches * width  # merging hidden states
        total += 2 * after * before * stages[0]  # and what each frame is made of
    final = stages[-1]
    total += 2 * patches * final * final * width + orbits[-1]  # final segments
    if layers:
        total += 2 * final * stages[-2] * patches  # merging received attention
    else:
        total += 4 * final * patches * width * width + 2 * final * patches * patches * width  # q, k, and their product
    return total


def test_projector_equals_the_counter() -> None:
    model: Any = llava()
    projector, patches = model.model.multi_modal_projector, 25
    measured = counted(lambda: projector(torch.zeros(3, patches, 32)))
    assert sum(measured.values()) == flops.projector(model.config, 3)


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (4, 2), (8, 1)])
def test_prefill_equals_the_counter(heads: int, keys: int) -> None:
    """The counter takes attention as the full square that the MATH kernel runs; a causal kernel needs half of it, and
    half is what `prefill` counts. So the products of attention are halved, and nothing else."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=96,
    )
    model, tokens = Qwen2ForCausalLM(config).eval(), 40
    ids = torch.zeros(1, tokens, dtype=torch.long)
    measured = counted(lambda: model(ids, logits_to_keep=1, use_cache=False))
    rotary = 2 * (64 // heads // 2) * tokens  # the angles of the positions: an outer product that is written as one
    attention = 4 * config.num_hidden_layers * tokens * tokens * config.hidden_size
    assert sum(measured.values()) - rotary - attention // 2 == flops.prefill(config, tokens)


def test_a_wrong_count_would_be_noticed() -> None:
    """Negative control: one layer fewer, or one more frame, is another number."""
    assert flops.vision_encoder(SO400M, (32,), (), 25) != flops.vision_encoder(SO400M, (32,), (), 26)
    # The layer after which frames are merged still runs on all of them.
    one = flops.vision_encoder(SO400M, (4, 2), (25,), 26)
    assert one == flops.vision_encoder(SO400M, (4,), (), 26)
    assert flops.vision_encoder(SO400M, (4, 2), (24,), 26) == one - 2 * flops.encoder_layer(729, 1152, 4304)
