"""Qwen3-VL in transformers' form. Two pictures make one frame of the tower, which has learned positions and a rotary
embedding over rows and columns; 2 x 2 patches are joined before the projector. States of K earlier layers have their
own projectors and are added to the first layers of the language model (deepstack), which has M-RoPE: positions by time,
row and column. In a prompt every frame has its own span, "<0.5 seconds>...".

Frames have any size that 2 x 2 patches fill: `image_size` of the vision configuration, or `SIZE` where it has none, as
published ones; in `apply_earlytom` the size of the pixels. States of earlier layers are merged with the same weights as
the frames or cells after them, and from the projector on are concatenated to their tokens, to be kept with them.

Notation: F' frames, S patch tokens a frame, P tokens a frame, D tower width, E LLM width, m = 2: a token is made of
m x m patches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.errors import UserError
from earlytom.families.family import SIZES, Family, ShortPrompt
from earlytom.families.frames import FrameSampling, FrameTimes, Geometry
from earlytom.families.qwen3_vl.grid import SIDE, SIZE, STEP, grid_of, streams_of
from earlytom.families.tokens import END, START, STOP
from earlytom.families.vision import VisionModules
from earlytom.numbers import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.families.qwen3_vl.tower import Qwen3VlTower, Qwen3VlVision

_LONGEST = 99999.9  # seconds, of the longest text
_SECTION = (24, 20, 20)  # default `mrope_section`: frequencies for time, row and column
OPEN, VISUAL, CLOSE = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
_PARTS = {
    "visual.merger.": "projector.merger.",
    "visual.deepstack_merger_list.": "projector.deepstack.",
    "visual.patch_embed.": "vision_tower.embeddings.patch_embed.",
    "visual.pos_embed.": "vision_tower.embeddings.pos_embed.",
    "visual.": "vision_tower.",
}
TOWER_SETTINGS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "out_hidden_size",
    "rope_parameters",
)
# Tensors by the roles that `earlytom.micro.weights` knows.
_ROLES = {
    "attn.qkv.weight": "q_proj.weight",
    "attn.proj.weight": "out_proj.weight",
    "mlp.linear_fc2.weight": "fc2.weight",
    "patch_embed.proj.weight": "patch_embedding.weight",
    "pos_embed.weight": "position_embedding.weight",
}


class Qwen3Vl(Family):
    """See `Family`."""

    model_type = "qwen3_vl"
    title, tower_title = "Qwen3-VL", "Qwen3-VL's ViT"
    model_class, config_class = "Qwen3VLForConditionalGeneration", "Qwen3VLConfig"
    section: ClassVar[tuple[int, int, int]] = _SECTION
    tower_settings: ClassVar[tuple[str, ...]] = (*TOWER_SETTINGS, "num_position_embeddings")
    towers = ("qwen3_vl_vision",)
    frames = 32
    vision_names = ("visual.",)
    decoder_names = ("language_model.", "lm_head.")
    embeddings_name, head_name = "language_model.embed_tokens.weight", "lm_head.weight"
    video_token, visual_token = VISUAL, VISUAL
    span_a_frame = True
    names_times = True
    after_frame = CLOSE
    beside_pixels: ClassVar[tuple[str, ...]] = ("video_grid_thw", "mm_token_type_ids")
    step = STEP
    on_axes = True
    any_size = True
    sampling: ClassVar[FrameSampling] = "nearest"
    vision_sizes: ClassVar[Mapping[str, int]] = SIZES | {
        "depth": SIZES["num_hidden_layers"],
        "num_heads": SIZES["num_attention_heads"],
        "out_hidden_size": SIZES["hidden_size"],
        "num_position_embeddings": 1 << 20,
        "image_size": 1 << 12,
        "patch_size": 1 << 10,
        "in_channels": 3,
    }
    activations = ()
    token_ids = ("video_token_id",)
    layer_setting = "vision_config"
    roles = _ROLES

    def check(self, raw: Mapping[str, Any]) -> None:
        vision = raw.get("vision_config") or {}
        for name, wanted in (("spatial_merge_size", SIDE), ("temporal_patch_size", STEP)):
            if (got := vision.get(name, wanted)) != wanted:
                raise UserError(f"{name} must be {wanted}, got {shown(got)}")

    def config(self, raw: dict[str, Any]) -> Any:
        config = super().config(raw)
        vision = config.vision_config
        # Settings that this configuration lacks, by the names of most vision configurations.
        vision.image_size = list(getattr(vision, "image_size", SIZE))
        vision.num_channels, vision.layer_norm_eps = vision.in_channels, 1e-6
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        config.text_config.rope_parameters.setdefault("mrope_section", list(self.section))
        return config

    def sized(self, config: Any, size: tuple[int, int]) -> Any:
        if size == tuple(getattr(config.vision_config, "image_size", SIZE)):
            return config
        sized = copy.copy(config)
        sized.vision_config = copy.copy(config.vision_config)
        sized.vision_config.image_size = list(size)
        grid_of(sized.vision_config)
        return sized

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        return rows // SIDE, columns // SIDE

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return values.unflatten(1, (-1, SIDE**2)).mean(2)  # a token's patches are consecutive

    def geometry(self, config: Any) -> Geometry:
        vision, text = config.vision_config, config.text_config
        grid, streams = grid_of(vision), list(streams_of(vision))
        if streams != sorted(set(streams)) or not all(0 <= one < vision.depth for one in streams):
            raise UserError(
                f"deepstack_visual_indexes must be different layers from 0 to {vision.depth - 1}, ascending, got "
                f"{streams}"
            )
        if len(streams) > text.num_hidden_layers:
            raise UserError(
                f"{len(streams)} deepstack_visual_indexes need as many layers of the language model, which has "
                f"{text.num_hidden_layers}"
            )
        if vision.out_hidden_size != text.hidden_size:
            raise UserError(
                f"out_hidden_size must be that of the language model, {text.hidden_size}, got {vision.out_hidden_size}"
            )
        section = text.rope_parameters["mrope_section"]
        if not isinstance(section, list) or [type(one) for one in section] != [int] * 3 or min(section) < 1:
            raise UserError(f"mrope_section must be three numbers from 1 on, got {shown(section)}")
        return Geometry(
            size=(grid[0] * vision.patch_size, grid[1] * vision.patch_size),
            patch=vision.patch_size,
            grid=grid,
            cells=self.cells(grid),
            step=STEP,
            depth=vision.depth,
            width=vision.hidden_size,
            llm_width=text.hidden_size,
            heads=vision.num_heads,
            inner=vision.intermediate_size,
            projector=(wide := vision.hidden_size * SIDE**2, wide, text.hidden_size),
            streams=len(streams),
        )

    def tower(self, tower: nn.Module) -> Qwen3VlTower:
        from earlytom.families.qwen3_vl.tower import Qwen3VlTower

        return Qwen3VlTower(tower)

    def vision(self, tower: nn.Module, projector: nn.Module) -> Qwen3VlVision:
        from earlytom.families.qwen3_vl.tower import Qwen3VlVision

        return Qwen3VlVision(self.tower(tower), projector)

    def modules(self, model: Any) -> VisionModules:
        from earlytom.families.qwen3_vl.tower import parted

        return VisionModules(*parted(model.visual), None)

    def new_modules(self, config: Any) -> VisionModules:
        from transformers import AutoModel

        from earlytom.families.qwen3_vl.tower import parted

        return VisionModules(*parted(AutoModel.from_config(config.vision_config)), None)

    def module_name(self, name: str) -> str:
        found = next(old for old in _PARTS if name.startswith(old))
        return _PARTS[found] + name.removeprefix(found)

    def vision_settings(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        tower = {name: getattr(vision, name) for name in self.tower_settings}
        return {
            "family": self.model_type,
            "tower": tower | {"image_size": list(getattr(vision, "image_size", SIZE))},
            "deepstack": list(streams_of(vision)),
        }

    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        import torch

        from earlytom.families.qwen3_vl.pixels import packed

        patches, grid = packed(pixels, model.config.vision_config.patch_size)
        found = model.model.get_video_features(patches, video_grid_thw=grid)
        return torch.cat(
            [found.pooler_output[0], *(layer[0] for layer in getattr(found, "deepstack_features", ()))], dim=-1
        )

    def projector_weights(self, config: Any) -> int:
        frame, products = self.geometry(config), super().projector_weights(config)
        return products + 2 * frame.width + frame.streams * (products + 2 * frame.projector[0])  # and norms before them

    def other_weights(self, config: Any) -> int:
        frame = self.geometry(config)
        return frame.width * (3 * STEP * frame.patch**2 + 1 + config.vision_config.num_position_embeddings)

    def before_frame(self, number: int, times: FrameTimes | None = None) -> str:
        # The mean time of a frame's pictures.
        seconds = _LONGEST if times is None else sum(times.seconds[number * STEP : number * STEP + STEP]) / STEP
        return f"<{seconds:.1f} seconds>{OPEN}"

    def videos(self, config: Any, pixels: Any, placeholders: Sequence[int]) -> list[list[Tensor]]:
        each = [self.placeholders(self.sized(config, tuple(video.shape[2:])), len(video)) for video in pixels]
        rows: list[list[Tensor]] = []
        at, fits = 0, True
        for count in placeholders:
            begin, left = at, count
            while left > 0 and at < len(each):
                left, at = left - each[at], at + 1
            rows.append(pixels[begin:at])
            fits = fits and left == 0 < count
        if not fits or at < len(each):
            raise UserError(
                f"the prompt has {', '.join(map(str, placeholders))} placeholders, but its {len(each)} video(s) take "
                f"{', '.join(map(str, each))}: make it with the model's own processor, each prompt of videos and no "
                "pictures"
            )
        return rows

    def given(self, config: Any, pixels: Tensor, **beside: Any) -> list[Tensor]:
        from earlytom.families.qwen3_vl.pixels import unpacked

        grid = beside.get("video_grid_thw")
        if grid is None:
            raise UserError(
                "pixel_values_videos need video_grid_thw beside them: pass on all that the processor returns"
            )
        return unpacked(pixels, grid, config.vision_config.patch_size)

    def given_features(self, config: Any, videos: list[Tensor]) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        found = [video.split(config.text_config.hidden_size, dim=-1) for video in videos]
        tokens: Any
        earlier: Any
        tokens, *earlier = zip(*found, strict=True)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=tokens, deepstack_features=earlier)

    def reading(self, model: Any, prompt: ShortPrompt) -> AbstractContextManager[dict[str, Any]]:
        from earlytom.families.qwen3_vl.reading import reading

        return reading(model, prompt)

    def special_tokens(self, config: Any) -> dict[str, int]:
        visual = config.video_token_id
        names = (END, START, STOP)
        first = {name: config.text_config.bos_token_id + at for at, name in enumerate(names)}
        return first | {OPEN: config.vision_start_token_id, CLOSE: config.vision_end_token_id, VISUAL: visual}

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {
            "qwen3-vl-2b": lambda: _published(
                {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
                {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
                tied=True,
            ),
            "qwen3-vl-8b": lambda: _published(
                {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
                {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
                tied=False,
            ),
        }


QWEN3_VL = Qwen3Vl()


def _published(vision: dict[str, Any], text: dict[str, Any], *, tied: bool) -> Any:
    """A published configuration: common settings, and those given of the tower and the language model (Qwen3)."""
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": list(_SECTION), "mrope_interleaved": True}
    return QWEN3_VL.config(
        {
            "vision_config": {
                "model_type": "qwen3_vl_vision",
                "num_heads": 16,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": text["hidden_size"],
                **vision,
            },
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": 151936,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": rope,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "tie_word_embeddings": tied,
                **text,
            },
            "tie_word_embeddings": tied,
        }
    )
