"""What a model family answers for: everything that is true of its models and of no other family's.

The rest of the project asks a `Family` and knows no model by name. Its parts: the geometry of a frame on its way to the
LLM, the vision part as the encoder runs it (`Vision`), what a checkpoint of it must have, the names of its tensors and
how a model is made without them, what the vision part costs, and where visual tokens stand in a prompt.

Nothing here imports PyTorch or transformers before it needs them: what a family is called, help texts say, too.

Notation: F' frames, S patch tokens a frame, P tokens a frame after projector and pooling, D tower width, E LLM width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.towers import Tower


@dataclass(frozen=True)
class Geometry:
    """Frames of one size, from pixels to visual tokens.

    Attributes:
        size: (height, width) in pixels.
        patch: side of a patch, in pixels.
        grid: (rows, columns) of patches, which enter the tower.
        cells: (rows, columns) of tokens, which reach the LLM.
        step: frames of the video that the tower takes for one.
        depth: encoder layers that run.
        width: D; llm_width: E.
    """

    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    cells: tuple[int, int]
    step: int
    depth: int
    width: int
    llm_width: int

    @property
    def patches(self) -> int:
        """S."""
        return math.prod(self.grid)

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return math.prod(self.cells)


class VisionModules(NamedTuple):
    """The vision part of a transformers model.

    Attributes:
        vision_tower: [F, 3, H, W] to hidden states, of width D.
        projector: D to E.
        closing: [E], what follows the visual tokens of a video; None where nothing does.
    """

    vision_tower: nn.Module
    projector: nn.Module
    closing: nn.Parameter | None


class Features(NamedTuple):
    """Frames as the LLM would see them before any token is left out.

    Attributes:
        features: [F', P, E].
        relevance: [F', P] fp32, received attention brought to the same cells; None if none was given.
        projected: [F', S, E], what the projector gave, for those who look inside.
        cells: (rows, columns) of the P tokens of a frame.
    """

    features: Tensor
    relevance: Tensor | None
    projected: Tensor
    cells: tuple[int, int]


class Vision(ABC):
    """The vision part of one model, as the encoder runs it.

    Attributes:
        tower: how pixels become hidden states, layer by layer.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower

    @abstractmethod
    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        """Patch hidden states [F', S, D] and received attention [F', S] through projector and pooling, in the family's
        order."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """As `Family.pool`."""


class Family(ABC):
    """One model family; `config` is always the Hugging Face configuration of one of its models.

    Canonical names are those of `canonical_name`.

    Attributes:
        model_type: what such a configuration calls the family.
        title, tower_title: what people call the family and its tower.
        model_class: transformers' class of the whole model.
        towers: model types of the vision towers that its checkpoints may have.
        frames: how many of a video a checkpoint is shown that does not say.
        vision_names, decoder_names: what the canonical names of the tensors of either part begin with.
        closing_name, embeddings_name, head_name: canonical names of three tensors: what closes the visual tokens (None
            where nothing does), the decoder's embeddings, its output layer.
        video_token: the text that stands for a video in a prompt.
        activations, token_ids, layer_setting: settings of a configuration: names of activation functions, ids of
            tokens, and the encoder layer whose states are taken.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    tower_title: ClassVar[str]
    model_class: ClassVar[str]
    towers: ClassVar[tuple[str, ...]]
    frames: ClassVar[int]
    vision_names: ClassVar[tuple[str, ...]]
    decoder_names: ClassVar[tuple[str, ...]]
    closing_name: ClassVar[str | None]
    embeddings_name: ClassVar[str]
    head_name: ClassVar[str]
    video_token: ClassVar[str]
    activations: ClassVar[tuple[str, ...]]
    token_ids: ClassVar[tuple[str, ...]]
    layer_setting: ClassVar[str]

    @abstractmethod
    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuse settings of a config.json that transformers takes and that fail only later, on arithmetic.

        Raises:
            UserError: there is one.
        """

    @abstractmethod
    def config(self, raw: dict[str, Any]) -> Any:
        """transformers' configuration of the content of a config.json; it raises what that raises."""

    @abstractmethod
    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens that a grid of patches becomes."""

    @abstractmethod
    def pool(self, values: Tensor) -> Tensor:
        """Anything that patches have, [F', S, n], brought to the cells by the family's own pooling, [F', P, n]."""

    @abstractmethod
    def geometry(self, config: Any) -> Geometry:
        """Raises UserError for a configuration whose features EarlyTom cannot run on."""

    @abstractmethod
    def vision(self, tower: nn.Module, projector: nn.Module) -> Vision:
        """The vision part around a Hugging Face vision tower; nothing is copied.

        Raises:
            UserError: the tower has no adapter.
        """

    def vision_of(self, model: Any) -> Vision:
        """The vision part of a whole transformers model (without its language-model head); nothing is copied."""
        return self.vision(*self.modules(model)[:2])

    @abstractmethod
    def modules(self, model: Any) -> VisionModules:
        """The same as modules."""

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

    @abstractmethod
    def drop_vision(self, model: Any) -> None:
        """Take tower and projector out of a whole model (with its head), in place; `closing` stays."""

    @abstractmethod
    def restore_buffers(self, tower: nn.Module) -> None:
        """Make the buffers of a tower that are stored nowhere, after its weights were loaded."""

    @abstractmethod
    def module_name(self, name: str) -> str:
        """Where a tensor of the vision part stands in `VisionModules`, by canonical name: "vision_tower.x",
        "projector.x" or "closing"."""

    @abstractmethod
    def vision_settings(self, config: Any) -> dict[str, Any]:
        """What the vision part computes with beside its weights, in plain JSON types, each under a name of its own."""

    @abstractmethod
    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        """The visual tokens of one video as the model makes them itself, all of them and what closes them, [N, E].

        `model` is a whole transformers model with its head, `pixels` are [F, 3, H, W].
        """

    @abstractmethod
    def canonical_name(self, name: str) -> str:
        """The name of a tensor without the prefixes in which the releases of transformers differ."""

    @abstractmethod
    def vision_flops(self, config: Any, frames_per_stage: Sequence[int], merge_layers: Sequence[int]) -> int:
        """Floating-point operations of tower and projector on one video, see `earlytom.flops`.

        Args:
            config: of the model.
            frames_per_stage: frames before the first merge and after each one.
            merge_layers: after which layers the frames are merged.
        """

    @abstractmethod
    def projector_flops(self, config: Any, frames: int) -> int:
        """Those of the projector alone, on `frames` frames."""

    @abstractmethod
    def vision_weights(self, config: Any) -> int:
        """How many values the weights of the vision part have."""

    @abstractmethod
    def video_token_id(self, config: Any) -> int:
        """The id that stands for one visual token in a prompt."""

    @abstractmethod
    def closing(self, model: Any) -> nn.Parameter | None:
        """What follows the visual tokens of a video, [E]; None where nothing does. `model` as in `vision_of`."""

    @abstractmethod
    def placeholders(self, config: Any, frames: int) -> int:
        """How many placeholders the family's processor puts into a prompt for a video of `frames` frames."""
