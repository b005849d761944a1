"""Finds the checkpoint behind an engine and checks that it is the model the engine was built from.

An engine holds the vision part only; decoder, tokenizer and templates come from the checkpoint at load time. Answers
are the model's own only if both are of one model, so both are compared with the digests that the builder recorded.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checkpoint import Checkpoint, Source, describe
from runtime.checkpoint.hub import at_commit, is_hub_id
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError


def checkpoint_of(manifest: Manifest, model: Source = None) -> Checkpoint:
    """The checkpoint whose decoder answers with an engine.

    Args:
        model: where the checkpoint is; None for where it was when the engine was built.

    Raises:
        EngineError: it is not there any more, or is another model.
        UserError: it cannot be read.
    """
    record, checkpoint = manifest.model, describe(source_of(manifest, model))
    if checkpoint.family.any_size:
        checkpoint = checkpoint.sized(record.preprocessing.size)
    remedy = (
        f"give the model it was built from with --model, or build an engine for this one with python -m builder.build "
        f"--model {checkpoint.source}"
    )
    if (digest := checkpoint.digest()) != record.digest:
        raise EngineError(
            f"engine {manifest.name} was built from {record.source} (weights {record.digest[:12]}), and "
            f"{checkpoint.source} has weights {digest[:12]}: {remedy}"
        )
    if record.answers is not None and checkpoint.answers_digest() != record.answers:
        raise EngineError(
            f"engine {manifest.name} was built from {record.source}, and {checkpoint.source} has another decoder, "
            f"tokenizer, chat template or generation_config.json (the vision part is the same): {remedy}"
        )
    return checkpoint


def source_of(manifest: Manifest, model: Source = None) -> Source:
    """Where the checkpoint is: `model`, by default the recorded source; a hub repository at the recorded commit.

    Raises EngineError if the recorded folder is gone.
    """
    record = manifest.model
    if model is None and Path(record.source).is_absolute() and not Path(record.source).is_dir():
        raise EngineError(
            f"engine {manifest.name} was built from {record.source}, which is not there any more: give the place of "
            "that checkpoint with --model"
        )
    on_hub = is_hub_id(record.source) and not Path(record.source).is_dir()
    if record.commit is not None and model in (None, record.source) and on_hub:
        return at_commit(record.source, record.commit)  # the branch may have moved since
    return record.source if model is None else model
