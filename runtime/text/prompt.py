"""Builds the prompt around a video: chat template, token ids before and after the video, and its visual tokens' places.

The prompt equals that of the family's processor in transformers for one video and a conversation. The checkpoint's chat
template renders the messages with one video placeholder, which the processor repeats n times, for n visual tokens,
before it tokenizes. The placeholder is a special token, which splits the text, so the ids before and after it do not
depend on n: they are computed once here, and n is chosen later. So `Prompt.input_ids(n)` equals the processor's
`input_ids` for n visual tokens, and `splice` gives the embeddings that the model computes from them. n includes closing
tokens, where the family has them (`earlytom.families.closings`), as in the processor.

Some families have one span of visual tokens per frame, each after a text that names the frame (`FrameNames`). The
prompt then depends on the remaining frames and the tokens of each: its `spans`, from `earlytom.standing.frame_spans`. A
frame keeps the name that it has in the whole video, so that the model knows its time.

Other families give the frames' times in the text after the video (`VideoTimes`).

Knows the tokenizer and tensors; nothing about engines, frames or decoding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, Family, FrameTimes
from earlytom.numbers import whole
from earlytom.standing import FrameSpan
from earlytom.transfers import to_device
from runtime.checkpoint.files import first_line
from runtime.text.messages import ChatMessage, conversation, rendered

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


_TEMPLATE_STEPS = 1_000_000  # lines; a published one takes some tens for each message
LONGEST = 99999.99  # seconds into a video, with the longest text
Spans = Sequence[FrameSpan]
Piece = tuple[tuple[int, ...], int]  # ids of text, and how many visual tokens follow them


class FrameNames:
    """The ids of the text before each frame's visual tokens, which names the frame.

    Special tokens surround each such text, so that it is tokenized by itself.

    Args:
        lead: the text before the video.
        times: of its frames. Without them, texts with times have their greatest length.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, family: Family, lead: str = "", times: FrameTimes | None = None
    ) -> None:
        self._tokenizer, self._family, self._lead, self._times = tokenizer, family, lead, times
        self._known: dict[int, tuple[int, ...]] = {}

    def at(self, times: FrameTimes) -> FrameNames:
        """The names for a video with these frame times."""
        return FrameNames(self._tokenizer, self._family, self._lead, times) if self._family.names_times else self

    @property
    def first(self) -> str:
        """The video's text before the visual tokens of its first frame."""
        return self._family.before_video(self._times) + self._family.before_frame(0, self._times)

    def prefix(self) -> tuple[int, ...]:
        """Ids of the prompt before the visual tokens of the first frame."""
        return tuple(self._tokenizer(self._lead + self.first, verbose=False)["input_ids"])

    def before(self, number: int) -> tuple[int, ...]:
        """Ids before frame `number` of the video, from 1."""
        if number not in self._known:
            family = self._family
            text = family.after_frame + family.between_frames + family.before_frame(number, self._times)
            self._known[number] = tuple(self._tokenizer(text, verbose=False)["input_ids"])
        return self._known[number]


class VideoTimes:
    """The ids of the text after a video, which begins with the frames' times.

    Args:
        rest: the text after the times.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family, rest: str) -> None:
        self._tokenizer, self._family, self._rest = tokenizer, family, rest

    def at(self, times: FrameTimes) -> tuple[int, ...]:
        """The ids for a video with these frame times."""
        return tuple(self._tokenizer(self._family.behind_video(times) + self._rest, verbose=False)["input_ids"])

    def most(self, frames: int) -> int:
        """The largest number of ids for a video of so many frames."""
        return len(self.at(FrameTimes((LONGEST,) * frames, LONGEST)))


@dataclass(frozen=True)
class Prompt:
    """The token ids before and after the visual tokens, and the id of the placeholder between them.

    Attributes:
        names: frame names, if each frame has its own span; `prefix_ids` then end with the first name, and the methods
            need `spans`, which they ignore otherwise.
        times: the text with frame times, if it follows the video; `suffix_ids` lack it until `at`.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    video_token_id: int
    names: FrameNames | None = field(default=None, repr=False, compare=False)
    times: VideoTimes | None = field(default=None, repr=False, compare=False)

    def at(self, times: FrameTimes) -> Prompt:
        """The prompt for a video with these frame times; the same one if its texts have no times."""
        if self.times is not None:
            return replace(self, suffix_ids=self.behind(times), times=None)
        if self.names is None or (names := self.names.at(times)) is self.names:
            return self
        return replace(self, prefix_ids=names.prefix(), names=names)

    def behind(self, times: FrameTimes) -> tuple[int, ...]:
        """Ids after a video with these frame times."""
        return self.suffix_ids if self.times is None else self.times.at(times)

    def pieces(self, visual_tokens: int, spans: Spans | None = None) -> list[Piece]:
        """The prompt up to the last visual token, as (text ids, number of visual tokens after them)."""
        if self.names is None:
            return [(self.prefix_ids, visual_tokens)]
        assert spans is not None
        assert sum(span.tokens for span in spans) == visual_tokens
        ids = [self.prefix_ids, *(self.names.before(span.number) for span in spans[1:])]
        return list(zip(ids, [span.tokens for span in spans] or [0], strict=True))

    def input_ids(self, visual_tokens: int, spans: Spans | None = None) -> Tensor:
        """[1, L] int64: the prompt with `visual_tokens` placeholders, as `model.generate` takes it."""
        before = [(*ids, *(self.video_token_id,) * count) for ids, count in self.pieces(visual_tokens, spans)]
        return torch.tensor([[*chain(*before), *self.suffix_ids]], dtype=torch.int64)

    def visual_span(self, visual_tokens: int, spans: Spans | None = None) -> Sequence[int]:
        """The places of the visual tokens in the prompt."""
        places: list[range] = []
        at = 0
        for ids, count in self.pieces(visual_tokens, spans):
            places.append(range(at + len(ids), at := at + len(ids) + count))
        return places[0] if len(places) == 1 else [*chain(*places)]

    def length(self, visual_tokens: int, spans: Spans | None = None) -> int:
        """L, the number of tokens of the prompt."""
        return sum(len(ids) + count for ids, count in self.pieces(visual_tokens, spans)) + len(self.suffix_ids)

    def room(self, visual_tokens: int, left: int, frames: int) -> int:
        """The largest possible `length` if `left` of a video's `frames` frames remain; exact if all do."""
        suffix = len(self.suffix_ids) if self.times is None else self.times.most(frames)
        most = len(self.prefix_ids) + visual_tokens + suffix
        if self.names is None:
            return most
        names = sorted((len(self.names.before(number)) for number in range(1, frames)), reverse=True)
        return most + sum(names[: max(left - 1, 0)])


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str | Sequence[ChatMessage],
    *,
    system: str | None = None,
    most_bytes: int | None = None,
    family: Family = DEFAULT_FAMILY,
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
        _refuse_unusable(tokenizer, one.text, what, family)
    try:
        with _bounded():
            text = str(
                tokenizer.apply_chat_template(
                    rendered(list(messages.values())),
                    chat_template=family.chat_template(),
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
    except Exception as error:  # a template is a program of the checkpoint's; it can fail in any way
        raise UserError(
            f"the chat template cannot render a video and a text ({first_line(error)}); use a template for video"
        ) from error
    if most_bytes is not None:
        _refuse_long(tokenizer, text, most_bytes, {what: one.text for what, one in messages.items()})
    names = None
    if family.span_a_frame and text.count(family.video_token) == 1:
        lead, _, rest = text.partition(family.video_token)
        names = FrameNames(tokenizer, family, lead)
        text = lead + names.first + family.visual_token + family.after_frame + family.after_video() + rest
    visual = tokenizer.get_added_vocab().get(family.visual_token)  # `get_vocab` would copy the whole vocabulary
    times = None
    if family.says_times:
        times = VideoTimes(tokenizer, family, text.partition(family.video_token)[2])
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # not verbose: `check_length` reports too many
    if visual is None or ids.count(visual) != 1 or (family.span_a_frame and names is None):
        count = 0 if visual is None else text.count(family.video_token) or ids.count(visual)
        raise UserError(
            f"the chat template places {family.video_token} {count} times; expected once: use a template for video"
        )
    at = ids.index(visual)
    return Prompt(tuple(ids[:at]), tuple(ids[at + 1 :]), visual, names, times)


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends a template that runs on: jinja's sandbox bounds neither loops in loops nor calls."""
    left = _TEMPLATE_STEPS

    def trace(frame: FrameType, *_: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # jinja's name of it
            return None
        left -= 1
        if left < 0:
            raise TimeoutError(f"it takes more than {_TEMPLATE_STEPS} steps")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most bytes of normalised text per token; None for a tokenizer without such a bound.

    A byte-level BPE loses nothing: each byte is a symbol of its vocabulary, so a token covers as many bytes as its name
    has symbols, and a text of more than n times the longest has more than n tokens. Other tokenizers may drop
    separators, or make one token of any unknown text, so there is no bound.
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


def check_length(
    prompt: Prompt, *, visual_tokens: int, new_tokens: int, context: int, left: int = 1, frames: int = 1
) -> None:
    """Raise `UserError` unless prompt, visual and new tokens together fit into the decoder's `context` of tokens, and
    these are a whole number of at least 1. `left`, `frames`: as in `Prompt.room`."""
    length = prompt.room(visual_tokens, left, frames)
    total = length + whole("max_new_tokens (--max-new-tokens)", new_tokens, 1)
    if total > context:
        text = length - visual_tokens
        raise UserError(
            f"{total} tokens ({text} of text, {visual_tokens} of the video, {new_tokens} to generate) exceed the "
            f"model's context of {context}; shorten the question, generate less, or build with a lower --ratio"
        )


def splice(
    prompt: Prompt,
    visual: Tensor,
    embed: Callable[[Tensor], Tensor],
    spans: Spans | None = None,
) -> Tensor:
    """The decoder's input: embeddings of the prompt with the visual tokens in the place of the video.

    Args:
        prompt: from `build_prompt`.
        visual: [N, D] visual tokens with closing tokens; layer states concatenated along D are ignored (see
            `runtime.text.axes.states_of`).
        embed: the decoder's token embedding, [1, L] int64 ids to [1, L, D]; called with ids on the device of `visual`.
        spans: of the visual tokens, see `Prompt`.

    Returns:
        [1, L, D] in the dtype and on the device of the text's embeddings, L = `prompt.length(N)`.
    """
    pieces = prompt.pieces(len(visual), spans)
    words = torch.tensor([[*chain(*(ids for ids, _ in pieces)), *prompt.suffix_ids]], dtype=torch.int64)
    text = embed(to_device(words, visual.device))[0]
    between = text.split([*(len(ids) for ids, _ in pieces), len(prompt.suffix_ids)])
    video = visual[:, : text.shape[1]].to(text).split([count for _, count in pieces])
    parts = chain(*zip(between[:-1], video, strict=True), between[-1:])
    return torch.cat(list(parts))[None]


def stop_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end an answer: those of the generation config, as in `model.generate`, else the tokenizer's.

    `generation` is `model.generation_config`. Raises `UserError` if neither names one.
    """
    stops = None if generation is None else generation.eos_token_id
    if stops is None:
        stops = tokenizer.eos_token_id
    if stops is None:
        raise UserError("no stop token: neither generation_config.json nor the tokenizer names an eos token")
    return tuple(stops) if isinstance(stops, (list, tuple)) else (int(stops),)


def _refuse_unusable(tokenizer: PreTrainedTokenizerBase, text: str, what: str, family: Family) -> None:
    """Refuse a text that is no valid Unicode, or that contains a control token."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # undecodable bytes on a command line arrive as lone surrogates
        raise UserError(f"the {what} is not valid Unicode (position {error.start}); write it in UTF-8") from error
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for control in (*controls, family.video_token):
        if control in text:
            raise UserError(f"the {what} contains {control!r}, a control token of the model; write it differently")


def _refuse_long(tokenizer: PreTrainedTokenizerBase, text: str, most_bytes: int, texts: dict[str, str]) -> None:
    """Refuse a rendered text that is certainly too long, faster than by tokenizing it."""
    if len(text) * 4 <= most_bytes:
        return
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and not (text.isascii() and json.loads(normalizer.__getstate__())["type"] == "NFC"):
        text = normalizer.normalize_str(text)  # may shorten the text, and the bound holds for the normalised text
    if (size := len(text.encode())) > most_bytes:
        what = max(texts, key=lambda name: len(texts[name]))
        argument = "system" if what == "system message" else "prompt"
        raise UserError(
            f"the {what} ({argument}) has {len(texts[what])} characters: {size} bytes of text cannot fit into "
            f"the model's context, which holds {most_bytes} at most; shorten the {what}"
        )
