"""The text around a video: chat template, tokens before and after it, and where the visual tokens go.

A prompt is built as the processor of the model's family in transformers builds it for one video and a conversation: the
checkpoint's chat template renders its messages, mostly one of a user with the video and the question; the video
placeholder in it stands for n visual tokens. The processor repeats the placeholder n times before it tokenizes. The
placeholder is a special token, which splits the text, so the tokens before and after it are the same for every n: they
are computed once here, and n is chosen later. Hence `Prompt.input_ids(n)` equals the processor's `input_ids` for n
visual tokens, and `splice` gives the embeddings that the model makes of them. n counts the token that closes a
video, as the processor does.

Knows the tokenizer and tensors; nothing about engines, frames or decoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import FAMILIES
from earlytom.numbers import whole
from earlytom.transfers import to_device
from runtime.checkpoint.files import first_line
from runtime.text.messages import ChatMessage, conversation, rendered

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


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
    tokenizer: PreTrainedTokenizerBase,
    question: str | Sequence[ChatMessage],
    *,
    system: str | None = None,
    most_bytes: int | None = None,
) -> Prompt:
    """The prompt that asks `question` about one video: a text with an optional `system` message before it, or messages.

    The texts are used as they are, not stripped. Raises `UserError` if a text is empty, no str, not valid Unicode or
    contains one of the tokenizer's control tokens (`<|im_end|>`, ...), which would be taken for the token
    itself and change the prompt's structure, if messages are no conversation about one video
    (`runtime.text.messages`), if the chat template does not place exactly one video, or if the rendered text has more
    than `most_bytes` bytes (see `bytes_per_token`), which is looked at before it is tokenized.
    """
    messages = conversation(question, system)
    for what, one in messages.items():
        _refuse_unusable(tokenizer, one.text, what)
    try:
        text = tokenizer.apply_chat_template(
            rendered(list(messages.values())), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the checkpoint's; it can fail in any way
        raise UserError(
            f"the chat template cannot render a video and a text ({first_line(error)}); use a template for video"
        ) from error
    if most_bytes is not None:
        _refuse_long(tokenizer, str(text), most_bytes, {what: one.text for what, one in messages.items()})
    video_token, video_token_id = _placeholder(tokenizer)
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # `check_length` says it when that is too many
    if video_token_id is None or ids.count(video_token_id) != 1:
        count = 0 if video_token_id is None else ids.count(video_token_id)
        raise UserError(
            f"the chat template places {video_token} {count} times; expected once: use a template for video"
        )
    at = ids.index(video_token_id)
    return Prompt(tuple(ids[:at]), tuple(ids[at + 1 :]), video_token_id)


def _placeholder(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """What stands for a video, of what families use for it, and its id; None where the tokenizer knows none."""
    known = [family.video_token for family in FAMILIES.values()]
    vocabulary = tokenizer.get_added_vocab()  # the whole one is copied when it is asked for
    token = next((token for token in known if token in vocabulary), known[0])
    return token, vocabulary.get(token)


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most bytes of a normalised text that one token can stand for; None where there may be no such number.

    A byte-level BPE loses nothing: each byte is a symbol of its vocabulary, so a token stands for as many bytes as its
    name has symbols, and a text of more than n times the longest has more than n tokens. Other tokenizers may drop
    what they split at, or make one token of all that they do not know; of those nothing is promised.
    """
    from tokenizers import pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or backend.pre_tokenizer is None:
        return None
    splitter = json.loads(backend.pre_tokenizer.__getstate__())
    steps = splitter.get("pretokenizers", [splitter])
    keeps = all(
        step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    symbols = backend.get_vocab(with_added_tokens=False)
    whole_bytes = symbols.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.added_tokens_decoder.values()
    swallows = any(token.lstrip or token.rstrip for token in added)  # any number of spaces beside it
    if not keeps or not whole_bytes or swallows or not any(step["type"] == "ByteLevel" for step in steps):
        return None
    return max(*map(len, symbols), *(len(token.content.encode()) for token in added))


def check_length(prompt: Prompt, *, visual_tokens: int, new_tokens: int, context: int) -> None:
    """Raise `UserError` unless prompt, visual and new tokens together fit into the decoder's `context` of tokens, and
    these are a whole number of at least 1."""
    total = prompt.length(visual_tokens) + whole("max_new_tokens (--max-new-tokens)", new_tokens, 1)
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
        newline: [D] what closes them, appended; None if `visual` ends with it already.
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


def _refuse_long(tokenizer: PreTrainedTokenizerBase, text: str, most_bytes: int, texts: dict[str, str]) -> None:
    """Refuse a rendered text that is too long for certain, in less time than tokenizing it would take."""
    if len(text) * 4 <= most_bytes:
        return
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and not (text.isascii() and json.loads(normalizer.__getstate__())["type"] == "NFC"):
        text = normalizer.normalize_str(text)  # it may make a text shorter: the tokens stand for what it leaves
    if (size := len(text.encode())) > most_bytes:
        what = max(texts, key=lambda name: len(texts[name]))
        argument = "system" if what == "system message" else "prompt"
        raise UserError(
            f"the {what} ({argument}) has {len(texts[what])} characters: {size} bytes of text cannot fit into "
            f"the model's context, which holds {most_bytes} at most; shorten the {what}"
        )
