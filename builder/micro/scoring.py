"""Which questions about a clip are answered right, given the visual tokens that the decoder sees of it.

    scorer = Scorer(model, tokenizer)
    packs = [scorer.pack(clip.questions) for clip in clips]
    outcomes = scorer.score(tokens, packs)  # outcomes[clip][question].right

The decoder sees what it sees at inference: the prompt, the visual tokens, what closes them, the question.
All questions of some clips run in one pass (see `packing`), which tells exactly what greedy decoding would begin with.
It may be told what the tokens stand for: `scorer.score(tokens, packs, standing)`. Knows nothing of where visual tokens
come from, and does not ask how sure the model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder.micro import packing
from builder.micro.packing import IGNORE, Batch, Pack, Packer, Standing
from earlytom.errors import UserError
from earlytom.families import family_of
from earlytom.inner_decoder import AppliedInner
from earlytom.micro.data import Question

BATCH = 16


@dataclass(frozen=True)
class Outcome:
    """How one question was answered.

    Attributes:
        right: greedy decoding gives exactly the right answer, and then stops.
        said: the tokens that greedy decoding begins with, up to and including the first wrong one: all of the answer
            and the stop token where it is right. Two models that said different things answered differently.
    """

    right: bool
    said: tuple[int, ...]


class Scorer:
    """Asks one model.

    Args:
        model: a model of a supported family in fp32, in eval mode.
        tokenizer: its tokenizer, with the chat template.
        batch: how many clips run through the decoder at once; changes memory and speed, not the outcomes.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = BATCH) -> None:
        self._model = model
        if (apart := (family := family_of(model.config)).in_pieces) is not None:
            raise UserError(
                f"questions are packed for families with one span a video, and {family.title} {apart}: compare "
                "methods with --coverage, or ask an engine (python -m runtime.ask)"
            )
        self._packer = Packer(tokenizer)
        self._batch = batch

    def pack(self, questions: Sequence[Question]) -> Pack:
        """One clip's questions, made ready once for any number of calls of `score`."""
        return self._packer.pack([(question.text, question.answer) for question in questions])

    @torch.inference_mode()
    def score(
        self,
        visual: Sequence[Tensor],
        packs: Sequence[Pack],
        standing: Sequence[Standing] | None = None,
        inner: AppliedInner | None = None,
    ) -> list[list[Outcome]]:
        """Ask every clip's questions.

        Args:
            visual: for each clip its visual tokens [N_i, E], without the newline; N_i may differ, and may be 0.
            packs: for each clip its questions, from `pack`; at least one question each.
            standing: for each clip what its tokens stand for; None tells nothing.
            inner: what the decoder does with visual tokens on its way. It goes by the question, so each pack has one.

        Returns:
            For each clip, the outcomes in the order of its questions.
        """
        if len(visual) != len(packs):
            raise ValueError(
                f"{len(visual)} clips and {len(packs)} packs of questions: expected one pack for each clip"
            )
        if standing is not None and len(standing) != len(visual):
            raise ValueError(f"{len(visual)} clips, and {len(standing)} of them are told of: expected all or none")
        if inner is not None and any(pack.questions != 1 for pack in packs):
            raise ValueError("inner merging goes by the question: expected packs of one question each")
        closing = family_of(self._model.config).closing(self._model.model)
        embed = self._model.get_input_embeddings()
        ends = [] if closing is None else [closing.detach()[None]]
        outcomes: list[list[Outcome]] = []
        for start in range(0, len(packs), self._batch):
            these = slice(start, start + self._batch)
            some, told = packs[these], None if standing is None else standing[these]
            closed = [torch.cat((tokens.to(embed.weight), *ends)) for tokens in visual[these]]
            sequences = packing.batch(self._packer.prefix, closed, some, embed, standing=told)
            scores = self._logits(sequences, [len(tokens) for tokens in visual[these]], inner)
            right = packing.right_answers(scores, sequences, some)
            said = _said(scores.argmax(-1), sequences, some)
            outcomes += [[*map(Outcome, *pair)] for pair in zip(right, said, strict=True)]
        return outcomes

    def _logits(self, sequences: Batch, kept: Sequence[int], inner: AppliedInner | None) -> Tensor:
        """[B, T, vocabulary]; `kept [B]` visual tokens of each sequence, without what closes them."""
        if inner is None:
            return packing.logits(self._model, sequences)
        total, lead = sequences.embeddings.shape[1], len(self._packer.prefix)
        place = torch.arange(total) - lead
        visual = (place >= 0) & (place < torch.tensor(kept)[:, None])
        # The prompt ends where the answer's first token should come next; the answer is fed in behind it.
        last = total - sequences.target.shape[1] + (sequences.target != IGNORE).byte().argmax(1)
        with inner.prompt(visual, last=last):
            return packing.logits(self._model, sequences)


def _said(likeliest: Tensor, sequences: Batch, packs: Sequence[Pack]) -> list[list[tuple[int, ...]]]:
    """For each clip and question, the likeliest tokens [B, T] along the right answer, up to the first wrong one."""
    said: list[list[tuple[int, ...]]] = []
    columns = (likeliest.tolist(), sequences.target.tolist(), sequences.block.tolist())
    for row, pack in enumerate(packs):
        answers: list[list[int]] = [[] for _ in range(pack.questions)]
        wrong = [False] * pack.questions
        for token, target, block in zip(*(column[row] for column in columns), strict=True):
            if target == IGNORE or wrong[block]:
                continue
            answers[block].append(token)
            wrong[block] = token != target
        said.append([tuple(answer) for answer in answers])
    return said
