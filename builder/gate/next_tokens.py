"""The gate's last step: does the decoder predict the same with the engine's tokens as with the reference's?

The reference's greedy answer is generated first; then the most likely next token at each of its positions is computed
for both sets of visual tokens (teacher forcing). Free-running answers cannot be compared: one near-tie flips a token,
and everything after it differs through no fault of the engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlytom.standing import frame_spans, frame_times, places
from runtime.checkpoint import Checkpoint, load_model, load_tokenizer
from runtime.decoder.eager import Decoder
from runtime.decoder.states import adding
from runtime.text.axes import Told, following, told_of
from runtime.text.prompt import build_prompt, splice

QUESTION = "What happens in the video?"
ANSWER_TOKENS = 24
# By default the gate loads decoders of up to this many parameters (2 GB in fp32).
SMALL_DECODER = 600_000_000


def decoder_parameters(text: Any) -> int:
    """Matrix parameters of a Qwen2-like text config, embeddings and head included, norms and biases left out."""
    width, keys = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * width * width + 2 * width * keys + 3 * width * text.intermediate_size
    tables = 1 if text.tie_word_embeddings else 2
    return text.num_hidden_layers * layer + tables * text.vocab_size * width


class SeenTokens(NamedTuple):
    """A video's visual tokens [N, E] fp32, with positions and sources as in `runtime.vision.Encoded`."""

    tokens: Tensor
    positions: Tensor
    sources: Tensor


class ToldPrompt(NamedTuple):
    """A prompt: embeddings [1, L, E], and where the family needs them, position ids and states."""

    embeds: Tensor
    told: Told | None = None


class NextTokens:
    """Compares two sets of visual tokens through the decoder of a checkpoint (fp32, on the CPU)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = load_model(checkpoint, torch.float32)
        self.family = checkpoint.family
        self.frame = self.family.geometry(checkpoint.config)
        self.closing = self.family.closing(model.model)
        self.embed = model.get_input_embeddings()
        self.language_model = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.decoder = Decoder.from_model(model)
        self.prompt = build_prompt(load_tokenizer(checkpoint), QUESTION, family=self.family)

    def __call__(self, engine: SeenTokens, reference: SeenTokens) -> float:
        """Share of the answer's positions at which the most likely next token agrees."""
        mine, theirs = self._prompt(engine), self._prompt(reference)
        told: dict[str, Any] = {} if theirs.told is None else dict(theirs.told.how)
        stream = self.decoder.stream(theirs.embeds, max_new_tokens=ANSWER_TOKENS, stop_ids=(), **told)
        answer = torch.tensor(list(stream), dtype=torch.long)
        return float((self._following(mine, answer) == self._following(theirs, answer)).float().mean())

    def _prompt(self, seen: SeenTokens) -> ToldPrompt:
        """The prompt around the visual tokens."""
        per_frame = self.frame.tokens_per_frame
        spans = None if self.prompt.names is None else frame_spans(seen.positions, seen.sources, per_frame)
        with torch.no_grad():
            closings = self.family.closings(self.frame.cells)
            visual = closings.closed(seen.tokens, seen.positions, self.closing)
            embeds = splice(self.prompt, visual, self.embed, spans)
        if not self.family.on_axes:
            return ToldPrompt(embeds)
        place = places(frame_times(seen.sources)[0], seen.positions, per_frame)
        steps = self.family.time_steps(seen.sources.shape[1], self.frame.tokens_per_second)
        told = told_of(self.prompt, spans, seen.tokens, place, self.frame.cells, steps, embeds.shape[2])
        return ToldPrompt(embeds, told)

    def _following(self, prompt: ToldPrompt, answer: Tensor) -> Tensor:
        """[len(answer)]: the most likely token at each position of the answer."""
        more, states = len(answer) - 1, None
        how: dict[str, Tensor] = {}
        if prompt.told is not None:
            behind = following(prompt.told.end, more, answer.device)
            how["position_ids"] = torch.cat([prompt.told.how["positions"], behind], dim=1)[:, None]
            if (states := prompt.told.how.get("states")) is not None:
                states = torch.nn.functional.pad(states, (0, 0, 0, more))
        with torch.no_grad(), adding(self.language_model, states, slice(None)):
            embeds = torch.cat([prompt.embeds, self.embed(answer[:-1])[None]], dim=1)
            hidden = self.language_model(inputs_embeds=embeds, **how).last_hidden_state[0, -len(answer) :]
            return self.head(hidden).argmax(-1)
