"""The interface of a model family: everything that is specific to its models.

All other code goes through `Family` and knows no model by name. It covers the geometry of frames, the vision tower and
projector as the encoder runs them (`Vision`), checks of a checkpoint, the names of its tensors and the making of models
without weights, the cost of the vision tower and projector, and the visual tokens' places in a prompt.

PyTorch and transformers are imported at first use, as help texts need the families' names.

Notation: F' frames, S patch tokens a frame, P tokens a frame after projector and pooling, D tower width, E width of a
token: that of the LLM, times 1 + K if K states of earlier layers are concatenated to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from earlytom import flops
from earlytom.config import Released, Settings
from earlytom.families.closings import Closings
from earlytom.families.frames import FrameSampling, FrameTimes, Geometry
from earlytom.families.vision import Vision, VisionModules

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.towers import Tower


SIZES = {
    "hidden_size": 1 << 15,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 256,
    "num_attention_heads": 1 << 10,
}
"""Sizes in the configurations of most models, and the largest accepted value of each: several times that of any
published model."""


class ShortPrompt(NamedTuple):
    """The prompts of a batch after compression.

    Attributes:
        ids, mask: [B, L].
        visual: [B, L] bool, True for visual tokens.
        tokens: [N, E], all prompts' visual tokens, without closing tokens.
        cells: [N] int64, each token's cell in its frame, in raster order.
        grid: [N, 2] int64, rows and columns of cells of that frame.
        time: [N] int64, from `Family.token_times`.
    """

    ids: Tensor
    mask: Tensor
    visual: Tensor
    tokens: Tensor
    cells: Tensor
    grid: Tensor
    time: Tensor


class Family(ABC):
    """One model family; `config` is always the Hugging Face configuration of one of its models.

    Canonical names are those of `canonical_name`.

    Attributes:
        model_type: `model_type` of its configurations.
        title, tower_title: usual names of the family and its tower.
        model_class, config_class: transformers' classes of the whole model and of its configuration.
        towers: model types of the vision towers that its checkpoints may have.
        frames: default number of sampled frames, for checkpoints that give none.
        vision_names, decoder_names: prefixes of the canonical names of either part's tensors; in most families, the
            first two of vision_names are the modules of the tower and of the projector.
        unused_names: prefixes of tensors of neither part, which a model of videos does without.
        closing_name, embeddings_name, head_name: canonical names of three tensors: the closing token's embedding (None
            if there is none), the decoder's embeddings, its output layer.
        video_token: the text that stands for a video in a rendered prompt.
        visual_token: the text that stands for one visual token.
        span_a_frame: whether each frame's visual tokens are a span of their own in a prompt, with a text that names the
            frame (`before_frame`, `after_frame`, `between_frames`, around all `before_video`, `after_video`); else a
            video is one span.
        names_times: whether these texts contain the frame's time.
        says_times: whether the text after a video in one span contains its frames' times (`behind_video`).
        sampling: how frames are sampled, see `runtime.video.sample`.
        mean, std: default pixel normalisation, for checkpoints that give none.
        pixels_name, features_name: name of a video's pixels as an argument of `generate` and of the model; the model's
            method that turns them into visual tokens.
        beside_pixels: names of further arguments about a video.
        step: pictures of a video per frame of the tower.
        on_axes: whether its language model has position axes for time, row and column (`runtime.text.axes`), where a
            span takes max(rows, columns) positions; else positions are consecutive.
        own_visual_token: whether checkpoints' tokenizers may lack `visual_token`, which then gets the configuration's
            id.
        any_size: whether frames may have any size that patches fill (`sized`); else the checkpoint fixes it.
        known_names: whether transformers knows the tensor names of its checkpoints.
        released: whether EarlyTom was first released for it, so that `runtime.measure.naive` can run.
        presets: settings of EarlyTom released for this family only.
        vision_sizes: sizes in a vision configuration, and the largest accepted value of each.
        activations, token_ids: keys of a configuration: names of activation functions; token ids, the visual token's
            last.
        layer_setting: the key that an error names if a configuration has no valid `geometry`.
        roles: endings of canonical names, and the names by which `earlytom.micro.weights` knows such tensors.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    tower_title: ClassVar[str]
    model_class: ClassVar[str]
    config_class: ClassVar[str]
    towers: ClassVar[tuple[str, ...]]
    frames: ClassVar[int]
    vision_names: ClassVar[tuple[str, ...]]
    decoder_names: ClassVar[tuple[str, ...]]
    unused_names: ClassVar[tuple[str, ...]] = ()
    closing_name: ClassVar[str | None] = None
    embeddings_name: ClassVar[str]
    head_name: ClassVar[str]
    video_token: ClassVar[str]
    visual_token: ClassVar[str]
    span_a_frame: ClassVar[bool] = False
    names_times: ClassVar[bool] = False
    says_times: bool = False
    after_frame: ClassVar[str] = ""
    between_frames: ClassVar[str] = ""
    sampling: ClassVar[FrameSampling] = "ends"
    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    pixels_name: ClassVar[str] = "pixel_values_videos"
    features_name: ClassVar[str] = "get_video_features"
    beside_pixels: ClassVar[tuple[str, ...]] = ()
    step: ClassVar[int] = 1
    on_axes: ClassVar[bool] = False
    own_visual_token: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    known_names: ClassVar[bool] = True
    released: ClassVar[bool] = False
    presets: ClassVar[Mapping[Released, Settings]] = {}
    vision_sizes: ClassVar[Mapping[str, int]] = SIZES | {
        "image_size": 1 << 12,
        "patch_size": 1 << 10,
        "num_channels": 3,
    }
    activations: ClassVar[tuple[str, ...]]
    token_ids: ClassVar[tuple[str, ...]]
    layer_setting: ClassVar[str]
    roles: ClassVar[Mapping[str, str]] = {}

    @property
    def name(self) -> str:
        """Its name in an engine's manifest; `model_type` unless its models have several forms."""
        return self.model_type

    @property
    def forms(self) -> tuple[Family, ...]:
        """The variants that its configurations can choose, each with its own name."""
        return (self,)

    def of(self, config: Any) -> Family:
        """The one of `forms` that a configuration chooses."""
        return self

    def describes(self, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json's content is of this family."""
        return raw.get("model_type") == self.model_type

    def translated(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a config.json in transformers' form.

        Raises:
            UserError: it has another one, and a setting in it for which there is no code.
        """
        return dict(raw)

    @abstractmethod
    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuse settings of a config.json that transformers accepts but that fail later, in computation.

        Raises:
            UserError: there is one.
        """

    def config(self, raw: dict[str, Any]) -> Any:
        """transformers' configuration from a config.json's content; its errors are passed on."""
        import transformers

        return getattr(transformers, self.config_class).from_dict(raw)

    def prepares(self, config: Any) -> Mapping[str, Any] | None:
        """Default content of a missing preprocessing file; None if checkpoints must have one."""
        return None

    def preparation(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A preprocessing file's content with the keys of most families (`runtime.checkpoint`)."""
        return raw

    @abstractmethod
    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens from those of patches."""

    @abstractmethod
    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The family's pooling from patches to cells, of any values [F', S, n] to [F', P, n].

        `grid`: (rows, columns) of patches; default: a square.
        """

    @abstractmethod
    def geometry(self, config: Any) -> Geometry:
        """The frame geometry. Raises UserError for a configuration that EarlyTom cannot run on."""

    def sized(self, config: Any, size: tuple[int, int]) -> Any:
        """The configuration for frames of `size` (height, width); unchanged for families of a fixed size.

        Raises:
            UserError: patches do not fill it.
        """
        return config

    @abstractmethod
    def tower(self, tower: nn.Module) -> Tower:
        """The adapter of a vision tower. Raises UserError if there is none."""

    @abstractmethod
    def vision(self, tower: nn.Module, projector: nn.Module) -> Vision:
        """`Vision` around a Hugging Face vision tower and projector; nothing is copied.

        Raises:
            UserError: the tower has no adapter.
        """

    def vision_of(self, model: Any) -> Vision:
        """`Vision` of a whole transformers model (without its language-model head); nothing is copied."""
        return self.vision(*self.modules(model)[:2])

    def modules(self, model: Any) -> VisionModules:
        """The vision modules of a whole transformers model (without its head)."""
        tower, projector = (getattr(model, name.removesuffix(".")) for name in self.vision_names[:2])
        return VisionModules(tower, projector, self.closing(model))

    @abstractmethod
    def new_modules(self, config: Any) -> VisionModules:
        """New vision modules on the default device, with arbitrary weights."""

    def new_model(self, config: Any) -> Any:
        """A new whole model on the default device, with arbitrary weights."""
        return self.transformers_class()(config)

    def transformers_class(self) -> Any:
        """`model_class`, imported."""
        import transformers

        return getattr(transformers, self.model_class)

    def drop_vision(self, model: Any) -> None:
        """Remove tower and projector from a whole model (with its head), in place; `closing` stays."""
        for name in self.vision_names:
            if name != self.closing_name:
                delattr(model.model, name.removesuffix("."))

    def restore_buffers(self, tower: nn.Module) -> None:
        """Recompute a tower's non-persistent buffers after its weights were loaded; most have none."""
        return

    def module_name(self, name: str) -> str:
        """A vision tensor's name in `VisionModules`, from its canonical name: "vision_tower.x", "projector.x" or
        "closing"."""
        tower, projector = self.vision_names[:2]
        own = name.replace(tower, "vision_tower.", 1).replace(projector, "projector.", 1)
        return "closing" if name == self.closing_name else own

    @abstractmethod
    def vision_settings(self, config: Any) -> dict[str, Any]:
        """All settings that vision tower and projector depend on besides weights, by name, in plain JSON types."""

    @abstractmethod
    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        """The original model's visual tokens of one video, uncompressed and with closing tokens, [N, E].

        `model` is a whole transformers model with its head, `pixels` are [F, 3, H, W].
        """

    def canonical_name(self, name: str) -> str:
        """The name of a tensor without the prefixes in which the releases of transformers differ.

        `model.vision_tower.vision_model.encoder`, `model.vision_tower.encoder` and `vision_tower.vision_model.encoder`
        are all `vision_tower.encoder`; `model.image_newline` is `image_newline`; `language_model.model.layers` is
        `language_model.layers`, as `model.language_model.layers` is; `language_model.lm_head` is `lm_head`.
        """
        name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
        for old, new in (("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head.")):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def spare_names(self, config: Any) -> tuple[str, ...]:
        """Prefixes of the canonical names of stored tensors that the model does not use."""
        return ()

    def vision_flops(self, config: Any, frames_per_stage: Sequence[int], merge_layers: Sequence[int]) -> int:
        """Flops of tower and projector on one video, see `earlytom.flops`.

        Args:
            config: of the model.
            frames_per_stage: frames before the first merge and after each one.
            merge_layers: after which layers the frames are merged.
        """
        frame, vision = self.geometry(config), config.vision_config
        how: dict[str, Any] = {"prefix": frame.prefix, "pairs": frame.pairs, "gated": frame.gated}
        tower = flops.vision_encoder(vision, frame.patches, frames_per_stage, merge_layers, frame.depth, **how)
        more = 2 * frames_per_stage[0] * (frame.step - 1) * frame.patches * 3 * frame.patch**2 * frame.width  # pictures
        return tower + more + self.projector_flops(config, frames_per_stage[-1])

    def projector_flops(self, config: Any, frames: int) -> int:
        """Flops of the projector on `frames` frames."""
        frame = self.geometry(config)
        products = (1 + frame.streams) * sum(a * b for a, b in pairwise(frame.projector))
        return 2 * frames * frame.projector_rows * products

    def projector_weights(self, config: Any) -> int:
        """Parameters of the projector."""
        return sum((a + 1) * b for a, b in pairwise(self.geometry(config).projector))

    def vision_weights(self, config: Any) -> int:
        """Parameters of tower and projector."""
        frame = self.geometry(config)
        return frame.depth * frame.layer_weights + self.other_weights(config) + self.projector_weights(config)

    @abstractmethod
    def other_weights(self, config: Any) -> int:
        """Parameters outside the encoder layers (`Geometry.layer_weights`) and the projector."""

    def video_token_id(self, config: Any) -> int:
        """The id that stands for one visual token in a prompt."""
        return getattr(config, self.token_ids[-1])

    def closing(self, model: Any) -> nn.Parameter | None:
        """The closing token's embedding, [E]; None if there is none. `model` as in `vision_of`."""
        return None if self.closing_name is None else getattr(model, self.closing_name)

    def closings(self, cells: tuple[int, int]) -> Closings:
        """The places of closing tokens, for frames of `cells` (rows, columns)."""
        return Closings(None if self.closing_name is None else "video", cells)

    def behind_video(self, times: FrameTimes) -> str:
        """With `says_times`: the text with the frames' times, after the visual tokens of a video in one span."""
        return ""

    @property
    def in_pieces(self) -> str | None:
        """Why a video is not a single span of consecutive visual tokens; None if it is."""
        if self.span_a_frame:
            return "has one a frame"
        if self.on_axes:
            return "places its tokens by time, row and column"
        return None if self.closings((1, 1)).closes in (None, "video") else "has newlines within it"

    def chat_template(self) -> str | None:
        """The chat template to use for videos instead of the checkpoint's own; None: the checkpoint's."""
        return None

    def before_video(self, times: FrameTimes | None) -> str:
        """With `span_a_frame`: the text before a video's first span. Without times, the longest."""
        return ""

    def before_frame(self, number: int, times: FrameTimes | None = None) -> str:
        """The text before the visual tokens of frame `number`, from 0; without times as in `before_video`."""
        raise NotImplementedError(f"{self.title} has one span a video")

    def after_video(self) -> str:
        """With `span_a_frame`: the text after a video's last span."""
        return ""

    def time_steps(self, frames: int, per_second: float | None, times: FrameTimes | None = None) -> tuple[int, ...]:
        """The time position of each of `frames` frames of the tower, relative to its span's start.

        Args:
            per_second: `Geometry.tokens_per_second`; None: each frame has its own span, so all are 0.
            times: of the pictures; None: one second per frame.
        """
        if per_second is None:
            return (0,) * frames
        import torch

        seconds = 1.0 if times is None else self.step * times.duration / len(times.seconds)
        # In single precision, as in transformers: rounding down other digits could give another position.
        return tuple((torch.arange(frames) * (per_second * torch.tensor(seconds).float())).long().tolist())

    def spans(self, config: Any, frames: int) -> tuple[int, ...]:
        """Number of placeholders in each span of the processor's prompt for a video of `frames` pictures."""
        frame = self.geometry(config)
        each, frames = frame.tokens_per_frame, frames // frame.step
        if self.span_a_frame:
            return (each,) * frames
        return (frames * each + self.closings(frame.cells).most(frames * each, frames),)

    def placeholders(self, config: Any, frames: int) -> int:
        """Number of placeholders of all spans."""
        return sum(self.spans(config, frames))

    @abstractmethod
    def videos(self, config: Any, pixels: Tensor, placeholders: Sequence[int]) -> list[list[Tensor]]:
        """The videos [F * step, 3, H, W] of each prompt of a batch, from the result of `given`.

        `placeholders`: number in each prompt. Raises UserError if they do not fit the pixels.
        """

    def given(self, config: Any, pixels: Tensor, **beside: Any) -> Any:
        """The processor's pixels and `beside_pixels` as one value for `videos`."""
        return pixels

    def given_features(self, config: Any, videos: list[Tensor]) -> Any:
        """The visual tokens [N, E] of each video in the form that the model's method `features_name` returns."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # [B, N + 1, E] where every video has as many tokens; else one row of all of them.
        even = len({len(video) for video in videos}) == 1
        return BaseModelOutputWithPooling(pooler_output=torch.stack(videos) if even else torch.cat(videos)[None])

    def token_times(self, config: Any, frames: Tensor, video: int, **beside: Any) -> Tensor:
        """int64 [N]: time positions of visual tokens, relative to their span's start.

        `frames` int64 [N]: the frame of video number `video` that each stands for; `beside` as in `given`.
        """
        return frames * 0

    def reading(self, model: Any, prompt: ShortPrompt) -> AbstractContextManager[dict[str, Any]]:
        """Within the block the whole model prefills such a prompt, given as embeddings, correctly.

        Yields further arguments of its forward pass.
        """
        return nullcontext({})

    @abstractmethod
    def special_tokens(self, config: Any) -> dict[str, int]:
        """The special tokens of a published model's prompts, and their ids, ascending."""

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        """Configurations of published models by name, to measure without downloads."""
        return {}

    def weight_role(self, name: str) -> str:
        """The name by which `earlytom.micro.weights` knows a tensor's role, from its canonical name."""
        return next((role for end, role in self.roles.items() if name.endswith(end)), name)
