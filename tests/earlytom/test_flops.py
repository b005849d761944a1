"""Counts of arithmetic: the published figures, and torch's own counter on tiny models.

The counter sees matrix products, convolutions and attention as what they run as, so attention is made to run as two
products (the MATH kernel); it counts nothing else, and nor does `earlytom.flops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from earlytom import EarlyTomConfig, encode_video, flops
from earlytom.budget import frames_per_stage, kept_tokens
from earlytom.families import LLAVA_ONEVISION
from earlytom.inner_decoder import apply_inner

SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "vision_use_head": False,
}


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations by operator, as torch counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def test_so400m_is_641_gflop_a_frame_and_20_5_tflop_for_32() -> None:
    assert round(26 * flops.encoder_layer(729, 1152, 4304) / 1e9) == 641
    frame = flops.vision_encoder(SO400M, 729, (1,), (), 26)
    assert round(flops.vision_encoder(SO400M, 729, (32,), (), 26) / 1e12, 1) == 20.5
    assert flops.vision_encoder(SO400M, 729, (32,), (), 26) == 32 * frame
    llava = LlavaOnevisionConfig(vision_config=SO400M, text_config=Qwen2Config(hidden_size=3584))
    assert round((32 * frame + LLAVA_ONEVISION.projector_flops(llava, 32)) / 1e12, 1) == 21.3


def test_default_budget_saves_what_the_layer_counts_say() -> None:
    """32, 24, 18, 14 frames in 7, 8, 6 and 5 layers: all layers cost the same, so the share is a weighted mean."""
    full = flops.vision_encoder(SO400M, 729, (32,), (), 26)
    less = flops.vision_encoder(SO400M, 729, (32, 24, 18, 14), (6, 14, 20), 26)
    layer = flops.encoder_layer(729, 1152, 4304)
    assert full - less == layer * (26 * 32 - (7 * 32 + 8 * 24 + 6 * 18 + 5 * 14))


@pytest.fixture(scope="module")
def tower() -> SiglipVisionModel:
    """Four layers of width 32 on 5 x 5 patches."""
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**TINY)).eval()


def pixels(frames: int) -> Tensor:
    """[F, 3, 20, 20]: a slow change, so that frames are merged."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, 20, 20, generator=generator) + 0.2 * torch.randn(frames, 3, 20, 20, generator=generator)


def test_full_tower_equals_the_counter(tower: SiglipVisionModel) -> None:
    measured = counted(lambda: tower(pixels(8)))
    assert sum(measured.values()) == flops.vision_encoder(tower.config, 25, (8,), (), 4)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2), (0, 1, 3)], ids=str)
def test_compressed_tower_equals_the_counter(tower: SiglipVisionModel, layers: tuple[int, ...]) -> None:
    """Layer by layer, each on the frames that the budget leaves for it."""
    stages = frames_per_stage(8, merges=len(layers))
    model: Any = tower

    def work() -> None:
        hidden = model.embeddings(pixels(8))
        for index, layer in enumerate(model.encoder.layers):
            hidden = layer(hidden, attention_mask=None)
            if index in layers:
                hidden = hidden[: stages[layers.index(index) + 1]]

    assert sum(counted(work).values()) == flops.vision_encoder(tower.config, 25, stages, layers, 4)


@pytest.mark.parametrize("layers", [(), (1,), (0, 2)], ids=str)
def test_what_the_method_runs_is_what_is_counted(tower: SiglipVisionModel, layers: tuple[int, ...]) -> None:
    """In the real encoder: its linear layers and patches, to the last operation. (Its batched products are attention
    and the method's own similarity, which the figure leaves out, so they are only bounded.)"""
    config = EarlyTomConfig(retention_ratio=0.5, merge_layers=layers, tau=0.5, schedule="budget")
    stages = frames_per_stage(8, merges=len(layers))
    measured = counted(lambda: encode_video(tower, nn.Identity(), pixels(8), config))
    attention = sum(4 * 25 * 25 * 32 * stages[sum(layer < index for layer in layers)] for index in range(4))
    whole = flops.vision_encoder(tower.config, 25, stages, layers, 4)
    linear = measured["aten.addmm"] + measured["aten.convolution"]
    beside = 0 if layers else 4 * 8 * 25 * 32 * 32  # with merging off, q and k once more to read received attention
    assert linear - beside == whole - attention
    assert sum(measured.values()) > whole


def test_projector_equals_the_counter() -> None:
    text = Qwen2Config(hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = LlavaOnevisionConfig(vision_config=SiglipVisionConfig(**TINY), text_config=text)
    projector = LlavaOnevisionMultiModalProjector(config)
    measured = counted(lambda: projector(torch.zeros(3, 25, 32)))
    assert sum(measured.values()) == LLAVA_ONEVISION.projector_flops(config, 3)


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
    attention = 4 * config.num_hidden_layers * tokens * tokens * config.hidden_size
    assert sum(measured.values()) - attention // 2 == flops.prefill(config, tokens)


@pytest.mark.parametrize(("layer", "ratio"), [(1, 0.5), (3, 0.25), (3, 0.9)])
def test_prefill_with_inner_merging_equals_the_counter(layer: int, ratio: float) -> None:
    """In the real model: its linear layers, to the last operation, but for the keys and the one query that are computed
    once more to rank tokens. (Its batched products are attention, the whole square, and the method's own.)"""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    model, tokens, visual = Qwen2ForCausalLM(config).eval(), 40, torch.zeros(1, 40, dtype=torch.bool)
    visual[:, 3:33] = True
    with apply_inner(model, layer, ratio) as inner, inner.prompt(visual):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        measured = counted(lambda: model(ids, logits_to_keep=1, use_cache=False))
    left = 10 + kept_tokens(30, ratio)
    attention = 2 * 64 * (layer * tokens**2 + (4 - layer) * left**2)
    ranking = 2 * tokens * 64 * 32 + 2 * 64 * 64
    folding = 2 * (40 - left) * (left - 10) * 64 * 2  # similarities, and the merge; both are plain products
    linear = measured["aten.addmm"] + measured["aten.mm"] - ranking - folding
    whole = flops.prefill(config, tokens, visual=30, inner_layer=layer, inner_ratio=ratio)
    assert linear == whole - attention
    assert whole < flops.prefill(config, tokens)


def test_prefill_with_inner_merging_off_or_of_everything() -> None:
    config = Qwen2Config()
    full = flops.prefill(config, 500)
    assert flops.prefill(config, 500, visual=400) == full
    assert flops.prefill(config, 500, inner_layer=18, inner_ratio=0) == full
    assert flops.prefill(config, 500, inner_layer=18) == flops.prefill(config, 500, visual=500, inner_layer=18)
    layers = config.num_hidden_layers
    halved = full - (layers - 18) * (flops.decoder_layer(config, 500) - flops.decoder_layer(config, 300))
    assert flops.prefill(config, 500, visual=400, inner_layer=18) == halved


def test_windows_and_gated_mlps_equal_the_counter() -> None:
    """Of transformers' tower with windows, whose lengths it says itself: 5 x 7 cells of 2 x 2 patches."""
    names = {"fullatt_block_indexes": [1], "window_size": 4 * 2 * 3, "out_hidden_size": 48, "hidden_act": "silu"}
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4}
    config = Qwen2_5_VLVisionConfig(**sizes, **names)
    torch.manual_seed(0)
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    frames, grid = 2, torch.tensor([[2, 10, 14]])
    measured = counted(lambda: model(torch.randn(frames * 140, 3 * 2 * 4 * 4), grid))
    lengths = get_vision_window_index(grid, 2, 24, 4)[1].diff().tolist()
    windowed = sum(length**2 for length in lengths) // frames
    assert windowed < 140**2
    pairs = (windowed, 140**2, windowed)
    tower = flops.vision_encoder(config, 140, (frames,), (), 3, pairs=pairs, gated=True)
    second = 2 * frames * 140 * 3 * 4**2 * 32  # of the two pictures of a frame
    projector = 2 * frames * 35 * 128 * (128 + 48)
    assert sum(measured.values()) == tower + second + projector
    assert flops.vision_encoder(config, 140, (frames,), (), 3, gated=True) > tower  # negative controls
    assert flops.vision_encoder(config, 140, (frames,), (), 3, pairs=pairs) < tower
    less = flops.vision_encoder(config, 140, (frames, 1), (0,), 3, pairs=pairs, gated=True)
    each = [flops.encoder_layer(140, 32, 40, pairs=one, gated=True) for one in pairs]
    assert tower - less == each[1] + each[2]


def test_a_wrong_count_would_be_noticed() -> None:
    """Negative control: one layer fewer, or one more frame, is another number."""
    assert flops.vision_encoder(SO400M, 729, (32,), (), 25) != flops.vision_encoder(SO400M, 729, (32,), (), 26)
    # The layer after which frames are merged still runs on all of them.
    one = flops.vision_encoder(SO400M, 729, (4, 2), (25,), 26)
    assert one == flops.vision_encoder(SO400M, 729, (4,), (), 26)
    assert flops.vision_encoder(SO400M, 729, (4, 2), (24,), 26) == one - 2 * flops.encoder_layer(729, 1152, 4304)
