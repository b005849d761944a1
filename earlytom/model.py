"""EarlyTom on a whole Hugging Face model: `model.generate(...)` with compressed visual tokens, and back again.

The processor expands one video to `F * P + 1` placeholder tokens; after compression there are fewer, and everything
that counts positions (mask, cache, rotary positions) must see the shorter prompt. So the prompt is shortened and the
visual tokens are put in before generation starts, and the ids that `generate` returns begin with the prompt that was
passed in. Only instance attributes are set; `restore()` (or leaving the `with` block) removes them.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from earlytom.budget import pooled_side
from earlytom.config import EarlyTomConfig
from earlytom.encoder import VisualTokens, encode_video
from earlytom.errors import UserError
from earlytom.inner_decoder import AppliedInner, apply_inner
from earlytom.restorable import Restorable
from earlytom.towers import TOWERS, tower_of


class AppliedEarlyTom(Restorable):
    """A model that runs with EarlyTom until `restore()` is called or the `with` block ends."""

    def __init__(self, model: nn.Module, config: EarlyTomConfig) -> None:
        super().__init__()
        self.model: Any = model
        self.config = config
        self.depth = feature_depth(self.model.config)
        config.check_layers(self.depth)
        tower_of(self.inner.vision_tower)  # refuses a family without an adapter now, not at the first video
        self._merging: AppliedInner | None = None
        self._install()

    def restore(self) -> None:
        """Give the model back as it was. Calling it twice does nothing."""
        super().restore()
        if self._merging is not None:
            self._merging.restore()

    @property
    def inner(self) -> Any:
        """The model without its language-model head."""
        return self.model.model

    def encode(self, pixels: Tensor) -> VisualTokens:
        """One video, [F, 3, H, W] normalised pixels."""
        return encode_video(
            self.inner.vision_tower, self.inner.multi_modal_projector, pixels, self.config, depth=self.depth
        )

    def features(self, pixel_values_videos: Tensor) -> list[Tensor]:
        """Visual tokens of each video of [B, F, 3, H, W], the closing newline included: B tensors [N + 1, E]."""
        newline = self.inner.image_newline
        each = (self.encode(pixels).tokens for pixels in pixel_values_videos)
        return [torch.cat([tokens, newline[None].to(tokens)]) for tokens in each]

    def shorten(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values_videos: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt with as many placeholders as there are visual tokens left.

        Args:
            input_ids: [B, L] with `F * P + 1` placeholders for each video.
            attention_mask: [B, L] or None.
            pixel_values_videos: [V, F, 3, H, W], in the order of their placeholders.

        Returns:
            input_ids [B, L'], attention_mask [B, L'] and inputs_embeds [B, L', E]; shorter rows are padded on the left.

        Raises:
            UserError: the placeholders do not fit the videos.
        """
        placeholder = input_ids == self.model.config.video_token_id
        full = self._placeholders_per_video(placeholder, pixel_values_videos)
        videos = self.features(pixel_values_videos)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # The j-th placeholder of the batch is token `j mod full` of video `j div full`; it stays if that token exists.
        order = placeholder.flatten().cumsum(0).sub(1).view_as(input_ids)
        lengths = torch.tensor([len(video) for video in videos], device=input_ids.device)
        stays = ~placeholder | (order % full < lengths[order.div(full, rounding_mode="floor").clamp_min(0)])
        length = int(stays.sum(1).max())
        padding = self.model.config.video_token_id  # any id: masked out, its embedding is overwritten by zeros
        ids = input_ids.new_full((len(input_ids), length), padding)
        short_mask = mask.new_zeros(ids.shape)
        target = torch.arange(length, device=ids.device) >= length - stays.sum(1, keepdim=True)  # [B, L'] right-aligned
        ids[target], short_mask[target] = input_ids[stays], mask[stays]
        embeds = self.model.get_input_embeddings()(ids)
        embeds[~target] = 0
        visual = target & (ids == self.model.config.video_token_id)
        embeds = embeds.masked_scatter(visual[..., None], torch.cat(videos).to(embeds))
        return ids, short_mask, embeds

    def _placeholders_per_video(self, placeholder: Tensor, pixel_values_videos: Tensor) -> int:
        """`F * P + 1`, once it is certain that every prompt has that many for each of its videos."""
        if pixel_values_videos.dim() != 5:
            raise UserError(
                "pixel_values_videos must be [videos, frames, 3, height, width], got "
                f"{list(pixel_values_videos.shape)}: make them with the model's own processor"
            )
        videos, frames = pixel_values_videos.shape[:2]
        vision = self.model.config.vision_config
        full = frames * pooled_side(vision.image_size // vision.patch_size) ** 2 + 1
        counts = placeholder.sum(1).tolist()
        if sum(counts) != full * videos or any(count % full for count in counts):
            raise UserError(
                f"the prompt has {', '.join(map(str, counts))} video placeholders, but {videos} video(s) of {frames} "
                f"frames take {full} each: make the prompt with the model's own processor"
            )
        return full

    def _for_shorter_prompt(self, removed: int, given: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate` for a prompt with `removed` tokens less; `given` is a GenerationConfig or None.

        `max_length` and `min_length` count the prompt that the caller passed in. Assisted decoding drafts from ids
        before the embeddings have been read, which transformers gets wrong without a word.
        """

        def asked(name: str) -> Any:
            sources = (kwargs.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
            return next((value for value in sources if value is not None), None)

        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if asked(name) is not None:
                raise UserError(f"{name} does not work with compressed visual tokens: leave it out")
        lengths = {name: asked(name) for name in ("max_length", "min_length")}
        return kwargs | {name: max(length - removed, 0) for name, length in lengths.items() if length and removed}

    def _announced(self, ids: Tensor, mask: Tensor) -> AbstractContextManager[None]:
        """Tell the language model which tokens of a shortened prompt are visual, if it is to merge them."""
        if self._merging is None:
            return nullcontext()
        return self._merging.prompt((ids == self.model.config.video_token_id) & mask.bool())

    def _install(self) -> None:
        model, inner = self.model, self.inner
        if "_earlytom" in vars(model):
            raise UserError("EarlyTom is already applied to this model: call restore() on what apply_earlytom returned")
        own_generate, own_forward, own_features = model.generate, inner.forward, inner.get_video_features

        @functools.wraps(own_generate)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            pixels = kwargs.pop("pixel_values_videos", None)
            if pixels is None:
                return own_generate(inputs, *args, **kwargs)
            prompt = kwargs.pop("input_ids", inputs)
            if prompt is None:
                raise UserError("generate needs input_ids beside pixel_values_videos")
            with torch.no_grad():
                ids, mask, embeds = self.shorten(prompt, kwargs.pop("attention_mask", None), pixels)
            given = args[0] if args else kwargs.get("generation_config")
            kwargs = self._for_shorter_prompt(prompt.shape[1] - ids.shape[1], given, kwargs)
            with self._announced(ids, mask):
                out = own_generate(None, *args, input_ids=ids, attention_mask=mask, inputs_embeds=embeds, **kwargs)
            return _with_prompt(out, prompt, ids.shape[1])

        @functools.wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("pixel_values_videos") is None or kwargs.get("input_ids") is None:
                return own_forward(*args, **kwargs)
            if kwargs.get("position_ids") is not None:
                raise UserError("position_ids count the full prompt, which gets shorter: leave them out")
            pixels, ids = kwargs.pop("pixel_values_videos"), kwargs.pop("input_ids")
            ids, mask, embeds = self.shorten(ids, kwargs.get("attention_mask"), pixels)
            with self._announced(ids, mask):
                return own_forward(*args, **(kwargs | {"attention_mask": mask, "inputs_embeds": embeds}))

        @functools.wraps(own_features)
        def get_video_features(pixel_values_videos: Tensor, *args: Any, **kwargs: Any) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            # As the model does it: [B, N + 1, E], where every video has as many tokens; else one row of all of them.
            videos = self.features(pixel_values_videos)
            even = len({len(video) for video in videos}) == 1
            pooled = torch.stack(videos) if even else torch.cat(videos)[None]
            return BaseModelOutputWithPooling(pooler_output=pooled)

        if self.config.merges_inside:
            assert self.config.inner_layer is not None  # that is what merges_inside says
            self._merging = apply_inner(inner.language_model, self.config.inner_layer, self.config.inner_ratio)
        self.replace(model, "generate", generate)
        self.replace(inner, "forward", forward)
        self.replace(inner, "get_video_features", get_video_features)
        self.replace(model, "_earlytom", self)


def _with_prompt(out: Any, prompt: Tensor, shortened: int) -> Any:
    """Replace the shortened prompt in what `generate` returned by the one that the caller passed in."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    rows = sequences.shape[0] // prompt.shape[0]  # several sequences a prompt with num_return_sequences
    restored = torch.cat([prompt.repeat_interleave(rows, 0), sequences[:, shortened:]], dim=1)
    if isinstance(out, Tensor):
        return restored
    out.sequences = restored
    return out


def feature_depth(config: Any) -> int:
    """How many encoder layers a LLaVA-OneVision configuration runs before the projector.

    Raises:
        UserError: several feature layers, a layer that does not exist, or a selection that does not give all patches.
    """
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer must be one layer, got {layer!r}: EarlyTom merges frames of one stream")
    depth = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= depth <= layers:
        raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {layers} layers")
    family = config.vision_config.model_type
    strategy = "default" if family in TOWERS and TOWERS[family].prefix else "full"
    if config.vision_feature_select_strategy != strategy:
        raise UserError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not give the patches of a "
            f"{family} tower, all of them and nothing else: set it to {strategy!r} in the model's configuration"
        )
    return depth


def apply_earlytom(model: nn.Module, config: EarlyTomConfig) -> AppliedEarlyTom:
    """Make a Hugging Face LLaVA-OneVision model generate from compressed visual tokens.

    Works as a plain call (`restore()` on the result undoes it) and as a context manager. With retention ratio 1 and no
    merge layers the result is bit-identical to the untouched model (with its default attention, sdpa).

    With an `inner_layer` the language model merges visual tokens, too (see `earlytom.inner`); a forward pass then has
    logits for the tokens that are left.

    Raises:
        UserError: another model family, a merge layer the tower lacks, an inner layer the language model lacks, or
            EarlyTom is applied already.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family != "llava_onevision" or not hasattr(model, "lm_head"):
        raise UserError(
            f"{type(model).__name__} ({family}) is not supported: apply_earlytom takes "
            "LlavaOnevisionForConditionalGeneration"
        )
    return AppliedEarlyTom(model, config)
