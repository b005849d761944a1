"""Tiny random Hugging Face models for the tests: towers of every supported family, a whole LLaVA-OneVision, videos.

Weights are drawn wide enough that attention is uneven and frames differ, which the default initialisation is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from earlytom.families.llava_video import LLAVA_VIDEO
from earlytom.families.qwen2_5_vl import QWEN2_5_VL
from earlytom.families.qwen3_5 import QWEN3_5
from earlytom.families.qwen3_vl import QWEN3_VL

FAMILIES = ("siglip", "siglip2", "clip", "dinov2")
PATCH = 4
VIDEO_TOKEN, IMAGE_TOKEN, VOCABULARY = 127, 126, 128
GAINS = (
    "norm.weight", "norm1.weight", "norm2.weight", "norm_before.weight", "norm_after.weight", "lambda1", "lambda_1",
    "lambda_2", "ln_q.weight",
)  # fmt: skip


def tiny_tower(family: str, *, layers: int = 4, grid: int = 5, seed: int = 0, device: str = "cpu") -> Any:
    """A random vision tower of `layers` layers on `grid` x `grid` patches, width 32, in eval mode."""
    size: Any = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "patch_size": PATCH}
    inner: Any = {"intermediate_size": 64}
    with torch.device(device):
        if family == "siglip":
            model: nn.Module = SiglipVisionModel(
                SiglipVisionConfig(**size, **inner, image_size=grid * PATCH, vision_use_head=False)
            )
        elif family == "siglip2":
            model = Siglip2VisionModel(
                Siglip2VisionConfig(**size, **inner, num_patches=grid * grid, vision_use_head=False)
            )
        elif family == "clip":
            model = CLIPVisionModel(CLIPVisionConfig(**size, **inner, image_size=grid * PATCH))
        else:
            model = Dinov2Model(Dinov2Config(**size, mlp_ratio=2, image_size=grid * PATCH))
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int) -> Any:
    """All parameters drawn again from the seed alone: matrices wide, biases small, gains around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(0.1 * noise + name.endswith(GAINS))
    return model.eval()


def patchify(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """[F, 3, H, W] to the patches that SigLIP2 takes, [F, S, patch * patch * 3]: pixel by pixel, channels last."""
    frames, _, height, width = pixels.shape
    rows = []
    for y in range(0, height, patch):
        for x in range(0, width, patch):
            block = pixels[:, :, y : y + patch, x : x + patch]
            rows.append(block.permute(0, 2, 3, 1).reshape(frames, -1))
    return torch.stack(rows, dim=1)


@torch.no_grad()
def untouched(model: Any, pixels: Tensor, **flags: Any) -> Any:
    """The tower's own forward pass, with all hidden states (and whatever `flags` ask for)."""
    flags = {"output_hidden_states": True} | flags
    if model.config.model_type != "siglip2_vision_model":
        return model(pixels, **flags)
    patches = patchify(pixels)
    grid = torch.tensor([[pixels.shape[2] // PATCH, pixels.shape[3] // PATCH]] * len(pixels))
    return model(patches, torch.ones(patches.shape[:2], dtype=torch.int64), grid, **flags)


def tiny_projector(width: int = 32, out: int = 24, *, seed: int = 0, device: str = "cpu") -> Any:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    return randomise(model, seed)


def made_video(kind: str, frames: int, *, grid: int | tuple[int, int] = 5, seed: int = 0) -> Tensor:
    """[F, 3, H, W] normalised pixels of a grid of patches.

    Kinds: noise, drift (slow change), scenes (cuts), still (one frame, repeated)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    shape = (frames, 3, rows * PATCH, columns * PATCH)
    noise = torch.randn(shape, generator=generator)
    if kind == "noise":
        return noise
    if kind == "still":
        return noise[:1].expand(shape).clone()
    if kind == "drift":
        return noise[:1] + 0.35 * noise.cumsum(0)
    cuts = torch.rand(frames, generator=generator) < 0.2
    return noise[cuts.long().cumsum(0)] + 0.15 * noise


# A decoder that the bundled tokenizer serves, its special tokens moved behind the others.
BUNDLED_WORDS = {"vocab_size": 1300, "bos_token_id": 1290, "eos_token_id": 1292, "pad_token_id": 1290}
BUNDLED_IDS = {
    "llava_onevision": {"image_token_id": 1293, "video_token_id": 1294},
    "internvl": {"image_token_id": 1295},
    "llava_qwen": {"image_token_id": 1293, "video_token_id": 1293},
    "qwen2_5_vl": {"vision_start_token_id": 1293, "vision_end_token_id": 1294, "video_token_id": 1296},
    "qwen3_vl": {"vision_start_token_id": 1293, "vision_end_token_id": 1294, "video_token_id": 1296},
    "qwen3_5": {"vision_start_token_id": 1293, "vision_end_token_id": 1294, "video_token_id": 1296},
    "smolvlm": {"image_token_id": 1296},
}


def tiny_llava(
    *, layers: int = 4, grid: int = 5, seed: int = 0, bundled: bool = False
) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision: SigLIP tower, Qwen2 decoder of two layers, `VOCABULARY` token ids or, where `bundled`,
    those of the bundled tokenizer."""
    ids: Any = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    ids = BUNDLED_IDS["llava_onevision"] if bundled else ids
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "image_size": grid * PATCH,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            **(BUNDLED_WORDS if bundled else {}),
        },
        **ids,
    )
    return randomise(LlavaOnevisionForConditionalGeneration(config), seed)


def tiny_internvl(
    *, layers: int = 4, grid: tuple[int, int] = (4, 4), seed: int = 0, bundled: bool = False, **vision: Any
) -> InternVLForConditionalGeneration:
    """A random InternVL; otherwise as `tiny_llava`."""
    ids: Any = BUNDLED_IDS["internvl"] if bundled else {"image_token_id": VIDEO_TOKEN}
    config = InternVLConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "image_size": [side * PATCH for side in grid],
            "patch_size": [PATCH, PATCH],
            "attention_bias": True,
            **vision,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            **(BUNDLED_WORDS if bundled else {}),
        },
        **ids,
    )
    return randomise(InternVLForConditionalGeneration(config), seed)


def tiny_llava_next_video(
    *, layers: int = 4, grid: int = 5, seed: int = 0, bundled: bool = False
) -> LlavaNextVideoForConditionalGeneration:
    """A random LLaVA-NeXT-Video, whose tower has a layer that does not run; otherwise as `tiny_llava`."""
    like = tiny_llava(bundled=bundled).config
    ids: Any = {"image_token_index": like.image_token_id, "video_token_index": like.video_token_id}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers + 1,
        "num_attention_heads": 2,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
    }
    config = LlavaNextVideoConfig(vision_config=vision, text_config=like.text_config.to_dict(), **ids)
    return randomise(LlavaNextVideoForConditionalGeneration(config), seed)


def tiny_llava_video(
    *,
    layers: int = 4,
    grid: int = 5,
    seed: int = 0,
    bundled: bool = False,
    pooling: str = "bilinear",
    newlines: str = "grid",
) -> Any:
    """A random LLaVA-Video; otherwise as `tiny_llava`."""
    like = tiny_llava(layers=layers, grid=grid, bundled=bundled).config.to_dict()
    ids: Any = BUNDLED_IDS["llava_qwen"] if bundled else {"image_token_id": VIDEO_TOKEN, "video_token_id": VIDEO_TOKEN}
    own = {"model_type": "llava_qwen", "mm_spatial_pool_mode": pooling, "mm_newline_position": newlines}
    return randomise(LLAVA_VIDEO.new_model(LLAVA_VIDEO.config(like | own | ids)), seed)


def tiny_qwen3_vl(
    *, layers: int = 4, grid: tuple[int, int] = (4, 4), seed: int = 0, bundled: bool = False, **vision: Any
) -> Qwen3VLForConditionalGeneration:
    """A random Qwen3-VL that takes the states of layers 0 and 2, too; otherwise as `tiny_llava`."""
    like = tiny_llava().config.text_config
    text = {
        name: getattr(like, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    ids: Any = {"video_token_id": VIDEO_TOKEN, "vision_start_token_id": 124, "vision_end_token_id": 125}
    config = QWEN3_VL.config(
        {
            "vision_config": {
                "model_type": "qwen3_vl_vision",
                "depth": layers,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": PATCH,
                "out_hidden_size": 32,
                "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0, 2],
                "image_size": [side * PATCH for side in grid],
                **vision,
            },
            "text_config": text
            | {"model_type": "qwen3_vl_text", "rope_parameters": rope}
            | (BUNDLED_WORDS if bundled else {}),
            "image_token_id": IMAGE_TOKEN,
            **(BUNDLED_IDS["qwen3_vl"] if bundled else ids),
        }
    )
    return randomise(Qwen3VLForConditionalGeneration(config), seed)


def tiny_qwen3_5(
    *, layers: int = 4, grid: tuple[int, int] = (4, 6), seed: int = 0, bundled: bool = False, **vision: Any
) -> Qwen3_5ForConditionalGeneration:
    """A random Qwen3.5, its frames not square, with two layers of linear attention around one that attends."""
    like = tiny_qwen3_vl(layers=layers, grid=grid, bundled=bundled, deepstack_visual_indexes=[]).config.to_dict()
    rope = like["text_config"]["rope_parameters"] | {"partial_rotary_factor": 0.25}
    own = {"model_type": "qwen3_5_text", "head_dim": 32, "num_hidden_layers": 3, "rope_parameters": rope}
    own |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_conv_kernel_dim": 4}
    own |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    towers = like["vision_config"] | {"model_type": "qwen3_5_vision"} | vision
    del towers["deepstack_visual_indexes"]
    more = {name: value for name, value in like.items() if name.endswith("token_id")}
    config = QWEN3_5.config({"vision_config": towers, "text_config": like["text_config"] | own, **more})
    return randomise(Qwen3_5ForConditionalGeneration(config), seed)


def tiny_qwen2_5_vl(
    *, layers: int = 4, grid: tuple[int, int] = (4, 6), seed: int = 0, bundled: bool = False, **vision: Any
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL, its frames not square, whose first layer attends in windows of two cells on a
    side."""
    like = tiny_qwen3_vl(layers=layers, grid=grid, bundled=bundled, deepstack_visual_indexes=[]).config.to_dict()
    text = {name: value for name, value in like["text_config"].items() if name not in ("head_dim", "layer_types")}
    text |= {"model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tower = {"model_type": "qwen2_5_vl_vision", "window_size": 16, "fullatt_block_indexes": list(range(1, layers))}
    tower |= {"depth": layers, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH}
    tower |= {"out_hidden_size": 32, "tokens_per_second": 2, "image_size": [side * PATCH for side in grid]} | vision
    more = {name: value for name, value in like.items() if name.endswith("token_id")}
    config = QWEN2_5_VL.config({"vision_config": tower, "text_config": text, **more})
    return randomise(Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_smolvlm(
    *, layers: int = 4, grid: int = 8, side: int = 4, seed: int = 0, bundled: bool = False
) -> SmolVLMForConditionalGeneration:
    """A random SmolVLM2 that joins `side` x `side` patches, with a Llama decoder; otherwise as `tiny_llava`."""
    ids: Any = BUNDLED_IDS["smolvlm"] if bundled else {"image_token_id": VIDEO_TOKEN}
    words = {"bos_token_id": 1291, "eos_token_id": 1297, "pad_token_id": 1291, "vocab_size": 1300}
    text = tiny_llava().config.text_config.to_dict() | {"model_type": "llama"}
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "image_size": grid * PATCH,
            "patch_size": PATCH,
        },
        text_config=text | (words if bundled else {}),
        scale_factor=side,
        **ids,
    )
    return randomise(SmolVLMForConditionalGeneration(config), seed)


MODELS: dict[str, Callable[..., Any]] = {
    "llava_onevision": tiny_llava,
    "internvl": tiny_internvl,
    "llava_next_video": tiny_llava_next_video,
    "llava_qwen": tiny_llava_video,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "qwen3_5": tiny_qwen3_5,
    "smolvlm": tiny_smolvlm,
}
"""A tiny model of every family."""


def video_prompt(frames: int, *, grid: int = 5, seed: int = 0, before: int = 4, after: int = 3) -> Tensor:
    """[1, L] ids: some text, the placeholders of one video, some text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 100, (before + after,), generator=generator)
    placeholders = torch.full((frames * ((grid + 1) // 2) ** 2 + 1,), VIDEO_TOKEN)
    return torch.cat([text[:before], placeholders, text[before:]])[None]
