"""Many questions about one clip in one sequence, so that its visual tokens run through the decoder once.

A sequence is the prompt up to the video, the visual tokens, and a block for each question: the rest of the prompt and
the answer. A block attends to the tokens before the blocks and to itself, and its positions continue after the video,
so each answer is computed as if its question were asked alone. Greedy decoding gives the right answer exactly if, with
that answer as input, each of its tokens and the stop token is the most likely next one: one pass therefore scores all
questions (`right_answers`).

Notation: B clips, V visual tokens (padded), T tokens after them (padded), E width of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlytom.families import DEFAULT_FAMILY

IGNORE = -100


@dataclass(frozen=True)
class Pack:
    """The blocks of one clip's questions, one after the other.

    Attributes:
        ids: [T] int64, tokens of all blocks.
        block: [T] int64, each token's block, from 0.
        place: [T] int64, its position within the block, from 0.
        target: [T] int64, the next token if it is part of an answer or its stop token; else `IGNORE`.
        questions: number of blocks.
    """

    ids: Tensor
    block: Tensor
    place: Tensor
    target: Tensor
    questions: int


class Packer:
    """Makes packs with one tokenizer, whose chat template places the video before the question."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        content = [{"type": "video"}, {"type": "text", "text": "{question}"}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(DEFAULT_FAMILY.video_token)
        self._before_question, self._after_question = after.split("{question}")
        self.prefix = torch.tensor(tokenizer(before)["input_ids"], dtype=torch.int64)
        """[L] int64: the tokens before the video."""
        self._stop = tokenizer.eos_token_id

    def pack(self, pairs: Sequence[tuple[str, str]]) -> Pack:
        """The blocks of (question, answer) pairs about one clip."""
        ids: list[int] = []
        block: list[int] = []
        place: list[int] = []
        target: list[int] = []
        for number, (question, answer) in enumerate(pairs):
            asked = self._tokens(f"{self._before_question}{question}{self._after_question}")
            said = [*self._tokens(answer), self._stop]
            ids += asked + said[:-1]
            length = len(asked) + len(said) - 1
            block += [number] * length
            place += range(length)
            target += [IGNORE] * (len(asked) - 1) + said
        columns = torch.tensor([ids, block, place, target], dtype=torch.int64)
        return Pack(columns[0], columns[1], columns[2], columns[3], len(pairs))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Standing:
    """Positions and bias of a clip's visual tokens, see `runtime.text.places`.

    Attributes:
        full: number of visual tokens without compression; above every place.
        place: [N] int64, original positions; None: consecutive ones.
        bias: [N] fp32, added to the attention logits of their keys; None: no bias.
    """

    full: int
    place: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Some clips' sequences as the decoder takes them.

    Attributes:
        embeddings: [B, L + V + T, E].
        mask: [B, 1, L + V + T, L + V + T] bool, True where a token (row) attends to another; if a clip has a bias, fp32
            to add to the attention logits.
        positions: [B, L + V + T] fp32, for the rotary embedding.
        target: [B, T] as in `Pack`, padded with `IGNORE`.
        block: [B, T] as in `Pack`, padded with -1.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    target: Tensor
    block: Tensor


def batch(
    prefix: Tensor,
    visual: Sequence[Tensor],
    packs: Sequence[Pack],
    embed: Any,
    stretch: Tensor | None = None,
    standing: Sequence[Standing | None] | None = None,
) -> Batch:
    """Lay out the sequences of some clips.

    Args:
        prefix: [L] ids before the video.
        visual: for each clip its visual tokens [V_i, E], the closing newline included.
        packs: for each clip its questions.
        embed: the decoder's embedding; everything is moved to the device of its weights.
        stretch: [B], distance between the positions of neighbouring visual tokens; default: 1.
        standing: for each clip positions and bias of its visual tokens without closing tokens, whose positions follow
            all places; questions continue from there. None: consecutive positions, no bias.
    """
    count, lead = len(packs), len(prefix)
    device = embed.weight.device
    seen = torch.tensor([len(tokens) for tokens in visual], device=device)
    longest, tail = max(len(tokens) for tokens in visual), max(len(pack.ids) for pack in packs)
    width = lead + longest
    ids = torch.zeros(count, tail, dtype=torch.int64)
    block, target = torch.full_like(ids, -1), torch.full_like(ids, IGNORE)
    place = torch.zeros_like(ids)
    for row, pack in enumerate(packs):
        length = len(pack.ids)
        ids[row, :length], block[row, :length] = pack.ids, pack.block
        place[row, :length], target[row, :length] = pack.place, pack.target
    ids, block, place, target = (column.to(device) for column in (ids, block, place, target))
    video = torch.nn.utils.rnn.pad_sequence(list(visual), batch_first=True)  # [B, V, E]
    start = embed(prefix.to(device))[None].expand(count, -1, -1)
    embeddings = torch.cat((start, video.to(start), embed(ids)), 1)

    told = [None] * count if standing is None else standing
    along, end = _along(lead, seen, longest, stretch, told)
    begin = torch.arange(lead, dtype=along.dtype, device=device).expand(count, -1)
    positions = torch.cat((begin, along, end[:, None] + place), 1)

    total = width + tail
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril().repeat(count, 1, 1)
    mask[:, :, lead:width] &= (torch.arange(longest, device=device) < seen[:, None])[:, None]
    mask[:, width:, width:] &= block[:, :, None] == block[:, None, :]
    mask |= torch.eye(total, dtype=torch.bool, device=device)  # padding attends to itself, else its softmax is NaN
    return Batch(embeddings, _biased(mask, told, lead)[:, None], positions, target, block)


def _along(
    lead: int, seen: Tensor, longest: int, stretch: Tensor | None, told: Sequence[Standing | None]
) -> tuple[Tensor, Tensor]:
    """Positions [B, V] of visual tokens, `seen [B]` of them not padding, and the next position [B]."""
    count, device = len(seen), seen.device
    step = torch.ones(count, device=device) if stretch is None else stretch.to(device)
    along = lead + step[:, None] * torch.arange(longest, device=device)
    end = lead + step * seen
    for row, one in enumerate(told):
        if one is not None and one.place is not None:
            kept, closing = len(one.place), int(seen[row]) - len(one.place)
            along[row, :kept] = one.place.to(along) + lead
            along[row, kept : kept + closing] = lead + one.full + torch.arange(closing, device=device)
            end[row] = lead + one.full + closing
    return along, end


def _biased(mask: Tensor, told: Sequence[Standing | None], lead: int) -> Tensor:
    """The mask [B, L + V + T, L + V + T] with the bias of each clip's keys, if any clip has one."""
    biases = [None if one is None else one.bias for one in told]
    if all(bias is None for bias in biases):
        return mask
    added = torch.zeros(len(mask), 1, mask.shape[-1], device=mask.device)
    for row, bias in enumerate(biases):
        if bias is not None:
            added[row, 0, lead : lead + len(bias)] = bias.to(added)
    return added.expand(mask.shape).masked_fill(~mask, torch.finfo(added.dtype).min)


def logits(model: Any, sequences: Batch, at: Tensor | None = None) -> Tensor:
    """[B, T, vocabulary]: next-token logits after each token of the blocks.

    With a mask `at` [B, T] bool, only those after its tokens: [sum of the mask, vocabulary].
    """
    hidden = model.model.language_model(
        inputs_embeds=sequences.embeddings,
        attention_mask=sequences.mask,
        position_ids=sequences.positions,
        use_cache=False,
    ).last_hidden_state
    after = hidden[:, hidden.shape[1] - sequences.target.shape[1] :]
    return model.lm_head(after if at is None else after[at])


def right_answers(scores: Tensor, sequences: Batch, packs: Sequence[Pack]) -> list[list[bool]]:
    """For each clip and each of its questions, whether greedy decoding gives exactly the right answer."""
    wrong = (scores.argmax(-1) != sequences.target) & (sequences.target != IGNORE)
    return [
        [not bool(wrong[row, sequences.block[row] == number].any()) for number in range(pack.questions)]
        for row, pack in enumerate(packs)
    ]
