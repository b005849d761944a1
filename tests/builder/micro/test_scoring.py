"""Scoring many questions at once says what asking them one at a time, as at inference, would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from builder.micro import packing
from builder.micro.packing import IGNORE, Batch
from builder.micro.scoring import Scorer
from earlytom.errors import UserError
from earlytom.families.qwen3_vl import Qwen3Vl
from earlytom.micro.data import Question
from runtime.checkpoint import load_model, load_tokenizer
from runtime.text.prompt import build_prompt, splice
from tests.earlytom.tiny import tiny_internvl, tiny_llava_video, tiny_qwen3_vl

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ("What color is the circle?", "Did the red object stop?", "How many shapes appeared?")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(None)


@pytest.fixture(scope="module")
def visual(model: Any) -> list[Tensor]:
    """Tokens of three clips, as large as the embeddings of words; the last clip has none."""
    random = torch.Generator().manual_seed(1)
    scale = model.get_input_embeddings().weight.std().item()
    return [scale * torch.randn(count, 256, generator=random) for count in (9, 31, 0)]


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, tokens: Tensor, question: str, count: int, newline: bool = True) -> list[int]:
    """What the runtime's prompt and plain greedy decoding give, one forward pass a token."""
    embed = model.get_input_embeddings()
    visual = torch.cat([tokens, model.model.image_newline.detach()[None]]) if newline else tokens
    embeds = splice(build_prompt(tokenizer, question), visual, embed)
    said: list[int] = []
    for _ in range(count):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        said.append(int(model.lm_head(hidden[0, -1]).argmax()))
        embeds = torch.cat((embeds, embed(torch.tensor([said[-1:]]))), 1)
    return said


def test_a_family_with_a_span_a_frame_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="questions are packed for families with one span a video, and InternVL"):
        Scorer(tiny_internvl(bundled=True), tokenizer)


def test_a_family_with_newlines_among_its_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="and LLaVA-Video has newlines within it: compare"):
        Scorer(tiny_llava_video(bundled=True), tokenizer)
    Scorer(tiny_llava_video(bundled=True, newlines="one_token"), tokenizer)  # negative control


def test_a_family_on_axes_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen3Vl, "span_a_frame", False)
    with pytest.raises(UserError, match="and Qwen3-VL places its tokens by time, row and column: compare"):
        Scorer(tiny_qwen3_vl(bundled=True), tokenizer)


def asked(model: Any, tokenizer: Any, tokens: Tensor) -> list[tuple[Question, list[int]]]:
    """Questions whose right answer is what the model itself begins with, and those beginnings, one token longer."""
    found = []
    for number, text in enumerate(TEXTS):
        said = greedy(model, tokenizer, tokens, text, 3 + number)
        answer = tokenizer.decode(said[:-1])
        # Words that the tokenizer would cut elsewhere, or a stop among them, cannot be an answer.
        if list(tokenizer(answer)["input_ids"]) == said[:-1] and tokenizer.eos_token_id not in said[:-1]:
            found.append((Question("colour", text, answer), said))
        else:
            found.append((Question("colour", text, "white"), said))
    return found


def test_it_says_what_greedy_decoding_says(model: Any, tokenizer: Any, visual: list[Tensor]) -> None:
    scorer = Scorer(model, tokenizer, batch=2)
    pairs = [asked(model, tokenizer, tokens) for tokens in visual]
    outcomes = scorer.score(visual, [scorer.pack([question for question, _ in clip]) for clip in pairs])
    checked = 0
    for clip, row in zip(pairs, outcomes, strict=True):
        assert len(clip) == len(row)
        for (question, said), outcome in zip(clip, row, strict=True):
            wanted = [*tokenizer(question.answer)["input_ids"], tokenizer.eos_token_id]
            both = min(len(outcome.said), len(said))
            assert list(outcome.said[:both]) == said[:both]
            assert outcome.right == (list(outcome.said) == wanted)
            checked += both
    assert checked > 9  # more than first tokens were compared


def test_the_newline_and_the_tokens_are_seen(model: Any, tokenizer: Any, visual: list[Tensor]) -> None:
    """Negative control: without the newline, or with another clip's tokens, the decoder's scores are others."""
    packer = packing.Packer(tokenizer)
    pack = packer.pack([(TEXTS[0], "white")])
    newline = model.model.image_newline.detach()[None]
    rows = []
    with torch.no_grad():
        for seen in (torch.cat((visual[0], newline)), visual[0], torch.cat((visual[1][:9], newline))):
            sequences = packing.batch(packer.prefix, [seen], [pack], model.get_input_embeddings())
            rows.append(packing.logits(model, sequences))
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    assert not torch.allclose(rows[0], rows[2], atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_clips_do_not_see_one_another(model: Any, tokenizer: Any, visual: list[Tensor], batch: int) -> None:
    scorer = Scorer(model, tokenizer, batch=batch)
    packs = [scorer.pack([Question("colour", text, "blue") for text in TEXTS[: 3 - clip]]) for clip in range(3)]
    together = scorer.score(visual, packs)
    alone = [scorer.score([tokens], [pack])[0] for tokens, pack in zip(visual, packs, strict=True)]
    assert together == alone
    assert [len(row) for row in together] == [3, 2, 1]


def test_right_and_wrong(model: Any, tokenizer: Any, visual: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that is right about everything, but for one token of the second clip's second question."""

    def logits(model: Any, sequences: Batch) -> Tensor:
        likeliest = sequences.target.clone()
        if len(sequences.target) > 1:
            place = ((sequences.block[1] == 1) & (sequences.target[1] != IGNORE)).nonzero()[1]
            likeliest[1, place] = 7
        return torch.nn.functional.one_hot(likeliest.clamp_min(0), 1280).float()

    monkeypatch.setattr(packing, "logits", logits)
    scorer = Scorer(model, tokenizer)
    answers = ("bottom left", "top right")
    packs = [scorer.pack([Question("where", text, answer) for text in TEXTS for answer in answers])] * 2
    outcomes = scorer.score(visual[:2], packs)
    assert [[outcome.right for outcome in row] for row in outcomes] == [[True] * 6, [True, False, *[True] * 4]]
    stop = tokenizer.eos_token_id
    words = [[*tokenizer(answer)["input_ids"]] for answer in answers]
    assert len(words[1]) > 1 or words[1] != words[0]
    assert outcomes[0][0].said == (*words[0], stop)
    assert outcomes[1][1].said == (words[1][0], 7)  # and nothing after the first wrong token


def test_every_clip_needs_its_questions(model: Any, tokenizer: Any, visual: list[Tensor]) -> None:
    scorer = Scorer(model, tokenizer)
    with pytest.raises(ValueError, match="3 clips and 1 packs"):
        scorer.score(visual, [scorer.pack([Question("colour", TEXTS[0], "red")])])
    pack = scorer.pack([Question("colour", TEXTS[0], "red")])
    with pytest.raises(ValueError, match="3 clips, and 1 of them are told of"):
        scorer.score(visual, [pack] * 3, [packing.Standing(400)])


def test_each_clip_is_told_its_own(model: Any, tokenizer: Any, visual: list[Tensor]) -> None:
    """In portions of any size."""
    packs = [Scorer(model, tokenizer).pack([Question("colour", text, "blue") for text in TEXTS]) for _ in visual]
    told = [packing.Standing(99, 3 * torch.arange(len(one)), torch.linspace(-3, 3, len(one))) for one in visual]
    whole = Scorer(model, tokenizer, batch=16).score(visual, packs, told)
    assert whole == Scorer(model, tokenizer, batch=1).score(visual, packs, told)
    assert whole == Scorer(model, tokenizer, batch=2).score(visual, packs, told)
    assert whole != Scorer(model, tokenizer).score(visual, packs)
