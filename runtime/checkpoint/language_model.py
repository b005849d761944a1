"""The language model of a checkpoint alone: its embeddings, or all of it in a folder for other servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.micro.weights import random_tensor
from runtime.checkpoint.describe import RANDOM_SEED, Checkpoint
from runtime.checkpoint.generation import generation_config
from runtime.checkpoint.load import check_finite, load_decoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

SHARD_BYTES = 4 << 30


class Embeddings(NamedTuple):
    """The tensors and settings to make prompts of text and visual tokens.

    Attributes:
        values: [V, D], the embedding of each token id.
        closing: [D], the closing token; None if there is none.
        generation: the stop tokens.
    """

    values: Tensor
    closing: Tensor | None
    generation: GenerationConfig


class Written(NamedTuple):
    """The result of `write_language_model`.

    Attributes:
        architecture: its transformers class.
        parameters: number of parameters; tied ones count once.
        tied: whether the output layer shares the embeddings' weights, which are stored once.
        files: names of the files.
    """

    architecture: str
    parameters: int
    tied: bool
    files: tuple[str, ...]


def load_embeddings(checkpoint: Checkpoint, dtype: torch.dtype) -> Embeddings:
    """Load the embeddings to the CPU in `dtype`, without reading other weights. Errors as `load_decoder`."""
    from earlytom.micro.random_model import greedy

    family, files = checkpoint.family, checkpoint.files
    names = [family.embeddings_name, *([] if family.closing_name is None else [family.closing_name])]
    shapes = {name: checkpoint.shapes[name] for name in names}
    if files is None:
        found = {
            name: random_tensor(name, shape, dtype, seed=RANDOM_SEED, family=family) for name, shape in shapes.items()
        }
        generation = greedy(checkpoint.config)
    else:
        found = {}
        with files.in_memory():
            for name, tensor in checkpoint.weights.by_file(shapes, tuple(names)):
                found[name] = tensor.to(dtype, copy=True)
                check_finite(name, found[name], files)
        generation = generation_config(files, checkpoint.config)
    return Embeddings(found[names[0]], found[names[1]] if len(names) > 1 else None, generation)


def write_language_model(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> Written:
    """Write config.json, weights (safetensors, in shards), tokenizer and generation_config.json into an empty folder.

    Values are the checkpoint's, exactly so if `dtype` is the stored one. Embeddings are included, as the server embeds
    the tokens it generates; vision tower, projector and closing token are not.

    Raises:
        UserError: as `runtime.checkpoint.load_decoder`; a language model that takes more inputs than embeddings.
        OSError: the folder cannot be written.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if (family := checkpoint.family).on_axes:
        raise UserError(
            f"the language model of {family.title} takes positions by time, row and column and states of layers, which "
            "no server takes beside embeddings: ask with python -m runtime.ask or serve with --decoder torch"
        )
    from earlytom.micro.progress import without_progress_bars

    loaded = load_decoder(checkpoint, dtype)
    config: Any = checkpoint.config.text_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    model.config.tie_word_embeddings = tied
    state = {f"{model.base_model_prefix}.{name}": value for name, value in loaded.get_decoder().state_dict().items()}
    if not tied:
        state["lm_head.weight"] = loaded.get_output_embeddings().weight
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    assert not missing, missing
    model.generation_config = GenerationConfig(eos_token_id=loaded.generation_config.eos_token_id)
    with without_progress_bars():
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    load_tokenizer(checkpoint).save_pretrained(folder)
    for file in folder.iterdir():  # safetensors makes files readable by their owner only; a server has another user
        file.chmod((folder / "config.json").stat().st_mode)
    count = sum(value.numel() for value in model.parameters())
    return Written(type(model).__name__, count, tied, tuple(sorted(file.name for file in folder.iterdir())))
