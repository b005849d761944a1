"""Many questions about one clip in one sequence, so that its visual tokens run through the decoder once.

A sequence is the prompt up to the video, the visual tokens, and then one block for each question: the rest of the
prompt, the answer, the stop token. A block sees what lies before the blocks and itself, and its positions go on where
the video ends, so every answer is computed exactly as if its question had been asked alone. Greedy decoding gives the
right answer exactly if, with the right answer fed in, every one of its tokens (the stop token too) is the most likely
next one: one pass therefore tells for all questions whether they would be answered right (`right_answers`).

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
        block: [T] int64, the number of the block that a token belongs to, from 0.
        place: [T] int64, its place within the block, from 0.
        target: [T] int64, the token that should come next, where that is part of an answer; else `IGNORE`.
        questions: how many blocks there are.
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
    """What the decoder is told of a clip's visual tokens besides themselves, see `runtime.text.places`.

    Attributes:
        full: visual tokens if none had been left out; above every place.
        place: [N] int64, where they were in the video; None: they stand one after the other.
        bias: [N] fp32, added to the attention logits of their keys; None: nothing is.
    """

    full: int
    place: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Some clips' sequences as the decoder takes them.

    Attributes:
        embeddings: [B, L + V + T, E].
        mask: [B, 1, L + V + T, L + V + T], True where a token (row) sees another; where a clip has a bias, fp32 that is
            added to the attention logits.
        positions: [B, L + V + T] of the rotary embedding.
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
        embed: the decoder's embedding, ids to vectors; everything is put on the device of its weights.
        stretch: [B], the distance between the positions of neighbouring visual tokens; 1 if not given.
        standing: for each clip what its first visual tokens stand for; what closes them stands behind all places, and
            the questions go on from there. None: nothing is told.
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
    mask |= torch.eye(total, dtype=torch.bool, device=device)  # padding sees itself, or its softmax would be empty
    return Batch(embeddings, _biased(mask, told, lead)[:, None], positions, target, block)


def _along(
    lead: int, seen: Tensor, longest: int, stretch: Tensor | None, told: Sequence[Standing | None]
) -> tuple[Tensor, Tensor]:
    """Positions [B, V] of visual tokens, of which `seen [B]` are there, and the position [B] after them."""
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
    """[B, T, vocabulary]: the decoder's scores of the next token after each token of the blocks.

    With a mask `at` [B, T] bool, only those of the tokens in it: [sum of the mask, vocabulary].
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
