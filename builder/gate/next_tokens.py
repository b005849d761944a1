"""The gate's last step: does the decoder say the same after the engine's tokens as after the reference's?

The reference's greedy answer is written first; then both sets of visual tokens are put before that same answer and the
most likely next token is compared at every place. Free-running texts would not do: one near-tie flips a token, and
everything after it differs for no fault of the engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlytom.standing import frame_spans
from runtime.checkpoint import Checkpoint, load_model, load_tokenizer
from runtime.decoder.eager import Decoder
from runtime.text.prompt import build_prompt, splice

QUESTION = "What happens in the video?"
ANSWER_TOKENS = 24
# Decoders up to this many parameters are loaded for the gate without being asked to (2 GB in fp32).
SMALL_DECODER = 600_000_000


def decoder_parameters(text: Any) -> int:
    """Weights of the matrices of a Qwen2-like text config, embeddings and head included (norms and biases are few)."""
    width, keys = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * width * width + 2 * width * keys + 3 * width * text.intermediate_size
    tables = 1 if text.tie_word_embeddings else 2
    return text.num_hidden_layers * layer + tables * text.vocab_size * width


class SeenTokens(NamedTuple):
    """A video's visual tokens [N, E] fp32, and where they come from as in `runtime.vision.Encoded`."""

    tokens: Tensor
    positions: Tensor
    sources: Tensor


class NextTokens:
    """Compares two sets of visual tokens through the decoder of a checkpoint (fp32, on the CPU)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = load_model(checkpoint, torch.float32)
        self.family = checkpoint.family
        self.per_frame = self.family.geometry(checkpoint.config).tokens_per_frame
        self.closing = self.family.closing(model.model)
        self.embed = model.get_input_embeddings()
        self.language_model = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.decoder = Decoder.from_model(model)
        self.prompt = build_prompt(load_tokenizer(checkpoint), QUESTION, family=self.family)

    def __call__(self, engine: SeenTokens, reference: SeenTokens) -> float:
        """Share of places at which the most likely next token agrees."""
        mine, theirs = self._prompt(engine), self._prompt(reference)
        answer = torch.tensor(
            list(self.decoder.stream(theirs, max_new_tokens=ANSWER_TOKENS, stop_ids=())), dtype=torch.long
        )
        return float((self._following(mine, answer) == self._following(theirs, answer)).float().mean())

    def _prompt(self, seen: SeenTokens) -> Tensor:
        """[1, L, E] embeddings of the prompt around the visual tokens."""
        named = self.prompt.names is not None
        spans = frame_spans(seen.positions, seen.sources, self.per_frame) if named else None
        with torch.no_grad():
            return splice(self.prompt, seen.tokens, self.closing, self.embed, spans)

    def _following(self, prompt: Tensor, answer: Tensor) -> Tensor:
        """[len(answer)]: the most likely token at each place of the answer."""
        with torch.no_grad():
            embeds = torch.cat([prompt, self.embed(answer[:-1])[None]], dim=1)
            hidden = self.language_model(inputs_embeds=embeds).last_hidden_state[0, -len(answer) :]
            return self.head(hidden).argmax(-1)
