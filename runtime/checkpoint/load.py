"""Loads a checkpoint's vision tower and projector, its decoder, or the whole model; only those tensors are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from earlytom.families import VisionModules, family_of
from earlytom.micro.weights import random_state, random_tensor
from runtime.checkpoint.describe import MICRO, RANDOM_SEED, Checkpoint, Source, describe
from runtime.checkpoint.files import Files, first_line, out_of_memory, some
from runtime.checkpoint.generation import generation_config
from runtime.checkpoint.narrow import DTYPE, narrow, narrowed, scale_of
from runtime.checkpoint.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VisionPart(nn.Module):
    """Vision tower and projector, which become the engine, and the closing token, which the runtime appends.

    Attributes:
        vision_tower, projector, closing: as in `earlytom.families.VisionModules`.
    """

    closing: nn.Parameter | None

    def __init__(self, modules: VisionModules) -> None:
        super().__init__()
        self.vision_tower = modules.vision_tower
        self.projector = modules.projector
        self.register_parameter("closing", modules.closing)

    @classmethod
    def from_model(cls, model: Any) -> VisionPart:
        """The `VisionPart` of a loaded model; modules are shared, nothing is copied."""
        return cls(family_of(model.config).modules(model.model))


def load_vision(source: Source = None, dtype: torch.dtype = torch.float32) -> VisionPart:
    """Vision tower, projector and closing token of `source` in `dtype`, on the CPU, in eval mode, without gradients.

    Raises `UserError` as `describe` does, and for tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    checkpoint = describe(source)
    family, shapes = checkpoint.family, checkpoint.vision_shapes
    if checkpoint.files is None:
        state = random_state(shapes, dtype, seed=RANDOM_SEED, family=family)
    else:
        state = {}
        with checkpoint.files.in_memory():
            for name, tensor in checkpoint.weights.tensors(shapes, family.vision_names):
                state[name] = tensor.to(dtype, copy=True)  # or it would be the file, which may change
                check_finite(name, state[name], checkpoint.files)
    with torch.device("meta"):
        part = VisionPart(family.new_modules(checkpoint.config))
    part.load_state_dict({family.module_name(name): tensor for name, tensor in state.items()}, assign=True)
    family.restore_buffers(part.vision_tower)
    return part.eval().requires_grad_(False)


def load_decoder(source: Source = None, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> Any:
    """The model of `source` without vision tower and projector, in `dtype`, on the CPU, in eval mode, no gradients.

    It has the language model, its head, the closing token, and the stop tokens in `generation_config`. Only those
    tensors are read, and each exists once. Equal to the same parts of `load_model`; errors as there. With `int8` it is
    in bf16 with int8 weights (`runtime.checkpoint.narrow`), quantised one tensor at a time.
    """
    checkpoint = describe(source)
    if checkpoint.files is None:
        return _decoder_of(checkpoint, dtype, int8)
    with checkpoint.files.in_memory():
        return _decoder_of(checkpoint, dtype, int8)


def _decoder_of(checkpoint: Checkpoint, dtype: torch.dtype, int8: bool) -> Any:
    files, family = checkpoint.files, checkpoint.family
    closing = () if family.closing_name is None else (family.closing_name,)
    wanted = checkpoint.decoder_shapes | {name: checkpoint.shapes[name] for name in closing}
    model = _empty_decoder(checkpoint)
    if int8:
        narrow(model)
        dtype = DTYPE
    scales = scale_of(model)
    names = {family.canonical_name(name): name for name, _ in model.named_parameters()}
    state: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if name in scales:
            state[name], state[scales[name]] = narrowed(tensor)
        else:
            state[name] = tensor.to(dtype, copy=files is not None)  # or it would be the file, which may change

    if files is None:
        widest_first = sorted(wanted.items(), key=lambda one: -math.prod(one[1]))  # lowers peak memory
        for name, shape in widest_first:
            keep(names[name], random_tensor(name, shape, dtype, seed=RANDOM_SEED, family=family))
    else:
        checkpoint.check_weights()
        for name, tensor in checkpoint.weights.by_file(wanted, (*family.decoder_names, *closing)):
            keep(names[name], tensor)
            check_finite(name, tensor if names[name] in scales else state[names[name]], files)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    inner: Any = model.get_decoder()
    inner.rotary_emb = rotary = type(inner.rotary_emb)(config=inner.config)  # its buffers are in no checkpoint
    if getattr(rotary, "rope_type", None) == "dynamic":
        # Dynamic RoPE changes only beyond the model's context, which no prompt exceeds here. Its check at every step
        # would wait for the device.
        rotary.rope_type = "default"
    missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not missing, missing
    return model.eval().requires_grad_(False)


def load_model(source: Source = None, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model of `source` in `dtype`, on the CPU, in eval mode, each weight created once.

    Raises `UserError` as `load_vision` does, for the decoder's tensors too.
    """
    from safetensors import SafetensorError

    from earlytom.micro.progress import without_progress_bars
    from earlytom.micro.random_model import random_model

    checkpoint = describe(source)
    files = checkpoint.files
    if files is None:
        return random_model(checkpoint.config, dtype, seed=RANDOM_SEED)
    for shard in checkpoint.weights.shards:
        files.path(shard)  # fetches it from the hub
    checkpoint.check_weights()  # clearer messages than the library's
    if not checkpoint.family.known_names:
        return _renamed(checkpoint, files, dtype)
    try:
        with without_progress_bars():
            loaded: Any = checkpoint.family.transformers_class().from_pretrained(
                files.folder(["config.json", "generation_config.json"]),
                config=checkpoint.config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, MemoryError) as error:
        if out_of_memory(error):
            raise files.no_memory() from error
        raise files.error(f"its weights cannot be loaded ({first_line(error)}); download it again") from error
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, report[f"{kind}_keys"])):
            raise files.error(f"{kind} tensors in the weights: {some(names)}; the checkpoint is not complete")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach(), files)
    return model.eval()


def _renamed(checkpoint: Checkpoint, files: Files, dtype: torch.dtype) -> Any:
    """The whole model of a checkpoint whose tensor names transformers does not know."""
    from earlytom.micro.progress import without_progress_bars

    family = checkpoint.family
    with torch.device("meta"):
        names = {family.canonical_name(raw): raw for raw, _ in family.new_model(checkpoint.config).named_parameters()}
    state: dict[str, Tensor] = {}
    with files.in_memory():
        for name, tensor in checkpoint.weights.by_file(checkpoint.shapes, ("",)):
            state[names[name]] = tensor.to(dtype, copy=True)  # or it would be the file, which may change
            check_finite(name, state[names[name]], files)
    with without_progress_bars():
        model = family.transformers_class().from_pretrained(
            None, config=checkpoint.config, state_dict=state, dtype=dtype
        )
    model.generation_config = generation_config(files, checkpoint.config)
    return model.eval()


def load_tokenizer(source: Source = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with the chat template that its processor would use.

    "random:NAME" gets the bundled tokenizer, its special tokens moved to the ids of the published one. Raises
    `UserError` if files are missing or broken, or if tokenizer and configuration disagree about the visual token's id.
    """
    from earlytom.micro.random_model import published_tokenizer

    checkpoint = describe(source)
    if checkpoint.files is None:
        return published_tokenizer(load_tokenizer(MICRO), checkpoint.config)
    return read_tokenizer(checkpoint.files, checkpoint.config)


def _empty_decoder(checkpoint: Checkpoint) -> Any:
    """The model without vision tower and projector, on the meta device."""
    from earlytom.micro.random_model import greedy

    family = checkpoint.family
    with torch.device("meta"):
        model = family.new_model(checkpoint.config)
    family.drop_vision(model)
    model.tie_weights()
    files = checkpoint.files
    model.generation_config = (
        greedy(checkpoint.config) if files is None else generation_config(files, checkpoint.config)
    )
    return model


def check_finite(name: str, tensor: Tensor, files: Files) -> None:
    """Raise `UserError` for NaN or infinity, in one pass without a copy: a NaN makes both extremes NaN."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise files.error(
            f"{name} holds NaN or infinity in {tensor.dtype}; the file is damaged (download it again), or its values "
            "need a wider type (--bf16 or --fp32)"
        )
