"""Many questions in one sequence: every one is answered as if it had been asked alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from builder.micro.packing import IGNORE, Batch, Pack, Packer, Standing, batch, logits, right_answers
from builder.micro.see import normalised
from earlytom import micro
from earlytom.micro.data import Question, labelled_clip
from runtime.text.places import places
from runtime.text.prompt import build_prompt, splice

FRAMES = (3, 1, 2)  # of each clip: unequal numbers of visual tokens
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(micro.PATH)


@pytest.fixture(scope="module")
def packer(tokenizer: Any) -> Packer:
    return Packer(tokenizer)


class Case:
    """A clip's pixels, its visual tokens with the newline, and its questions."""

    def __init__(self, model: Any, index: int, frames: int) -> None:
        clip = labelled_clip("validation", index)
        self.pixels = normalised(torch.from_numpy(clip.frames[:: 16 // frames][:frames]))
        with torch.no_grad():
            self.visual = model.get_video_features(self.pixels[None]).pooler_output[0]
        self.questions: Sequence[Question] = clip.questions[: 3 + index]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(question.text, question.answer) for question in self.questions]


@pytest.fixture(scope="module")
def cases(model: Any) -> list[Case]:
    return [Case(model, index, frames) for index, frames in enumerate(FRAMES)]


@pytest.fixture(scope="module")
def packs(packer: Packer, cases: list[Case]) -> list[Pack]:
    return [packer.pack(case.pairs) for case in cases]


def laid_out(model: Any, packer: Packer, cases: list[Case], packs: list[Pack], stretch: Tensor | None = None) -> Batch:
    with torch.no_grad():
        return batch(packer.prefix, [case.visual for case in cases], packs, model.get_input_embeddings(), stretch)


@pytest.fixture(scope="module")
def sequences(model: Any, packer: Packer, cases: list[Case], packs: list[Pack]) -> Batch:
    return laid_out(model, packer, cases, packs)


@pytest.fixture(scope="module")
def scores(model: Any, sequences: Batch) -> Tensor:
    with torch.no_grad():
        return logits(model, sequences)


def test_a_block_is_the_rest_of_the_prompt_the_answer_and_the_stop(
    tokenizer: Any, packer: Packer, cases: list[Case], packs: list[Pack]
) -> None:
    for case, pack in zip(cases, packs, strict=True):
        assert pack.questions == len(case.questions)
        for number, (text, answer) in enumerate(case.pairs):
            prompt = build_prompt(tokenizer, text)
            said = tokenizer(answer)["input_ids"]
            mine = pack.block == number
            assert tuple(packer.prefix.tolist()) == prompt.prefix_ids
            assert tuple(pack.ids[mine].tolist()) == (*prompt.suffix_ids, *said)
            assert pack.place[mine].tolist() == list(range(len(prompt.suffix_ids) + len(said)))
            waiting = [IGNORE] * (len(prompt.suffix_ids) - 1)
            assert pack.target[mine].tolist() == [*waiting, *said, tokenizer.eos_token_id]
        assert pack.block.tolist() == sorted(pack.block.tolist())


def alone(model: Any, tokenizer: Any, case: Case, text: str, answer: str) -> Tensor:
    """[answer and stop, vocabulary]: the scores of the model as transformers runs it on one question."""
    prompt = build_prompt(tokenizer, text).input_ids(len(case.visual))
    said = torch.tensor([tokenizer(answer)["input_ids"]])
    with torch.no_grad():
        ids = torch.cat((prompt, said), 1)
        scores = model(input_ids=ids, pixel_values_videos=case.pixels[None]).logits[0]
    return scores[prompt.shape[1] - 1 :]


def test_every_question_is_answered_as_if_it_were_alone(
    model: Any, tokenizer: Any, cases: list[Case], packs: list[Pack], sequences: Batch, scores: Tensor
) -> None:
    assert len({len(case.visual) for case in cases}) == 3
    assert len({len(pack.ids) for pack in packs}) > 1  # so that there is padding on both sides
    for row, case in enumerate(cases):
        strangers = cases[row - 1]
        for number, pair in enumerate(case.pairs):
            mine = scores[row][(sequences.block[row] == number) & (sequences.target[row] != IGNORE)]
            torch.testing.assert_close(mine, alone(model, tokenizer, case, *pair), **TOLERANCE)
            assert not torch.allclose(mine, alone(model, tokenizer, strangers, *pair), **TOLERANCE)


def test_scores_are_given_for_some_tokens_too(model: Any, sequences: Batch, scores: Tensor) -> None:
    answered = sequences.target != IGNORE
    with torch.no_grad():
        torch.testing.assert_close(logits(model, sequences, answered), scores[answered])


def test_a_question_does_not_hear_the_others(
    model: Any, packer: Packer, cases: list[Case], scores: Tensor, sequences: Batch
) -> None:
    case = cases[0]
    pairs = [*case.pairs[:-1], ("Is there anything else?", "no")]
    others = [packer.pack(pairs)]
    changed = laid_out(model, packer, [case], others)
    with torch.no_grad():
        again = logits(model, changed)[0]
    for number in range(len(pairs) - 1):
        torch.testing.assert_close(
            again[changed.block[0] == number], scores[0][sequences.block[0] == number], **TOLERANCE
        )
    # Where blocks are one, it does.
    joined = replace(others[0], block=torch.zeros_like(others[0].block))
    with torch.no_grad():
        heard = logits(model, laid_out(model, packer, [case], [joined]))[0]
    second = changed.block[0] == 1
    assert not torch.allclose(heard[second], again[second], **TOLERANCE)


def test_what_a_token_sees(sequences: Batch, packer: Packer, cases: list[Case]) -> None:
    lead, longest = len(packer.prefix), max(len(case.visual) for case in cases)
    width = lead + longest
    total = sequences.mask.shape[-1]
    for row, case in enumerate(cases):
        seen = len(case.visual)
        for i in range(total):
            block = sequences.block[row, i - width] if i >= width else -2
            for j in range(total):
                padding = lead + seen <= j < width
                stranger = j >= width and sequences.block[row, j - width] != block
                expected = i == j or (j < i and not padding and not stranger)
                if i < width or block >= 0:  # what padding sees is nobody's concern
                    assert bool(sequences.mask[row, 0, i, j]) == expected, (row, i, j)
    assert sequences.mask.any(-1).all()  # no softmax is empty


def said_by(model: Any, tokenizer: Any, case: Case, text: str, tokens: int) -> list[int]:
    """What greedy generation says, the stop token included."""
    prompt = build_prompt(tokenizer, text).input_ids(len(case.visual))
    out = model.generate(
        input_ids=prompt, pixel_values_videos=case.pixels[None], max_new_tokens=tokens, do_sample=False
    )
    return out[0, prompt.shape[1] :].tolist()


def forced(packer: Packer, text: str, said: list[int]) -> Pack:
    """The block of a question that is answered with these tokens, the last of which is not fed in."""
    asked = packer.pack([(text, "")])
    ids = torch.cat((asked.ids, torch.tensor(said[:-1], dtype=torch.int64)))
    target = torch.cat((asked.target[:-1], torch.tensor(said)))
    return Pack(ids, torch.zeros_like(ids), torch.arange(len(ids)), target, 1)


def test_right_answers_are_those_that_greedy_generation_gives(
    model: Any, tokenizer: Any, packer: Packer, cases: list[Case], packs: list[Pack], sequences: Batch, scores: Tensor
) -> None:
    right = right_answers(scores, sequences, packs)
    for case, hits in zip(cases, right, strict=True):
        assert len(hits) == len(case.questions)
        for (text, answer), hit in zip(case.pairs, hits, strict=True):
            wanted = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            assert hit == (said_by(model, tokenizer, case, text, len(wanted)) == wanted)


def test_what_the_model_truly_says_counts_as_right_and_anything_else_as_wrong(
    model: Any, tokenizer: Any, packer: Packer, cases: list[Case]
) -> None:
    for case in cases:
        text = case.questions[0].text
        said = said_by(model, tokenizer, case, text, 3)
        wrong = [[*said[:at], (said[at] + 1) % 1000, *said[at + 1 :]] for at in range(len(said))]
        some = [forced(packer, text, tokens) for tokens in (said, *wrong)]
        sequences = laid_out(model, packer, [case] * len(some), some)
        with torch.no_grad():
            hits = right_answers(logits(model, sequences), sequences, some)
        assert hits == [[True], *([False] for _ in wrong)]


def test_stretch_changes_positions_and_nothing_else(
    model: Any, packer: Packer, cases: list[Case], packs: list[Pack], sequences: Batch, scores: Tensor
) -> None:
    stretch = torch.tensor([1.0, 0.5, 0.125])
    shorter = laid_out(model, packer, cases, packs, stretch)
    for name in ("embeddings", "mask", "target", "block"):
        assert torch.equal(getattr(shorter, name), getattr(sequences, name)), name
    lead, width = len(packer.prefix), len(packer.prefix) + max(len(case.visual) for case in cases)
    for row, (case, step) in enumerate(zip(cases, stretch.tolist(), strict=True)):
        seen = len(case.visual)
        positions = shorter.positions[row]
        assert positions[: lead + seen].tolist() == [*range(lead), *(lead + step * n for n in range(seen))]
        first = packs[row].place == 0
        length = len(packs[row].ids)
        assert (positions[width : width + length][first] == lead + step * seen).all()
        assert torch.equal(positions[width : width + length] - lead - step * seen, packs[row].place.float())
    with torch.no_grad():
        other = logits(model, shorter)
    answered = sequences.target != IGNORE
    torch.testing.assert_close(other[0][answered[0]], scores[0][answered[0]])
    assert not torch.allclose(other[1][answered[1]], scores[1][answered[1]], **TOLERANCE)


# What visual tokens stand for


def standings(cases: list[Case]) -> list[Standing]:
    """Gaps for the first clip, a bias for the second, both for the third; the newline is the last of `visual`."""
    drawn = torch.Generator().manual_seed(2)
    found = []
    for row, case in enumerate(cases):
        count = len(case.visual) - 1
        place = torch.randperm(3 * count, generator=drawn)[:count].sort().values
        bias = 2 * torch.randn(count, generator=drawn)
        found.append(Standing(3 * count + 5, None if row == 1 else place, None if row == 0 else bias))
    return found


def told(model: Any, packer: Packer, cases: list[Case], packs: list[Pack], standing: list[Standing]) -> Batch:
    with torch.no_grad():
        return batch(
            packer.prefix, [case.visual for case in cases], packs, model.get_input_embeddings(), standing=standing
        )


def test_positions_and_bias_are_those_of_the_runtimes_prompt(
    model: Any, packer: Packer, cases: list[Case], packs: list[Pack], sequences: Batch
) -> None:
    standing = standings(cases)
    found = told(model, packer, cases, packs, standing)
    lead, longest = len(packer.prefix), max(len(case.visual) for case in cases)
    width = lead + longest
    assert found.mask.dtype == torch.float32
    for row, (case, pack, one) in enumerate(zip(cases, packs, standing, strict=True)):
        count = len(case.visual) - 1
        place = torch.arange(count) if one.place is None else one.place
        bias = torch.zeros(count) if one.bias is None else one.bias
        full = count if one.place is None else one.full
        for number in range(pack.questions):
            mine = pack.block == number
            positions, added = places(lead, place, bias, full, int(mine.sum()))
            block = found.positions[row, width : width + len(pack.ids)][mine]
            assert torch.equal(torch.cat((found.positions[row, : lead + count + 1], block)), positions.float())
            last = width + int(mine.nonzero().max())  # sees all of its own
            seen = found.mask[row, 0, last]
            assert torch.equal(seen[: lead + count + 1], added[: lead + count + 1])
            assert (seen[width : width + len(pack.ids)][mine] == 0).all()
        assert torch.equal(found.mask[row] > -1e30, sequences.mask[row])  # who sees whom stays


def test_tokens_that_stand_for_more_are_answered_as_the_decoder_alone_would(
    model: Any, tokenizer: Any, packer: Packer, cases: list[Case], packs: list[Pack], scores: Tensor
) -> None:
    """One question at a time, in the plain prompt, with position ids and an additive mask."""
    standing = standings(cases)
    found = told(model, packer, cases, packs, standing)
    with torch.no_grad():
        mine = logits(model, found)
    for row, (case, one) in enumerate(zip(cases, standing, strict=True)):
        text, _ = case.pairs[0]
        prompt = build_prompt(tokenizer, text)
        count = len(case.visual) - 1
        place = torch.arange(count) if one.place is None else one.place
        bias = torch.zeros(count) if one.bias is None else one.bias
        embeds = splice(prompt, case.visual, model.get_input_embeddings())
        full = count if one.place is None else one.full
        positions, added = places(len(prompt.prefix_ids), place, bias, full, len(prompt.suffix_ids))
        mask = added.expand(len(added), -1).masked_fill(torch.ones(len(added), len(added)).triu(1).bool(), -1e30)
        with torch.no_grad():
            hidden = model.model.language_model(
                inputs_embeds=embeds, position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
            ).last_hidden_state
            wanted = model.lm_head(hidden[0, -1])
        at = len(prompt.suffix_ids) - 1
        torch.testing.assert_close(mine[row, at], wanted, **TOLERANCE)
        assert not torch.allclose(mine[row, at], scores[row, at], **TOLERANCE)  # told nothing, it answers otherwise


def test_told_nothing_nothing_changes(
    model: Any, packer: Packer, cases: list[Case], packs: list[Pack], sequences: Batch
) -> None:
    """No places and no bias; places that leave no gap; a clip without a bias beside one that has one."""
    counts = [len(case.visual) - 1 for case in cases]
    for standing in (
        [Standing(count) for count in counts],
        [Standing(count, torch.arange(count)) for count in counts],
    ):
        found = told(model, packer, cases, packs, standing)
        for name in Batch.__dataclass_fields__:
            assert torch.equal(getattr(found, name), getattr(sequences, name)), name
