"""What a model family answers for: everything that is true of its models and of no other family's.

The rest of the project asks a `Family` and knows no model by name. Its parts: the geometry of a frame on its way to the
LLM, the vision part as the encoder runs it (`Vision`), what a checkpoint of it must have, the names of its tensors and
how a model is made without them, what the vision part costs, and where visual tokens stand in a prompt.

Nothing here imports PyTorch or transformers before it needs them: what a family is called, help texts say, too.

Notation: F' frames, S patch tokens a frame, P tokens a frame after projector and pooling, D tower width, E width of a
token: that of the LLM, times 1 + K where K states of earlier layers go to the LLM, too, and stand behind it.
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
"""Settings that transformers gives most models, and the largest of each that is believed: several times what any
published model has."""


class ShortPrompt(NamedTuple):
    """Prompts of a batch as the language model reads them.

    Attributes:
        ids, mask: [B, L].
        visual: [B, L] bool, where visual tokens are.
        tokens: [N, E], those, prompt by prompt, without what closes a video.
        cells: [N] int64, the cell of its frame that each is, row by row.
        grid: [N, 2] int64, rows and columns of cells that this frame has.
        time: [N] int64, of `Family.token_times`.
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
        model_type: what such a configuration calls the family.
        title, tower_title: what people call the family and its tower.
        model_class, config_class: transformers' classes of the whole model and of its configuration.
        towers: model types of the vision towers that its checkpoints may have.
        frames: how many of a video a checkpoint is shown that does not say.
        vision_names, decoder_names: what the canonical names of the tensors of either part begin with; in most families
            two modules are the vision part, first the tower, then the projector.
        unused_names: tensors of neither part, that only pictures need.
        closing_name, embeddings_name, head_name: canonical names of three tensors: what closes the visual tokens (None
            where nothing does), the decoder's embeddings, its output layer.
        video_token: the text that stands for a video in a rendered prompt.
        visual_token: the text that stands for one visual token.
        span_a_frame: whether every frame's visual tokens stand by themselves in a prompt, with a text that names the
            frame (`before_frame`, `after_frame`, `between_frames`, in all `before_video`, `after_video`); else those
            of a video are one span.
        names_times: whether such texts say when a frame was.
        says_times: whether the text behind a video in one span says when its frames were (`behind_video`).
        sampling: which frames of a video are shown: "ends", from the first to the last, "nearest", the nearest to
            those (`runtime.video.sample`), "middles", those in the middle of equal parts, or "begins", those that such
            parts begin with.
        mean, std: of the pixels, where a checkpoint's files do not say.
        pixels_name, features_name: what `generate` and the model call the pixels of a video, and the model's method
            that makes visual tokens of them.
        beside_pixels: what they are given about a video beside them, by name.
        step: pictures of a video that the tower takes for one frame.
        on_axes: whether its language model places tokens by time, row and column, a span taking as many positions as
            its frames have rows or columns, whichever are more (`runtime.text.axes`); else by their order.
        own_visual_token: whether checkpoints' tokenizers may lack `visual_token`: it is given the id that the
            configuration says.
        any_size: whether frames may have any size that patches fill (`sized`); else the checkpoint says which.
        known_names: whether transformers knows the names of tensors in its checkpoints.
        released: whether EarlyTom was first released for it, so that `runtime.measure.naive` can run.
        presets: settings of EarlyTom that were released for it alone.
        vision_sizes: settings of a vision configuration that are sizes, and the largest of each that is believed.
        activations, token_ids, layer_setting: settings of a configuration: names of activation functions, ids of
            tokens, the last that of a visual one, and the one that says which states are taken, such as the encoder
            layer.
        roles: what `earlytom.micro.weights` knows tensors by whose canonical names end so, where that is another name.
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
        """What an engine's manifest calls it; `model_type` unless its models take several forms."""
        return self.model_type

    @property
    def forms(self) -> tuple[Family, ...]:
        """What settings of its configurations make of it, each with a name of its own."""
        return (self,)

    def of(self, config: Any) -> Family:
        """That of `forms` which such a configuration has."""
        return self

    def describes(self, raw: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of this family."""
        return raw.get("model_type") == self.model_type

    def translated(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a config.json in transformers' form.

        Raises:
            UserError: it has another one, and a setting in it for which there is no code.
        """
        return dict(raw)

    @abstractmethod
    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuse settings of a config.json that transformers takes and that fail only later, on arithmetic.

        Raises:
            UserError: there is one.
        """

    def config(self, raw: dict[str, Any]) -> Any:
        """transformers' configuration of the content of a config.json; it raises what that raises."""
        import transformers

        return getattr(transformers, self.config_class).from_dict(raw)

    def prepares(self, config: Any) -> Mapping[str, Any] | None:
        """A preprocessing file for checkpoints that have none; None where they must have one."""
        return None

    def preparation(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The content of a preprocessing file in the words that most families use (`runtime.checkpoint`)."""
        return raw

    @abstractmethod
    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens that a grid of patches becomes."""

    @abstractmethod
    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Anything that patches have, [F', S, n], brought to the cells by the family's own pooling, [F', P, n].

        `grid`: (rows, columns) of patches; a square by default.
        """

    @abstractmethod
    def geometry(self, config: Any) -> Geometry:
        """Raises UserError for a configuration whose features EarlyTom cannot run on."""

    def sized(self, config: Any, size: tuple[int, int]) -> Any:
        """The configuration for frames of `size` (height, width): of most families that is fixed, and this the same.

        Raises:
            UserError: patches do not fill it.
        """
        return config

    @abstractmethod
    def tower(self, tower: nn.Module) -> Tower:
        """The adapter of a vision tower. Raises UserError where there is none."""

    @abstractmethod
    def vision(self, tower: nn.Module, projector: nn.Module) -> Vision:
        """The vision part around a Hugging Face vision tower; nothing is copied.

        Raises:
            UserError: the tower has no adapter.
        """

    def vision_of(self, model: Any) -> Vision:
        """The vision part of a whole transformers model (without its language-model head); nothing is copied."""
        return self.vision(*self.modules(model)[:2])

    def modules(self, model: Any) -> VisionModules:
        """The same as modules."""
        tower, projector = (getattr(model, name.removesuffix(".")) for name in self.vision_names[:2])
        return VisionModules(tower, projector, self.closing(model))

    @abstractmethod
    def new_modules(self, config: Any) -> VisionModules:
        """The vision part alone, on the default device, without weights that mean anything."""

    def new_model(self, config: Any) -> Any:
        """The whole model on the default device, without weights that mean anything."""
        return self.transformers_class()(config)

    def transformers_class(self) -> Any:
        """`model_class`, imported."""
        import transformers

        return getattr(transformers, self.model_class)

    def drop_vision(self, model: Any) -> None:
        """Take tower and projector out of a whole model (with its head), in place; `closing` stays."""
        for name in self.vision_names:
            if name != self.closing_name:
                delattr(model.model, name.removesuffix("."))

    def restore_buffers(self, tower: nn.Module) -> None:
        """Make the buffers of a tower that are stored nowhere, after its weights were loaded; most have none."""
        return

    def module_name(self, name: str) -> str:
        """Where a tensor of the vision part stands in `VisionModules`, by canonical name: "vision_tower.x",
        "projector.x" or "closing"."""
        tower, projector = self.vision_names[:2]
        own = name.replace(tower, "vision_tower.", 1).replace(projector, "projector.", 1)
        return "closing" if name == self.closing_name else own

    @abstractmethod
    def vision_settings(self, config: Any) -> dict[str, Any]:
        """What the vision part computes with beside its weights, in plain JSON types, each under a name of its own."""

    @abstractmethod
    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        """The visual tokens of one video as the model makes them itself, all of them and what closes them, [N, E].

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
        """What the canonical names of tensors begin with that may be stored and that the model does without."""
        return ()

    def vision_flops(self, config: Any, frames_per_stage: Sequence[int], merge_layers: Sequence[int]) -> int:
        """Floating-point operations of tower and projector on one video, see `earlytom.flops`.

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
        """Those of the projector alone, on `frames` frames."""
        frame = self.geometry(config)
        products = (1 + frame.streams) * sum(a * b for a, b in pairwise(frame.projector))
        return 2 * frames * frame.projector_rows * products

    def projector_weights(self, config: Any) -> int:
        """How many values its weights have."""
        return sum((a + 1) * b for a, b in pairwise(self.geometry(config).projector))

    def vision_weights(self, config: Any) -> int:
        """How many values the weights of the vision part have."""
        frame = self.geometry(config)
        return frame.depth * frame.layer_weights + self.other_weights(config) + self.projector_weights(config)

    @abstractmethod
    def other_weights(self, config: Any) -> int:
        """How many of them are neither `Geometry.layer_weights` nor the projector's."""

    def video_token_id(self, config: Any) -> int:
        """The id that stands for one visual token in a prompt."""
        return getattr(config, self.token_ids[-1])

    def closing(self, model: Any) -> nn.Parameter | None:
        """What closes visual tokens, [E]; None where nothing does. `model` as in `vision_of`."""
        return None if self.closing_name is None else getattr(model, self.closing_name)

    def closings(self, cells: tuple[int, int]) -> Closings:
        """Where that stands among visual tokens, for frames of `cells` (rows, columns)."""
        return Closings(None if self.closing_name is None else "video", cells)

    def behind_video(self, times: FrameTimes) -> str:
        """Where they `says_times`: the text that does, behind the visual tokens of a video in one span."""
        return ""

    @property
    def in_pieces(self) -> str | None:
        """Why a video is not one span of visual tokens that stand one after the other; None where it is."""
        if self.span_a_frame:
            return "has one a frame"
        if self.on_axes:
            return "places its tokens by time, row and column"
        return None if self.closings((1, 1)).closes in (None, "video") else "has newlines within it"

    def chat_template(self) -> str | None:
        """What renders a conversation with a video in the place of the checkpoint's own template; None: nothing."""
        return None

    def before_video(self, times: FrameTimes | None) -> str:
        """Where frames have spans of their own: the text before those of a video. Without times, the longest."""
        return ""

    def before_frame(self, number: int, times: FrameTimes | None = None) -> str:
        """The text before the visual tokens of a frame of the video, from 0; without times as in `before_video`."""
        raise NotImplementedError(f"{self.title} has one span a video")

    def after_video(self) -> str:
        """The text after those of a video."""
        return ""

    def time_steps(self, frames: int, per_second: float | None, times: FrameTimes | None = None) -> tuple[int, ...]:
        """Of `frames` frames that the tower takes: where each stands on the axis of time, behind its span's first.

        Args:
            per_second: `Geometry.tokens_per_second`; None: each frame has a span, and so all stand where that begins.
            times: when the pictures that they are made of were; None: a frame is a second.
        """
        if per_second is None:
            return (0,) * frames
        import torch

        seconds = 1.0 if times is None else self.step * times.duration / len(times.seconds)
        # In single precision, as transformers has it: rounded down, other digits would be another position.
        return tuple((torch.arange(frames) * (per_second * torch.tensor(seconds).float())).long().tolist())

    def spans(self, config: Any, frames: int) -> tuple[int, ...]:
        """How many placeholders, span by span, the processor puts into a prompt for a video of `frames` pictures."""
        frame = self.geometry(config)
        each, frames = frame.tokens_per_frame, frames // frame.step
        if self.span_a_frame:
            return (each,) * frames
        return (frames * each + self.closings(frame.cells).most(frames * each, frames),)

    def placeholders(self, config: Any, frames: int) -> int:
        """How many placeholders those are together."""
        return sum(self.spans(config, frames))

    @abstractmethod
    def videos(self, config: Any, pixels: Tensor, placeholders: Sequence[int]) -> list[list[Tensor]]:
        """The videos [F * step, 3, H, W] of each prompt of a batch, of what `given` returned.

        `placeholders`: how many each prompt has. Raises UserError where they do not fit the pixels.
        """

    def given(self, config: Any, pixels: Tensor, **beside: Any) -> Any:
        """What the model's processor makes of videos and `beside_pixels`, in one value for `videos`."""
        return pixels

    def given_features(self, config: Any, videos: list[Tensor]) -> Any:
        """What the model's own method `features_name` returns of the visual tokens [N, E] of each video."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # [B, N + 1, E] where every video has as many tokens; else one row of all of them.
        even = len({len(video) for video in videos}) == 1
        return BaseModelOutputWithPooling(pooler_output=torch.stack(videos) if even else torch.cat(videos)[None])

    def token_times(self, config: Any, frames: Tensor, video: int, **beside: Any) -> Tensor:
        """int64 [N]: how many positions behind the first of its span a visual token stands in time.

        `frames` int64 [N]: which frame of video number `video` each is taken to be; `beside` as in `given`.
        """
        return frames * 0

    def reading(self, model: Any, prompt: ShortPrompt) -> AbstractContextManager[dict[str, Any]]:
        """Within the block the whole model reads such a prompt, given as embeddings, as it would read its own.

        Yields what its forward pass is to be given beside them.
        """
        return nullcontext({})

    @abstractmethod
    def special_tokens(self, config: Any) -> dict[str, int]:
        """The tokens of a published model's prompts that stand for themselves, and their ids, ascending."""

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        """Configurations of published models by name, to measure without a download."""
        return {}

    def weight_role(self, name: str) -> str:
        """A tensor's canonical name, as `earlytom.micro.weights` knows tensors of its kind."""
        return next((role for end, role in self.roles.items() if name.endswith(end)), name)
