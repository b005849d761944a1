"""EarlyTom on a whole Hugging Face model: `model.generate(...)` with compressed visual tokens, undoably.

The processor expands a video to one placeholder per visual token; after compression there are fewer, and everything
that counts positions (mask, KV cache, rotary positions) must see the shorter prompt. So the prompt is shortened and the
visual tokens are inserted before generation starts; the ids that `generate` returns begin with the prompt as passed in.
Only instance attributes are set; `restore()` (or leaving the `with` block) removes them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlytom.config import EarlyTomConfig
from earlytom.encoder import VisualTokens, encode
from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, FAMILIES, Family, Geometry, ShortPrompt, family_of
from earlytom.inner_decoder import AppliedInner, apply_inner
from earlytom.method import Method
from earlytom.methods import method_of
from earlytom.restorable import Restorable
from earlytom.spans import check_watched
from earlytom.standing import frame_spans


class _Shown(NamedTuple):
    """A video of a prompt: its configuration and geometry, the number of its pictures, and its visual tokens."""

    config: Any
    frame: Geometry
    pictures: int
    encoded: VisualTokens


class AppliedEarlyTom(Restorable):
    """A model that runs with EarlyTom until `restore()` is called or the `with` block ends."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        self.model: Any = model
        self.method = method
        self.family = family_of(self.model.config)
        frame = self.family.geometry(self.model.config)
        self.depth = frame.depth
        method.check(self.depth)
        check_watched(method.watched(self.depth), frame.full)
        self.family.vision_of(self.inner)  # refuses a tower without an adapter here, not at the first video
        self._merging: AppliedInner | None = None
        self._install()

    def restore(self) -> None:
        """Restore the original model. A second call does nothing."""
        super().restore()
        if self._merging is not None:
            self._merging.restore()

    @property
    def inner(self) -> Any:
        """The model without its language-model head."""
        return self.model.model

    def encode(self, pixels: Tensor) -> VisualTokens:
        """Encode one video, [F * step, 3, H, W] normalised pixels."""
        return encode(self.family.vision_of(self.inner), pixels, self.method, depth=self.depth)

    def features(self, videos: Iterable[Tensor]) -> list[Tensor]:
        """Visual tokens of each video [F * step, 3, H, W], with the R closing tokens: [N + R, E]."""
        return [self._closed(self._shown(pixels)) for pixels in videos]

    def shorten(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values_videos: Tensor, **beside: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shorten a prompt to one placeholder per visual token left; where each frame has its own span, frames without
        any token lose their span and the text that names it.

        Args:
            input_ids: [B, L] with the placeholders of each video.
            attention_mask: [B, L] or None.
            pixel_values_videos: the processor's output for the videos, in the order of their placeholders.
            beside: the processor's further outputs, see `Family.beside_pixels`.

        Returns:
            input_ids [B, L'], attention_mask [B, L'] and inputs_embeds [B, L', E]; shorter rows are padded on the left.
        """
        prompt, embeds = self._shortened(input_ids, attention_mask, pixel_values_videos, beside)
        return prompt.ids, prompt.mask, embeds

    def _shortened(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixels: Tensor, beside: dict[str, Any]
    ) -> tuple[ShortPrompt, Tensor]:
        """The prompt as `shorten` has it, and its embeddings."""
        placeholder = (input_ids == self._video_token_id).tolist()
        found = self.family.given(self.model.config, pixels, **beside)
        given = self.family.videos(self.model.config, found, [sum(row) for row in placeholder])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stays: list[list[int]] = []
        every: list[_Shown] = []
        for row, videos in zip(placeholder, given, strict=True):
            shown = [self._shown(video) for video in videos]
            stays.append(self._stays(row, shown))
            every += shown
        length = max(map(len, stays))
        padding = self._video_token_id  # any id: masked out, its embedding is overwritten by zeros
        ids = input_ids.new_full((len(input_ids), length), padding)
        short_mask = mask.new_zeros(ids.shape)
        target = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        for at, places in enumerate(stays):
            rest, where = slice(length - len(places), length), torch.tensor(places, device=ids.device)
            ids[at, rest], short_mask[at, rest] = input_ids[at, where], mask[at, where]
            target[at, rest] = True
        embeds = self.model.get_input_embeddings()(ids)
        embeds[~target] = 0
        visual = target & (ids == self._video_token_id)
        tokens = torch.cat([self._closed(one)[:, : embeds.shape[-1]] for one in every])
        embeds = embeds.masked_scatter(visual[..., None], tokens.to(embeds))
        cells = torch.cat([one.encoded.positions % one.frame.tokens_per_frame for one in every])
        grid = torch.cat([cells.new_tensor([one.frame.cells] * len(one.encoded.tokens)) for one in every])
        tokens = torch.cat([one.encoded.tokens for one in every])
        frames = [torch.div(v.encoded.place, v.frame.tokens_per_frame, rounding_mode="trunc") for v in every]
        config = self.model.config
        time = torch.cat([self.family.token_times(config, one, at, **beside) for at, one in enumerate(frames)])
        return ShortPrompt(ids, short_mask, visual, tokens, cells, grid, time), embeds

    def _shown(self, video: Tensor) -> _Shown:
        config = self.family.sized(self.model.config, (video.shape[2], video.shape[3]))
        return _Shown(config, self.family.geometry(config), len(video), self.encode(video))

    def _closed(self, video: _Shown) -> Tensor:
        closings = self.family.closings(video.frame.cells)
        return closings.closed(video.encoded.tokens, video.encoded.positions, self.family.closing(self.inner))

    def _stays(self, placeholder: Sequence[bool], videos: Sequence[_Shown]) -> list[int]:
        """The prompt positions that stay, in their new order."""
        spots = [at for at, is_one in enumerate(placeholder) if is_one]
        stays: list[int] = []
        text = done = 0  # the first position not handled yet, and the number of placeholders handled
        for one in videos:
            spans = self.family.spans(one.config, one.pictures)
            ends = [done + sum(spans[: number + 1]) for number in range(len(spans))]
            begins = [end - size for end, size in zip(ends, spans, strict=True)]
            stays += range(text, spots[done])
            for at, (number, left) in enumerate(self._spans(one)):
                first = begins[number]
                stays += range(spots[first - 1] + 1, spots[first]) if at else ()
                stays += spots[first : first + left]
            done = ends[-1]
            text = spots[done - 1] + 1
        return [*stays, *range(text, len(placeholder))]

    def _spans(self, video: _Shown) -> Sequence[tuple[int, int]]:
        """(number, placeholders kept) of each remaining span of a video."""
        found = video.encoded
        if not self.family.span_a_frame:
            return [(0, len(self._closed(video)))]
        return frame_spans(found.positions, found.sources, video.frame.tokens_per_frame)

    @property
    def _video_token_id(self) -> int:
        return self.family.video_token_id(self.model.config)

    def _for_shorter_prompt(self, removed: int, given: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate` for a prompt with `removed` tokens less; `given` is a GenerationConfig or None.

        `max_length` and `min_length` count the prompt as passed in. Assisted decoding is refused: it drafts from ids
        before the embeddings are prefilled, which transformers silently gets wrong.
        """

        def asked(name: str) -> Any:
            sources = (kwargs.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
            return next((value for value in sources if value is not None), None)

        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if asked(name) is not None:
                raise UserError(f"{name} does not work with compressed visual tokens: leave it out")
        lengths = {name: asked(name) for name in ("max_length", "min_length")}
        return kwargs | {name: max(length - removed, 0) for name, length in lengths.items() if length and removed}

    @contextmanager
    def _announced(self, prompt: ShortPrompt) -> Iterator[dict[str, Any]]:
        """Announce a shortened prompt to the language model: its visual tokens, for inner merging, and what its family
        needs, such as position ids; yields further arguments of the forward pass."""
        visual = (prompt.ids == self._video_token_id) & prompt.mask.bool()
        merging: AbstractContextManager[None] = nullcontext()
        if self._merging is not None:
            merging = self._merging.prompt(visual)
        with merging, self.family.reading(self.model, prompt) as more:
            yield more

    def _install(self) -> None:
        model, inner = self.model, self.inner
        if "_earlytom" in vars(model):
            raise UserError("EarlyTom is already applied to this model: call restore() on what apply_earlytom returned")
        pixels_name, features_name = self.family.pixels_name, self.family.features_name
        own_generate, own_forward, own_features = model.generate, inner.forward, getattr(inner, features_name)

        @functools.wraps(own_generate)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            pixels = kwargs.pop(pixels_name, None)
            if pixels is None:
                return own_generate(inputs, *args, **kwargs)
            beside = {name: kwargs.pop(name, None) for name in self.family.beside_pixels}
            prompt = kwargs.pop("input_ids", inputs)
            if prompt is None:
                raise UserError(f"generate needs input_ids beside {pixels_name}")
            with torch.no_grad():
                short, embeds = self._shortened(prompt, kwargs.pop("attention_mask", None), pixels, beside)
            ids, mask = short.ids, short.mask
            given = args[0] if args else kwargs.get("generation_config")
            kwargs = self._for_shorter_prompt(prompt.shape[1] - ids.shape[1], given, kwargs)
            with self._announced(short):
                out = own_generate(None, *args, input_ids=ids, attention_mask=mask, inputs_embeds=embeds, **kwargs)
            return _with_prompt(out, prompt, ids.shape[1])

        @functools.wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get(pixels_name) is None or kwargs.get("input_ids") is None:
                return own_forward(*args, **kwargs)
            if kwargs.get("position_ids") is not None:
                raise UserError("position_ids count the full prompt, which gets shorter: leave them out")
            pixels, ids = kwargs.pop(pixels_name), kwargs.pop("input_ids")
            beside = {name: kwargs.pop(name, None) for name in self.family.beside_pixels}
            short, embeds = self._shortened(ids, kwargs.get("attention_mask"), pixels, beside)
            with self._announced(short) as more:
                return own_forward(*args, **(kwargs | {"attention_mask": short.mask, "inputs_embeds": embeds} | more))

        @functools.wraps(own_features)
        def features(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs[pixels_name]
            beside = {name: kwargs[name] for name in self.family.beside_pixels if name in kwargs}
            beside |= dict(zip(self.family.beside_pixels, args[1:], strict=False))
            found = self.family.given(model.config, given, **beside)
            videos = found if not isinstance(found, Tensor) or found.dim() == 5 else found[None]
            return self.family.given_features(model.config, self.features(videos))

        if self.method.inner is not None:
            self._merging = apply_inner(model.get_decoder(), *self.method.inner)
        self.replace(model, "generate", generate)
        self.replace(inner, "forward", forward)
        self.replace(inner, features_name, features)
        self.replace(model, "_earlytom", self)


def _with_prompt(out: Any, prompt: Tensor, shortened: int) -> Any:
    """Replace the shortened prompt in what `generate` returned by the one that the caller passed in."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    rows = sequences.shape[0] // prompt.shape[0]  # num_return_sequences
    restored = torch.cat([prompt.repeat_interleave(rows, 0), sequences[:, shortened:]], dim=1)
    if isinstance(out, Tensor):
        return restored
    out.sequences = restored
    return out


def encode_video(
    vision_model: nn.Module,
    projector: nn.Module,
    pixels: Tensor,
    config: EarlyTomConfig | Method,
    *,
    depth: int | None = None,
    family: Family = DEFAULT_FAMILY,
) -> VisualTokens:
    """Encode one video.

    Args:
        vision_model: a Hugging Face vision tower with an adapter in `earlytom.families.adapters`.
        projector: maps [F', S, D] to [F', S, E].
        pixels: [F * step, 3, H, W] normalised pixels in the tower's dtype.
        config: EarlyTom's settings, or another method (`earlytom.methods`).
        depth: number of layers to run; default: all (the post layer norm is never applied).
        family: determines the order of projector and pooling.

    Raises:
        UserError: no frames, not four dimensions, or a depth or merge layer that the tower does not have.
    """
    return encode(family.vision(vision_model, projector), pixels, method_of(config), depth=depth)


def apply_earlytom(model: nn.Module, config: EarlyTomConfig | Method) -> AppliedEarlyTom:
    """Make a Hugging Face model of a supported family generate from compressed visual tokens.

    `config` are EarlyTom's settings, or another method (`earlytom.methods`).

    Works as a plain call (`restore()` on the result undoes it) and as a context manager. With retention ratio 1 and no
    merge layers the result is bit-identical to the untouched model (with its default attention, sdpa).

    With an `inner_layer` the language model merges visual tokens, too (see `earlytom.inner`); a forward pass then
    returns logits for the remaining tokens.

    Raises:
        UserError: another model family, a merge layer the tower lacks, an inner layer the language model lacks, or
            EarlyTom is applied already.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES or not hasattr(model, "lm_head"):
        raise UserError(
            f"{type(model).__name__} ({model_type}) is not supported: apply_earlytom takes "
            f"{', '.join(family.model_class for family in FAMILIES.values())}"
        )
    return AppliedEarlyTom(model, method_of(config))
