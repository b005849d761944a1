"""What a build looks at before it starts, though only asking needs it: an engine that nobody can ask is no use."""

from __future__ import annotations

from earlytom.errors import UserError
from runtime.checkpoint import Checkpoint, load_tokenizer
from runtime.text.prompt import build_prompt

QUESTION = "?"  # that a template is tried with


def check_answers(checkpoint: Checkpoint) -> None:
    """Refuse now what would only show when the engine is asked: an unusable decoder, tokenizer or template."""
    checkpoint.check_weights()
    tokenizer = load_tokenizer(checkpoint)
    try:
        build_prompt(tokenizer, QUESTION, family=checkpoint.family)
    except UserError as error:
        raise UserError(f"--model {checkpoint.source}: {error}") from error
