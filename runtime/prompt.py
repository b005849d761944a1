"""The text around a video: chat template, tokens before and after it, and where the visual tokens go.

A prompt is built as transformers' LLaVA-OneVision processor builds it for one video and one text: the checkpoint's
chat template renders a user message with a video and the question; the video placeholder in it stands for n visual
tokens. The processor repeats the placeholder n times before it tokenizes. The placeholder is a special token, which
splits the text, so the tokens before and after it are the same for every n: they are computed once here, and n is
chosen later. Hence `Prompt.input_ids(n)` equals the processor's `input_ids` for n visual tokens, and `splice` gives
the embeddings that the model makes of them. n counts the closing `image_newline`, as the processor does.

Knows the tokenizer and tensors; nothing about engines, frames or decoding.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.transfers import to_device
from runtime.checkpoint_files import first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class Prompt:
    """The token ids before and after the visual tokens, and the id of the video placeholder between them."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    video_token_id: int

    def input_ids(self, visual_tokens: int) -> Tensor:
        """[1, L] int64: the placeholder repeated `visual_tokens` times in the prompt, as `model.generate` takes it."""
        ids = (*self.prefix_ids, *(self.video_token_id,) * visual_tokens, *self.suffix_ids)
        return torch.tensor([ids], dtype=torch.int64)

    def visual_span(self, visual_tokens: int) -> range:
        """Where the visual tokens are in the prompt."""
        return range(len(self.prefix_ids), len(self.prefix_ids) + visual_tokens)

    def length(self, visual_tokens: int) -> int:
        """Number of tokens that the decoder sees."""
        return len(self.prefix_ids) + visual_tokens + len(self.suffix_ids)


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None, video_token: str = VIDEO_TOKEN
) -> Prompt:
    """The prompt that asks `question` about one video, with an optional `system` message before it.

    The texts are used as they are, not stripped. Raises `UserError` if the question is empty, if a text is no str, is
    not valid Unicode or contains one of the tokenizer's control tokens (`<video>`, `<|im_end|>`, ...), which would be
    taken for the token itself and change the prompt's structure, or if the chat template does not place exactly one
    video.
    """
    for what, given in (("question", question), ("system message", "" if system is None else system)):
        if not isinstance(given, str):
            raise UserError(f"the {what} is a {type(given).__name__}, not a text: give a str")
    if not question.strip():
        raise UserError("the question is empty; expected a text, as in: python -m runtime.ask VIDEO 'What happens?'")
    _refuse_unusable(tokenizer, question, "question")
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    messages: list[dict[str, Any]] = [user]
    if system is not None:
        _refuse_unusable(tokenizer, system, "system message")
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's; it can fail in any way
        raise UserError(
            f"the chat template cannot render a video and a text ({first_line(error)}); use a template for video"
        ) from error
    video_token_id = tokenizer.get_vocab().get(video_token)
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # `check_length` says it when that is too many
    if video_token_id is None or ids.count(video_token_id) != 1:
        count = 0 if video_token_id is None else ids.count(video_token_id)
        raise UserError(
            f"the chat template places {video_token} {count} times; expected once: use a template for video"
        )
    at = ids.index(video_token_id)
    return Prompt(tuple(ids[:at]), tuple(ids[at + 1 :]), video_token_id)


def check_length(prompt: Prompt, *, visual_tokens: int, new_tokens: int, context: int) -> None:
    """Raise `UserError` unless prompt, visual and new tokens together fit into the decoder's `context` of tokens."""
    if not isinstance(new_tokens, numbers.Integral):
        raise UserError(f"max_new_tokens is {new_tokens!r}: give a whole number of at least 1")
    total = prompt.length(visual_tokens) + new_tokens
    if total > context:
        text = len(prompt.prefix_ids) + len(prompt.suffix_ids)
        raise UserError(
            f"{total} tokens ({text} of text, {visual_tokens} of the video, {new_tokens} to generate) exceed the "
            f"model's context of {context}; shorten the question, generate less, or build with a lower --ratio"
        )


def splice(prompt: Prompt, visual: Tensor, newline: Tensor | None, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The decoder's input: embeddings of the prompt with the visual tokens in the place of the video.

    Args:
        prompt: from `build_prompt`.
        visual: [N, D] visual tokens.
        newline: [D] `image_newline`, appended to them; None if `visual` ends with it already.
        embed: the decoder's token embedding, [1, L] int64 ids to [1, L, D]; it is given ids on the device of `visual`.

    Returns:
        [1, L, D] in the dtype and on the device of the text's embeddings, L = `prompt.length(n)` for n = N + 1, or
        n = N without newline.
    """
    parts = [visual] if newline is None else [visual, newline.to(visual)[None]]
    before, after = (
        embed(to_device(torch.tensor([ids], dtype=torch.int64), visual.device))
        for ids in (prompt.prefix_ids, prompt.suffix_ids)
    )
    video = torch.cat(parts).to(before)[None]  # [1, N + 1, D]
    return torch.cat((before, video, after), dim=1)


def stop_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end an answer: those of the generation settings, as `model.generate` does, else the tokenizer's.

    `generation` is `model.generation_config`. Raises `UserError` if neither names one.
    """
    stops = None if generation is None else generation.eos_token_id
    if stops is None:
        stops = tokenizer.eos_token_id
    if stops is None:
        raise UserError("no stop token: neither generation_config.json nor the tokenizer names an eos token")
    return tuple(stops) if isinstance(stops, (list, tuple)) else (int(stops),)


def _refuse_unusable(tokenizer: PreTrainedTokenizerBase, text: str, what: str) -> None:
    """Refuse a text that no tokenizer takes, and one that spells a control token out."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # undecodable bytes on a command line arrive as lone surrogates
        raise UserError(f"the {what} is not valid Unicode (position {error.start}); write it in UTF-8") from error
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise UserError(
                f"the {what} contains {token.content!r}, a control token of the model; write it differently"
            )
