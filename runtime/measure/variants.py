"""The compared variants: each answers the same question about the same video with the same weights.

    full       transformers (sdpa): all tokens; its own forward pass and dynamic cache
    naive      EarlyTom as first released (`runtime.measure.naive`), adaptive schedule; decoder as above
    adaptive   this project in PyTorch, the same decisions as naive; `runtime.decoder.eager`
    budget     this project in PyTorch, static shapes; `runtime.decoder.eager`
    NAME       a published method in PyTorch (`earlytom.methods.published`), corrected form; decoder as above
    engine     an engine folder, once for each backend that can run it here; `runtime.decoder.eager`

A variant is a vision part and a decoder. All share one model; only engines hold a second copy of vision weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from earlytom import flops
from earlytom.budget import token_count
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.errors import UserError
from earlytom.families import geometry
from earlytom.method import Method
from earlytom.methods import by_name
from earlytom.methods.earlytom import EarlyTom
from earlytom.settings import FIELD, MethodSettings
from earlytom.spans import check_watched
from earlytom.standing import FrameSpan, frame_spans, frame_times, places
from runtime.checkpoint import Checkpoint, load_model, load_tokenizer
from runtime.checkpoint.narrow import narrow
from runtime.decoder.eager import Decoder
from runtime.decoder.states import adding
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.measure.arguments import method
from runtime.measure.naive import encode_naive
from runtime.text.axes import Told, following, told_of
from runtime.text.prompt import Prompt, build_prompt, check_length
from runtime.vision import VisionBackend, choose_backend, encode_one, open_backend

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())


@dataclass(frozen=True)
class SeenPrompt:
    """Visual tokens [N, E], how many of them are closing tokens (0: to be added), and the numbers of frames before the
    first merge and after each one; positions and sources as in `runtime.vision.Encoded`, None for uncompressed tokens
    and "naive"."""

    tokens: Tensor
    closed: int
    frames_per_stage: tuple[int, ...]
    positions: Tensor | None = None
    sources: Tensor | None = None


class Decoding(Protocol):
    """A decoder: `embed` as in `runtime.text.prompt.splice`, `stream` gives exactly `count` ids; `told` has the
    prompt's positions on axes and further arguments."""

    def embed(self, ids: Tensor) -> Tensor: ...

    def stream(self, embeds: Tensor, count: int, told: Told | None = None) -> Generator[int, None, Any]: ...


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        name, about: a short name and a description.
        config: the method's settings; `OFF` for "full".
        frames: F.
        copy: frames uint8 [F, 3, H, W] in host memory to the input of `see`.
        see: encodes that.
        folder: name of the engine, else None.
        int8: whether it is an engine with int8 products.
    """

    name: str
    about: str
    config: MethodSettings
    frames: int
    copy: Callable[[Tensor], Tensor]
    see: Callable[[Tensor], SeenPrompt]
    decoding: Decoding
    folder: str | None = None
    int8: bool = False


class TransformersDecoding:
    """The model's own forward pass with the cache that `generate` makes by default."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        return self._model.get_input_embeddings()(ids)

    def stream(self, embeds: Tensor, count: int, told: Told | None = None) -> Generator[int, None, None]:
        given: dict[str, Any] = {"inputs_embeds": embeds} | ({} if told is None else told.forward())
        states = None if told is None else told.how.get("states")
        cache = None
        for done in range(count):
            with torch.no_grad(), adding(self._model.get_decoder(), states, slice(None)):  # not held across a yield
                out = self._model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                chosen = out.logits[0, -1].argmax()
            cache, given, states = out.past_key_values, {"input_ids": chosen.view(1, 1)}, None
            if told is not None:
                given["position_ids"] = following(told.end + done, 1, embeds.device)[:, None]
            yield int(chosen)


class RuntimeDecoding:
    """`runtime.decoder.eager`, without stop tokens."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.embed = decoder.embed

    def stream(self, embeds: Tensor, count: int, told: Told | None = None) -> Generator[int, None, Any]:
        how: dict[str, Any] = {} if told is None else dict(told.how)
        return self._decoder.stream(embeds, max_new_tokens=count, **how)


class Bench:
    """A loaded model and one question, from which variants are made.

    Args:
        checkpoint: from `runtime.checkpoint.describe`.
        question: asked of every video.
        device, dtype: of the model.
        int8: quantise the decoder's weights to int8 (`runtime.checkpoint.narrow`).
    """

    def __init__(
        self, checkpoint: Checkpoint, question: str, device: torch.device, dtype: torch.dtype, *, int8: bool = False
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.tokenizer = load_tokenizer(checkpoint)
        self.prompt: Prompt = build_prompt(self.tokenizer, question, family=checkpoint.family)
        self.model: Any = torch.nn.Module.to(load_model(checkpoint, dtype), device)
        if int8:
            narrow(self.model)
        self.inner: Any = self.model.model
        self.family = checkpoint.family
        self.depth = geometry(checkpoint.config).depth
        closing = self.family.closing(self.inner)
        self.closing = None if closing is None else closing.detach()
        self.closings = self.family.closings(geometry(checkpoint.config).cells)
        self.plain = TransformersDecoding(self.model)
        self.ours = RuntimeDecoding(Decoder.from_model(self.model))
        self._scale, self._shift = checkpoint.preprocessing.affine(device)

    def check(self, frames: int, new_tokens: int) -> None:
        """Raise UserError unless all tokens of `frames` frames, the question and the answer fit in the context."""
        full = full_tokens(self.checkpoint, frames)
        text: Any = self.checkpoint.config.text_config
        context = text.max_position_embeddings
        steps = frames // self.family.step
        visual, how = full + self.closings.most(full, steps), {"left": steps, "frames": steps}
        check_length(self.prompt, visual_tokens=visual, new_tokens=new_tokens, context=context, **how)

    def spans(self, seen: SeenPrompt) -> tuple[FrameSpan, ...] | None:
        """The spans of visual tokens, one a frame; None if the video is a single span."""
        if self.prompt.names is None:
            return None
        per_frame = geometry(self.checkpoint.config).tokens_per_frame
        if seen.positions is None or seen.sources is None:
            return tuple(FrameSpan(number, per_frame) for number in range(seen.frames_per_stage[0]))
        return frame_spans(seen.positions, seen.sources, per_frame)

    def told(self, words: Prompt, seen: SeenPrompt, width: int) -> Told | None:
        """Positions and states of a prompt for families with positions on axes, else None; `width`: of embeddings."""
        if not self.family.on_axes:
            return None
        frame = geometry(self.checkpoint.config)
        steps = self.family.time_steps(seen.frames_per_stage[0], frame.tokens_per_second)
        place = torch.arange(len(seen.tokens), device=seen.tokens.device)
        if seen.positions is not None and seen.sources is not None:
            time = frame_times(seen.sources.to(place.device))[0]
            place = places(time, seen.positions.to(place.device), frame.tokens_per_frame)
        return told_of(words, self.spans(seen), seen.tokens, place, frame.cells, steps, width)

    def variant(self, name: str, config: EarlyTomConfig, frames: int) -> Variant:
        """One of `arguments.VARIANTS` or a published method, for videos of `frames` frames; `config` gives ratio, tau
        and merge layers."""
        if name in FIELD:
            method, config = (
                by_name(name, {"retention_ratio": config.retention_ratio}),
                OFF.replace(retention_ratio=config.retention_ratio),
            )
            about = f"{name} in PyTorch, corrected form, tower untouched"
            return Variant(name, about, config, frames, self._pixels, self._compressed(method), self.ours)
        if name == "full":
            return Variant(name, "transformers, sdpa, all tokens", OFF, frames, self._pixels, self._full, self.plain)
        if name == "naive":
            config = config.replace(schedule="adaptive")
            about = "EarlyTom as first released: attention formed in every layer, loops over frames"
            return Variant(name, about, config, frames, self._pixels, self._naive(config), self.plain)
        config = config.replace(schedule=name)
        about = f"this project in PyTorch, {name} schedule"
        return Variant(name, about, config, frames, self._pixels, self._compressed(EarlyTom(config)), self.ours)

    def engines(self, folder: Path, manifest: Manifest) -> tuple[list[Variant], list[str]]:
        """The variants of an engine folder, one for each backend that runs here, and why others are left out.

        `manifest`: from `read_engine`.
        """
        opened, missing = open_engine(folder, manifest)
        return [self._engine(manifest, backend, vision) for backend, vision in opened.items()], missing

    def _engine(self, manifest: Manifest, backend: str, vision: VisionBackend) -> Variant:
        config = manifest.settings
        # Single TensorRT engines take frames on the device; chains and ONNX Runtime copy frames themselves.
        on_device = backend.startswith("tensorrt") and not manifest.adaptive

        def see(frames: Tensor) -> SeenPrompt:
            found = encode_one(vision, frames)
            stages = getattr(vision, "frames_per_stage", manifest.frames_per_stage)
            return SeenPrompt(found.tokens.to(self.device), 0, tuple(stages), found.positions, found.sources)

        about = f"{manifest.name} in {backend}"
        name = name_of(manifest, backend)
        copy = self._to_device if on_device else torch.Tensor.contiguous
        narrow = manifest.int8 is not None
        return Variant(name, about, config, manifest.frames, copy, see, self.ours, manifest.name, narrow)

    def _to_device(self, frames: Tensor) -> Tensor:
        return frames.to(self.device)

    def _pixels(self, frames: Tensor) -> Tensor:
        """uint8 frames to normalised pixels on the device."""
        return (self._to_device(frames).float() * self._scale + self._shift).to(self.dtype)

    @torch.no_grad()
    def _full(self, pixels: Tensor) -> SeenPrompt:
        tokens, steps = self.family.own_tokens(self.model, pixels), len(pixels) // self.family.step
        return SeenPrompt(tokens, self.closings.most(len(tokens), steps), (steps,))

    def _naive(self, config: EarlyTomConfig) -> Callable[[Tensor], SeenPrompt]:
        def see(pixels: Tensor) -> SeenPrompt:
            tower, projector, _ = self.family.modules(self.inner)
            out = encode_naive(tower, projector, pixels, config, depth=self.depth, family=self.family)
            return SeenPrompt(out.tokens, 0, out.frames_per_stage)

        return see

    def _compressed(self, method: Method) -> Callable[[Tensor], SeenPrompt]:
        def see(pixels: Tensor) -> SeenPrompt:
            out = encode(self.family.vision_of(self.inner), pixels, method, depth=self.depth)
            return SeenPrompt(out.tokens, 0, out.frames_per_stage, out.positions, out.sources)

        return see

    def arithmetic(self, seen_frames: tuple[int, ...], tokens: int, config: MethodSettings) -> tuple[int, int]:
        """Flops of a request's vision part and prefill; `seen_frames` as `SeenPrompt.frames_per_stage`."""
        whole: Any = self.checkpoint.config
        vision = self.family.vision_flops(whole, seen_frames, config.merge_layers)
        return vision, flops.prefill(whole.text_config, self._length(seen_frames, tokens))

    def _length(self, seen_frames: tuple[int, ...], tokens: int) -> int:
        left = seen_frames[-1]
        return self.prompt.room(tokens + self.closings.most(tokens, left), left, seen_frames[0])


def read_engine(folder: Path, checkpoint: Checkpoint, frames: int) -> Manifest:
    """The manifest of an engine folder for `frames` frames, if it was built from this checkpoint."""
    manifest = Manifest.read(folder)
    if manifest.model.digest != checkpoint.digest():
        raise EngineError(
            f"engine {manifest.name} was built from {manifest.model.source}, with other weights than "
            f"{checkpoint.source}: give that with --model, or leave --engine out"
        )
    if frames not in manifest.counts:
        counts = " or ".join(map(str, manifest.counts))
        raise EngineError(
            f"engine {manifest.name} takes {counts} frames and {frames} are measured: use --frames {counts}, or build "
            f"one with python -m builder.build --frames {frames}"
        )
    return manifest.at(frames)


def open_engine(folder: Path, manifest: Manifest) -> tuple[dict[str, VisionBackend], list[str]]:
    """The backends that run an engine folder here, by name, and why others are left out.

    `manifest`: from `read_engine`.
    """
    found: dict[str, VisionBackend] = {}
    missing = []
    compiled = () if manifest.backend == "onnx" else (manifest.backend,)
    for backend in ("onnxruntime", *compiled):
        try:
            choose_backend(backend, manifest)
            found[backend] = open_backend(backend, folder, manifest)
        except EngineError as error:
            missing.append(f"{backend}: {error}")
    if not found:
        raise EngineError(f"engine {manifest.name} does not run here: {'; '.join(missing)}")
    return found, missing


def name_of(manifest: Manifest, backend: str) -> str:
    """An engine's name in tables, from backend, precision and ratio."""
    precision = manifest.dtype if manifest.int8 is None else f"int8 and {manifest.dtype}"
    return f"{backend} {precision} r{manifest.settings.retention_ratio:g}"


def full_tokens(checkpoint: Checkpoint, frames: int) -> int:
    """F * P, the visual tokens of the uncompressed model."""
    frame = geometry(checkpoint.config)
    if frames % frame.step:
        raise UserError(
            f"{checkpoint.family.title} takes {frame.step} pictures for a frame: --frames must be a multiple, got "
            f"{frames}"
        )
    return token_count(frames // frame.step, frame.tokens_per_frame, 1.0, merges=0)


def settings(checkpoint: Checkpoint, ratio: float, merge_layers: tuple[int, ...] | None, tau: float) -> EarlyTomConfig:
    """EarlyTom's settings for a checkpoint; None: its default merge layers."""
    frame = geometry(checkpoint.config)
    layers = EarlyTomConfig.layers_for(frame.depth, frame.full) if merge_layers is None else merge_layers
    config = method(ratio, layers, tau)
    config.check_layers(frame.depth)
    check_watched(EarlyTom(config).watched(frame.depth), frame.full)
    return config
