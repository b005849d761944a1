"""The gate's last step: does the decoder say the same after the engine's tokens as after the reference's?

The reference's greedy answer is written first; then both sets of visual tokens are put before that same answer and the
most likely next token is compared at every place. Free-running texts would not do: one near-tie flips a token, and
everything after it differs for no fault of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


class NextTokens:
    """Compares two sets of visual tokens through the decoder of a checkpoint (fp32, on the CPU)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = load_model(checkpoint, torch.float32)
        self.newline = checkpoint.family.closing(model.model)
        self.embed = model.get_input_embeddings()
        self.language_model = model.model.language_model
        self.head = model.lm_head
        self.decoder = Decoder.from_model(model)
        self.prompt = build_prompt(load_tokenizer(checkpoint), QUESTION)

    def __call__(self, engine: Tensor, reference: Tensor) -> float:
        """Share of places at which the most likely next token agrees, both [N, E] fp32."""
        answer = torch.tensor(
            list(self.decoder.stream(self._prompt(reference), max_new_tokens=ANSWER_TOKENS, stop_ids=())),
            dtype=torch.long,
        )
        mine, theirs = (self._following(tokens, answer) for tokens in (engine, reference))
        return float((mine == theirs).float().mean())

    def _prompt(self, tokens: Tensor) -> Tensor:
        """[1, L, E] embeddings of the prompt around the visual tokens."""
        with torch.no_grad():
            return splice(self.prompt, tokens, self.newline, self.embed)

    def _following(self, tokens: Tensor, answer: Tensor) -> Tensor:
        """[len(answer)]: the most likely token at each place of the answer."""
        with torch.no_grad():
            embeds = torch.cat([self._prompt(tokens), self.embed(answer[:-1])[None]], dim=1)
            hidden = self.language_model(inputs_embeds=embeds).last_hidden_state[0, -len(answer) :]
            return self.head(hidden).argmax(-1)
