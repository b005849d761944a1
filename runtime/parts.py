"""Loads the parts of a `Pipeline`: the engine, the decoder of its model, and the placing of visual tokens.

    parts = load_parts(WantedParts.checked("engines/...", decoder="torch"))

Arguments are checked before anything is loaded, and all that can be refused without the weights before they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import family_named
from earlytom.numbers import real, shown, whole
from runtime.checkpoint import Checkpoint, Source, load_decoder, load_tokenizer
from runtime.checkpoint.narrow import DTYPE as NARROW
from runtime.checkpoint.narrow import check_narrow
from runtime.checkpoint.precision import fitting_dtype
from runtime.choices import BACKENDS, POSITIONS
from runtime.decoder.checks import refuse_bias
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.naming import FORMS, INSIDE, PLACES, by_vllm, decoder_named
from runtime.decoder.protocol import TextDecoder
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import Manifest
from runtime.engine.origin import checkpoint_of
from runtime.options import device_of, dtype_of, engine_folder, instance, model_source
from runtime.text.places import Placing
from runtime.text.prompt import build_prompt, stop_token_ids
from runtime.vision import VisionBackend, choose_backend, open_backend

if TYPE_CHECKING:
    from runtime.decoder.compiler import Compiler

DECODER_FOLDER = "decoder"  # in the engine's folder: compiled programs of the decoder


@dataclass(frozen=True)
class WantedParts:
    """The arguments of `Pipeline.load`, checked."""

    engine: Path
    model: Source
    backend: str
    device: torch.device
    dtype: torch.dtype | None
    decoder: str
    inner: InnerMerge | None
    bias: bool | None
    positions: str | None
    key: str | None
    narrow: bool  # the decoder's weights are int8

    @classmethod
    def checked(
        cls,
        engine: str | Path,
        model: Source = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        decoder: str = "torch",
        inner: InnerMerge | None = None,
        bias: bool | None = None,
        positions: str | None = None,
        decoder_key: str | None = None,
        decoder_dtype: str | None = None,
    ) -> WantedParts:
        """Raises UserError or EngineError for an invalid argument."""
        found = cls(
            engine_folder(engine),
            model_source(model),
            instance("backend", backend, str, f"one of {', '.join(BACKENDS)}"),
            device_of(device),
            dtype_of(dtype),
            instance("decoder", decoder, str, f"one of {FORMS}"),
            inner,
            bias,
            positions,
            decoder_key,
            decoder_dtype is not None,
        )
        decoder_named(decoder)
        check_narrow(decoder_dtype, decoder, found.device, found.dtype)
        if inner is not None:
            instance("inner", inner, InnerMerge, "InnerMerge(layer, ratio)")
            whole("inner layer (--inner-layer)", inner.layer, 1)
            real("inner ratio (--inner-ratio)", inner.ratio, 0, 1, high_open=True)
        if bias is not None:
            instance("bias", bias, bool, "True or False")
        if positions is not None and positions not in POSITIONS:
            raise UserError(f"positions must be {' or '.join(POSITIONS)}, got {shown(positions)} (--positions)")
        if inner is not None and decoder != "torch":
            raise UserError(f"inner merging runs in the PyTorch decoder, not in {decoder}: use --decoder torch")
        if decoder_key is not None and (not by_vllm(decoder) or decoder.startswith(INSIDE)):
            raise UserError("decoder_key (--decoder-key-file) is what a vLLM server asks for: give its address")
        return found


class TextParts(NamedTuple):
    """A decoder, the closing token's embedding ([E] or None), the tokenizer, and the ids that end an answer."""

    decoder: TextDecoder
    closing: Tensor | None
    tokenizer: Any
    stops: Any


class PipelineParts(NamedTuple):
    """The loaded parts; `notes` as in `Pipeline`."""

    manifest: Manifest
    vision: VisionBackend
    text: TextParts
    placing: Placing
    notes: tuple[str, ...]


def load_parts(wanted: WantedParts) -> PipelineParts:
    """Load the parts, which the caller must close; errors as `Pipeline.load`."""
    folder, device, decoder = wanted.engine, wanted.device, wanted.decoder
    compiler = _compiler(decoder, device)  # first: it must be imported before TensorRT, and may refuse
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no GPU that torch {torch.__version__} can use for --device {device}: use --device cpu")
    manifest = Manifest.read(folder)
    choice = choose_backend(wanted.backend, manifest)
    checkpoint = checkpoint_of(manifest, wanted.model)
    dtype, note = wanted.dtype or DTYPES[manifest.dtype], None
    if wanted.narrow:
        dtype = NARROW
    elif wanted.dtype is None and device.type == "cpu":
        dtype, note = fitting_dtype(checkpoint)
    placing = placing_of(manifest, checkpoint, wanted.bias, wanted.positions)
    if by_vllm(decoder) and (placing.original or placing.bias):
        raise UserError(f"{decoder}: {PLACES}")
    if (family := checkpoint.family).on_axes and (decoder != "torch" or wanted.inner is not None):
        what = f"--decoder {decoder}" if decoder != "torch" else "--inner-layer"
        raise UserError(
            f"{family.title}'s language model takes positions by time, row and column and states of layers, which "
            f"{what} does not know: use --decoder torch, without --inner-layer"
        )
    if wanted.inner is not None and placing.bias:
        raise UserError(
            "tokens that are merged inside the decoder have no bias: leave out --inner-layer, or use --no-bias"
        )
    vision = _vision(folder, manifest, choice, checkpoint, device, dtype)
    try:
        if by_vllm(decoder):
            text = _by_vllm(decoder, checkpoint, device, dtype, wanted.key)
        else:
            make = functools.partial(_decoder, compiler, folder, manifest, device, wanted.inner, placing)
            text = _loaded(checkpoint, device, dtype, wanted.narrow, make)
    except BaseException:
        vision.close()
        raise
    notes = tuple(line for line in (checkpoint.generation_note, note) if line is not None)
    return PipelineParts(manifest, vision, text, placing, notes)


def placing_of(manifest: Manifest, checkpoint: Checkpoint, bias: bool | None, positions: str | None) -> Placing:
    """The placing of an engine's visual tokens; for None the default of its method."""
    settings = manifest.settings
    original = settings.original_positions if positions is None else positions == POSITIONS[0]
    most = manifest.closings.span(checkpoint.frames)
    per_second = checkpoint.family.geometry(checkpoint.config).tokens_per_second
    return Placing(original, settings.bias if bias is None else bias, most, per_second)


def _vision(
    folder: Path, manifest: Manifest, backend: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> VisionBackend:
    if backend != "torch":
        return open_backend(backend, folder, manifest)
    from runtime.vision.torch import open_torch

    return open_torch(checkpoint, manifest, device=device, dtype=dtype)


def _compiler(decoder: str, device: torch.device) -> Compiler | None:
    """The compiler of a decoder; None for one that is not compiled."""
    if decoder != "torch-tensorrt":
        return None
    from runtime.decoder.compiler import TorchTensorRT

    return TorchTensorRT(device)


def _decoder(
    compiler: Compiler | None,
    folder: Path,
    manifest: Manifest,
    device: torch.device,
    inner: InnerMerge | None,
    placing: Placing,
    model: Any,
    tokenizer: Any,
) -> Decoder:
    """The decoder of a model, with its layers moved to the device or compiled into programs there."""
    if placing.bias:
        refuse_bias(model.get_decoder().config)  # here, not at every question
    if compiler is None:
        torch.nn.Module.to(model, device)
        return Decoder.from_model(model, inner=inner)
    from runtime.decoder.compiled import CompiledDecoder, default_size
    from runtime.decoder.store import ProgramStore

    words = build_prompt(tokenizer, "?", family=family_named(manifest.model.family))
    visual = manifest.tokens + manifest.closings.most(manifest.tokens, manifest.frames_per_stage[-1])
    video = words.room(visual, manifest.frames_per_stage[-1], manifest.layout.steps) - words.room(0, 1, 1)
    size = default_size(video, model.get_decoder().config.max_position_embeddings)
    store, placed = ProgramStore(folder / DECODER_FOLDER), placing.original or placing.bias
    return CompiledDecoder.compile(model, compiler, store, [size], placed=placed)


def _by_vllm(name: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, key: str | None) -> TextParts:
    """A vLLM decoder; of its weights only the embeddings are loaded here."""
    from runtime.decoder.vllm import open_decoder

    tokenizer = load_tokenizer(checkpoint)
    opened = open_decoder(name, checkpoint, device, dtype, key)
    return TextParts(opened.decoder, opened.closing, tokenizer, stop_token_ids(opened.generation, tokenizer))


def _loaded(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    narrow: bool,
    make: Callable[[Any, Any], Decoder],
) -> TextParts:
    """A decoder in this process. The checkpoint's own vision tower is not loaded."""
    tokenizer = load_tokenizer(checkpoint)
    model: Any = load_decoder(checkpoint, dtype, int8=narrow)
    stops = stop_token_ids(model.generation_config, tokenizer)
    closing = checkpoint.family.closing(model.model)
    made = make(model, tokenizer)
    return TextParts(made, None if closing is None else closing.detach().to(device), tokenizer, stops)
