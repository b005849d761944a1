"""Opens the vLLM decoder that `--decoder` names, with the checkpoint's closing token and generation settings.

Only the embeddings and the closing token are read from the weights; vLLM loads the layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.checkpoint.describe import Checkpoint
from runtime.checkpoint.language_model import load_embeddings, write_language_model
from runtime.decoder.naming import address_of, folder_of
from runtime.decoder.vllm.prompts import VllmDecoder
from runtime.decoder.vllm.remote import RemoteDecoder

if TYPE_CHECKING:
    from transformers import GenerationConfig


class OpenedDecoder(NamedTuple):
    """A decoder, the closing token [D] (None if there is none), and the generation settings."""

    decoder: VllmDecoder
    closing: Tensor | None
    generation: GenerationConfig


def open_decoder(
    name: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, key: str | None = None
) -> OpenedDecoder:
    """Open the decoder `name`.

    Args:
        name: "vllm", "vllm:FOLDER" or an address, see `runtime.decoder.naming`.
        checkpoint: of the language model.
        device, dtype: of embeddings; vLLM in this process also computes in that dtype.
        key: the server's API key.

    Raises:
        UserError: no such folder, vLLM is not installed, or the checkpoint cannot be read.
        DecoderFailed: vLLM does not start, or the address is no suitable vLLM server or cannot be reached.
    """
    found = load_embeddings(checkpoint, dtype)
    values = found.values.to(device)
    closing = None if found.closing is None else found.closing.to(device)
    context = checkpoint.config.text_config.max_position_embeddings
    address = address_of(name)
    if address is not None:
        decoder: VllmDecoder = RemoteDecoder(address, values, context, key=key)
        return OpenedDecoder(decoder, closing, found.generation)
    from runtime.decoder.vllm.inside import InsideDecoder

    with _folder(folder_of(name) or "", checkpoint, dtype) as folder:
        return OpenedDecoder(InsideDecoder(folder, values, context), closing, found.generation)


@contextmanager
def _folder(named: str, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Path]:
    """A folder for vLLM to load: the named one, else a temporary one with the checkpoint's language model."""
    if named:
        if not (Path(named) / "config.json").is_file():
            raise UserError(
                f"--decoder vllm:{named}: there is no language model; write one with python -m runtime.extract_decoder"
            )
        yield Path(named)
        return
    with tempfile.TemporaryDirectory(prefix="earlytom-") as made:
        write_language_model(checkpoint, Path(made), dtype)
        yield Path(made)
