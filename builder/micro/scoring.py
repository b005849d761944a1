"""Which questions about a clip are answered right, given the visual tokens that the decoder sees of it.

    scorer = Scorer(model, tokenizer)
    packs = [scorer.pack(clip.questions) for clip in clips]
    outcomes = scorer.score(tokens, packs)  # outcomes[clip][question].right

The decoder's input is that of inference: prompt, visual tokens, closing token, question. All questions about some clips
run in one pass (see `packing`), which gives exactly the tokens of greedy decoding up to the first wrong one. Positions
and bias of tokens are optional: `scorer.score(tokens, packs, standing)`.
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
    """The answer to one question.

    Attributes:
        right: whether greedy decoding gives exactly the right answer, and then stops.
        said: the first tokens of greedy decoding, up to and including the first wrong one; the whole answer and the
            stop token if it is right. If they differ between two models, so do the answers.
    """

    right: bool
    said: tuple[int, ...]


class Scorer:
    """Scores questions with one model.

    Args:
        model: of a family with one span of visual tokens a video, in fp32, in eval mode.
        tokenizer: its tokenizer, with the chat template.
        batch: clips in one pass of the decoder; affects memory and speed, not the outcomes.
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
        """One clip's questions, for any number of calls of `score`."""
        return self._packer.pack([(question.text, question.answer) for question in questions])

    @torch.inference_mode()
    def score(
        self,
        visual: Sequence[Tensor],
        packs: Sequence[Pack],
        standing: Sequence[Standing] | None = None,
        inner: AppliedInner | None = None,
    ) -> list[list[Outcome]]:
        """Score every clip's questions.

        Args:
            visual: for each clip its visual tokens [N_i, E], without the newline; N_i may differ, and may be 0.
            packs: for each clip its questions, from `pack`; at least one question each.
            standing: for each clip its tokens' positions and bias; None: consecutive positions, no bias.
            inner: inner merging. It depends on the question, so each pack must have one question.

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
        """[B, T, vocabulary]; `kept [B]`: visual tokens of each sequence, without the closing token."""
        if inner is None:
            return packing.logits(self._model, sequences)
        total, lead = sequences.embeddings.shape[1], len(self._packer.prefix)
        place = torch.arange(total) - lead
        visual = (place >= 0) & (place < torch.tensor(kept)[:, None])
        # The prompt's last token is the one before the answer's first, which is input, too.
        last = total - sequences.target.shape[1] + (sequences.target != IGNORE).byte().argmax(1)
        with inner.prompt(visual, last=last):
            return packing.logits(self._model, sequences)


def _said(likeliest: Tensor, sequences: Batch, packs: Sequence[Pack]) -> list[list[tuple[int, ...]]]:
    """`Outcome.said` for each clip and question; `likeliest` [B, T]: the most likely next tokens."""
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
