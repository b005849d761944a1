"""Checkpoints: what a source holds, and the parts of it that a caller asks for.

A *source* is None or "micro" (the bundled model), "random:NAME" (a published configuration, or a mid-size one, with
random weights, for measuring without a download), a local folder, or a hub id ORG/NAME.

* `describe` reads the settings and creates no weights.
* `load_vision` creates the vision tower, the projector and `image_newline`, never the decoder: of a checkpoint's files
  only those tensors are read; random ones are drawn in the target dtype.
* `load_model` creates the whole model; its vision weights equal those of `load_vision` for the same source.
* `load_tokenizer` gives a tokenizer with the chat template of the checkpoint's processor.

Everything that can be wrong with a source ends in a `UserError` of one line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from earlytom import micro
from earlytom.errors import UserError
from earlytom.micro.progress import without_progress_bars
from earlytom.micro.random_model import PUBLISHED, VIDEO, published_tokenizer, random_model
from earlytom.micro.weights import SCHEME, random_state
from runtime.checkpoint_files import Files, HubFiles, first_line, is_hub_id, some

if TYPE_CHECKING:  # transformers' classes take seconds to import: each function imports those that it makes
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase

MICRO = "micro"
RANDOM = "random:"
RANDOM_SEED = 0
PUBLISHED_FRAMES = 32
MID_SIZE, MID_SIZE_FRAMES = "siglip-base-qwen2-0.5b", 8  # between the bundled and the published ones

_FAMILY, _TOWER = "llava_onevision", "siglip_vision_model"
_PREFIXES = ("vision_tower.", "multi_modal_projector.", "image_newline")  # canonical names of the vision part's tensors
_BICUBIC = 3
_TOWER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "vision_use_head",
)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a frame before the tower: resize to `size` (height, width), divide by 255, normalise."""

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, without its weights.

    Attributes:
        source: what was asked for ("micro" for None).
        name: a short name, fit for a folder.
        config: the model's configuration; its vision tower is SigLIP, its features are those of the last layer.
        preprocessing: of video frames; its size is that of the vision tower.
        trained: false for random weights, and for the bundled model until it is trained.
        files: None for random weights.
        frames: how many frames of a video it is meant to be shown; its video processor's `num_frames`, else 32, the
            published number.
    """

    source: str
    name: str
    config: LlavaOnevisionConfig
    preprocessing: Preprocessing
    trained: bool
    files: Files | None = field(default=None, repr=False, compare=False)
    frames: int = PUBLISHED_FRAMES

    def digest(self) -> str:
        """SHA-256 (hex) of everything that a vision engine depends on: tensors, their settings, the preprocessing.

        Tensors count under their canonical names and with the dtype in which they are stored: a checkpoint that another
        release of transformers merely saved again, or in other shards, has the same digest. Random weights count by the
        way they are drawn. Reads the vision tensors once; raises `UserError` as `load_vision` does.
        """
        settings = {
            "tower": {name: getattr(self.config.vision_config, name) for name in _TOWER_FIELDS},
            "projector": [self.config.projector_hidden_act, self.config.multimodal_projector_bias],
            "preprocessing": asdict(self.preprocessing),
        }
        sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        shapes = vision_shapes(self.config)
        if self.files is None:
            sha.update(f"{SCHEME}:{RANDOM_SEED}:{sorted((n, tuple(s)) for n, s in shapes.items())}".encode())
            return sha.hexdigest()
        for name, tensor in self.files.tensors(shapes, _PREFIXES):
            sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


class VisionPart(nn.Module):
    """The part of a model that becomes the vision engine, and the vector that the runtime appends to its tokens.

    Attributes:
        vision_tower: SiglipVisionModel, width D.
        projector: D to the width E of the decoder.
        image_newline: [E] parameter.
    """

    def __init__(self, vision_tower: nn.Module, projector: nn.Module, image_newline: nn.Parameter) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.image_newline = image_newline

    @classmethod
    def from_model(cls, model: LlavaOnevisionForConditionalGeneration) -> VisionPart:
        """The vision part of a loaded model; modules are shared, nothing is copied."""
        inner = model.model
        return cls(inner.vision_tower, inner.multi_modal_projector, inner.image_newline)


Source = str | Path | Checkpoint | None


def describe(source: Source = None) -> Checkpoint:
    """Configuration, preprocessing and origin of `source`; no weights are read.

    Raises `UserError` if there is no such source, if its files are missing or broken, or if its model is not a
    LLaVA-OneVision with a SigLIP tower. A `Checkpoint` is returned as it is.
    """
    if isinstance(source, Checkpoint):
        return source
    label = MICRO if source is None else str(source)
    if label.startswith(RANDOM):
        return _describe_random(label)
    files = _open(label)
    raw = files.json("config.json")
    if raw is None:
        raise files.error("it has no config.json; expected the folder of a LLaVA-OneVision checkpoint")
    config = _parse_config(raw, files)
    trained = bool(raw.get("earlytom_trained", True))
    preprocessing, frames = _read_preprocessing(files, config), _read_frames(files)
    return Checkpoint(label, files.name, config, preprocessing, trained, files, frames)


def load_vision(source: Source = None, dtype: torch.dtype = torch.float32) -> VisionPart:
    """Vision tower, projector and `image_newline` of `source` in `dtype`, on the CPU, in eval mode, without gradients.

    Raises `UserError` as `describe` does, and for tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    checkpoint = describe(source)
    shapes = vision_shapes(checkpoint.config)
    if checkpoint.files is None:
        state = random_state(shapes, dtype, seed=RANDOM_SEED)
    else:
        state = {}
        for name, tensor in checkpoint.files.tensors(shapes, _PREFIXES):
            state[name] = tensor.to(dtype)
            _check_finite(name, state[name], checkpoint.files)
    part = _empty_vision(checkpoint.config)
    part.load_state_dict({name.removeprefix("multi_modal_"): tensor for name, tensor in state.items()}, assign=True)
    embeddings: Any = part.vision_tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)  # a buffer that is not stored
    return part.eval().requires_grad_(False)


def load_model(source: Source = None, dtype: torch.dtype = torch.float32) -> LlavaOnevisionForConditionalGeneration:
    """The whole model of `source` in `dtype`, on the CPU, in eval mode, each weight created once.

    Raises `UserError` as `load_vision` does, for the decoder's tensors too.
    """
    checkpoint = describe(source)
    files = checkpoint.files
    if files is None:
        return random_model(checkpoint.config, dtype, seed=RANDOM_SEED)
    files.places(vision_shapes(checkpoint.config), _PREFIXES)  # says more clearly what is wrong than the library does
    from transformers import LlavaOnevisionForConditionalGeneration

    try:
        with without_progress_bars():
            loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
                files.folder(("*.json", "*.safetensors")),
                config=checkpoint.config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise files.error(f"its weights cannot be loaded ({first_line(error)}); download it again") from error
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, report[f"{kind}_keys"])):
            raise files.error(f"{kind} tensors in the weights: {some(names)}; the checkpoint is not complete")
    for name, parameter in model.named_parameters():
        _check_finite(name, parameter.detach(), files)
    return model.eval()


def load_tokenizer(source: Source = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with the chat template that its processor would use.

    "random:NAME" has none of its own and gets the bundled tokenizer, its special tokens moved to the ids of the
    published one. Raises `UserError` if files are missing or broken, or if the tokenizer and the configuration name
    different ids for the video token.
    """
    checkpoint = describe(source)
    files = checkpoint.files
    if files is None:
        return published_tokenizer(load_tokenizer(MICRO), checkpoint.config)
    if files.path("tokenizer.json") is None and files.path("vocab.json") is None:
        raise files.error(
            "it has neither tokenizer.json nor vocab.json; expected the tokenizer's files beside the weights"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            files.folder(("*.json", "*.jinja", "merges.txt")), local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises nothing narrower for a broken file
        raise files.error(f"its tokenizer cannot be read ({first_line(error)}); download it again") from error
    # In the order of transformers' processor; chat_template.jinja comes last, and the tokenizer has read it already.
    for name in ("processor_config.json", "chat_template.json"):
        if template := (files.json(name) or {}).get("chat_template"):
            tokenizer.chat_template = template
            break
    if not tokenizer.chat_template:
        raise files.error("it has no chat template; expected chat_template.jinja or chat_template.json")
    known, wanted = tokenizer.get_added_vocab().get(VIDEO), checkpoint.config.video_token_id
    if known != wanted:
        raise files.error(f"its tokenizer has the id {known} for {VIDEO}, and config.json says {wanted}")
    return tokenizer


def vision_shapes(config: LlavaOnevisionConfig) -> dict[str, torch.Size]:
    """Shape of each tensor of the vision part, by its canonical name in a checkpoint."""
    named = _empty_vision(config).named_parameters()
    return {f"multi_modal_{name}" if name.startswith("projector.") else name: p.shape for name, p in named}


def _empty_vision(config: LlavaOnevisionConfig) -> VisionPart:
    """The vision part without memory for its weights."""
    from transformers import AutoModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

    text: Any = config.text_config
    with torch.device("meta"):
        newline = nn.Parameter(torch.empty(text.hidden_size))
        tower = AutoModel.from_config(config.vision_config)
        return VisionPart(tower, LlavaOnevisionMultiModalProjector(config), newline)


def _open(label: str) -> Files:
    """The files behind a source that is not random."""
    if label == MICRO:
        return Files(label, micro.PATH)
    path = Path(label).expanduser()
    if path.is_dir():
        return Files(label, path)
    if path.exists():
        raise UserError(f"--model {label}: it is a file; expected the folder of a checkpoint")
    if is_hub_id(label):
        return HubFiles(label)
    raise UserError(
        f"--model {label}: no such folder; expected the folder of a checkpoint, a hub id ORG/NAME, '{MICRO}' or "
        f"{RANDOM}NAME"
    )


def _describe_random(label: str) -> Checkpoint:
    name = label.removeprefix(RANDOM)
    known = {**PUBLISHED, MID_SIZE: _mid_size}
    if name not in known:
        raise UserError(f"--model {label}: no such configuration; known are {', '.join(RANDOM + n for n in known)}")
    config, frames = known[name](), MID_SIZE_FRAMES if name == MID_SIZE else PUBLISHED_FRAMES
    vision: Any = config.vision_config
    size = (vision.image_size,) * 2
    return Checkpoint(label, f"random-{name}", config, Preprocessing(size), trained=False, frames=frames)


def _mid_size() -> LlavaOnevisionConfig:
    """SigLIP base at 384 pixels and the smallest published decoder: what a CPU can be measured with in minutes."""
    from transformers import LlavaOnevisionConfig

    settings = PUBLISHED["llava-onevision-qwen2-0.5b-ov"]().to_dict()
    settings["vision_config"] |= {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    return LlavaOnevisionConfig.from_dict(settings)


def _parse_config(raw: dict[str, Any], files: Files) -> LlavaOnevisionConfig:
    """The configuration, if it is one that the vision path of this project implements."""
    family = raw.get("model_type")
    if family != _FAMILY:
        raise files.error(f"model family {family!r} is not supported; supported is {_FAMILY!r} (LLaVA-OneVision)")
    if raw.get("quantization_config"):
        raise files.error("quantised weights are not supported; use the original checkpoint")
    from transformers import LlavaOnevisionConfig

    try:
        config = LlavaOnevisionConfig.from_dict(raw)
    except Exception as error:  # the library checks with exceptions of several kinds
        raise files.error(f"config.json is not a valid configuration ({first_line(error)})") from error
    vision: Any = config.vision_config
    if vision.model_type != _TOWER:
        raise files.error(f"vision tower {vision.model_type!r} is not supported; supported is {_TOWER!r}")
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if layer not in (-1, vision.num_hidden_layers) or strategy != "full":
        raise files.error(
            f"vision_feature_layer {layer} with strategy {strategy!r} is not supported; supported is the last layer, "
            "-1, with 'full'"
        )
    return config


def _read_preprocessing(files: Files, config: LlavaOnevisionConfig) -> Preprocessing:
    """The preprocessing of video frames, from the file that transformers' processor would take it from."""
    processor = files.json("processor_config.json") or {}
    raw = processor.get("video_processor") or files.json("video_preprocessor_config.json")
    raw = raw or files.json("preprocessor_config.json") or processor.get("image_processor")
    if not raw:
        raise files.error("it has no preprocessor_config.json, so frames cannot be prepared for it; download it again")
    try:
        size = raw["size"]
        if isinstance(size, dict):
            edge = size.get("shortest_edge")
            size = (size.get("height", edge), size.get("width", edge))
        height, width = (size, size) if isinstance(size, int) else size
        normalise = raw.get("do_normalize", True)
        mean = tuple(float(value) for value in raw["image_mean"]) if normalise else (0.0, 0.0, 0.0)
        std = tuple(float(value) for value in raw["image_std"]) if normalise else (1.0, 1.0, 1.0)
        factor = float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else 1.0
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise files.error(f"its preprocessing settings cannot be read ({error!r}); download them again") from error
    vision: Any = config.vision_config
    if (height, width) != (vision.image_size, vision.image_size):
        raise files.error(
            f"it prepares frames of {height}x{width}, and its tower takes {vision.image_size}x{vision.image_size}"
        )
    if len(mean) != 3 or len(std) != 3 or not all(map(isfinite, mean + std)) or min(std) <= 0:
        raise files.error(f"image_mean {list(mean)} and image_std {list(std)} are not three usable values each")
    if abs(factor * 255 - 1) > 1e-4 or raw.get("resample", _BICUBIC) != _BICUBIC:
        raise files.error("only bicubic resizing (resample 3) and rescaling by 1/255 are supported")
    return Preprocessing((height, width), mean, std)


def _read_frames(files: Files) -> int:
    """`num_frames` of the video processor's settings; most checkpoints do not say."""
    processor = files.json("processor_config.json") or {}
    raw = processor.get("video_processor") or files.json("video_preprocessor_config.json") or {}
    frames = raw.get("num_frames") or PUBLISHED_FRAMES
    if not isinstance(frames, int) or frames < 1:
        raise files.error(f"num_frames {frames!r} of its video processor is not a whole number of at least 1")
    return frames


def _check_finite(name: str, tensor: Tensor, files: Files) -> None:
    """Refuse NaN and infinity, in one pass without a copy: both extremes of a tensor with NaN are NaN."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise files.error(
            f"{name} holds NaN or infinity in {tensor.dtype}; the file is damaged (download it again), or its values "
            "need a wider type (--bf16 or --fp32)"
        )
