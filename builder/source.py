"""Checks before a build of what only asking needs: decoder, tokenizer and chat template."""

from __future__ import annotations

from earlytom.errors import UserError
from runtime.checkpoint import Checkpoint, load_tokenizer
from runtime.text.prompt import build_prompt

QUESTION = "?"  # to try the template with


def check_answers(checkpoint: Checkpoint) -> None:
    """Raise UserError for an unusable decoder, tokenizer or template, which otherwise shows only when asking."""
    checkpoint.check_weights()
    tokenizer = load_tokenizer(checkpoint)
    try:
        build_prompt(tokenizer, QUESTION, family=checkpoint.family)
    except UserError as error:
        raise UserError(f"--model {checkpoint.source}: {error}") from error
