"""Prompts with a span a frame: what transformers' processor makes of them, what is left, and where it stands."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

from earlytom.errors import UserError
from earlytom.families import FAMILIES, INTERNVL, LLAVA_ONEVISION, Closings, FrameTimes
from earlytom.families.smolvlm import SMOLVLM
from earlytom.micro.random_model import published_tokenizer
from earlytom.standing import FrameSpan, frame_spans
from runtime.checkpoint import load_tokenizer
from runtime.text.messages import ChatMessage
from runtime.text.places import Placing
from runtime.text.prompt import Prompt, build_prompt, check_length, splice
from tests.earlytom.tiny import MODELS, tiny_internvl, tiny_smolvlm

QUESTION = "What colour is the big circle?"
FRAMES, CELLS = 12, 4
ALL = [FrameSpan(number, CELLS) for number in range(FRAMES)]


@functools.cache
def tokenizer() -> Any:
    return published_tokenizer(load_tokenizer(), tiny_internvl(bundled=True).config)


@functools.cache
def prompt(*, system: str | None = None) -> Prompt:
    return build_prompt(tokenizer(), QUESTION, system=system, family=INTERNVL)


def processor_ids(frames: int, system: str | None = None) -> list[int]:
    """What transformers' processor does, in its order: render, put the frames' texts in, tokenize.

    Its own code makes the texts of the frames; the whole of it cannot be made without torchvision.
    """
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor: Any = SimpleNamespace(
        start_image_token="<img>", image_token="<IMG_CONTEXT>", end_image_token="</img>", image_seq_length=CELLS
    )
    video = {"pixel_values_videos": torch.zeros(1, frames, 3, 2, 2)}
    return tokenizer()(text.replace("<video>", InternVLProcessor.replace_video_token(processor, video, 0)))["input_ids"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_the_processors(system: str | None) -> None:
    words = prompt(system=system)
    ids = words.input_ids(FRAMES * CELLS, ALL)
    assert ids.tolist() == [processor_ids(FRAMES, system)]
    assert words.length(FRAMES * CELLS, ALL) == ids.shape[1] == words.room(FRAMES * CELLS, FRAMES, FRAMES)
    spots = (ids[0] == words.video_token_id).nonzero().flatten().tolist()
    assert list(words.visual_span(FRAMES * CELLS, ALL)) == spots
    assert words.input_ids(CELLS, ALL[:1]).tolist() == [processor_ids(1, system)]


SMOL_MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]


def smol_ids(own: Any, times: FrameTimes, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What SmolVLM2's processor makes of a video whose frames were at such times, a whole number of which is a second.

    Its own code makes the texts of the video; the library that it asks for numbers is not there.
    """
    monkeypatch.setattr(processing_smolvlm, "num2words", {8: "eight", 12: "twelve"}.__getitem__)
    processor: Any = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
        image_seq_len=CELLS,
    )
    indices = [round(second * 4) for second in times.seconds]
    metadata = VideoMetadata(total_num_frames=0, fps=4.0, duration=times.duration, frames_indices=indices)
    video = {"pixel_values": torch.zeros(1, len(indices), 3, 2, 2), "video_metadata": [metadata]}
    text = own.apply_chat_template(
        SMOL_MESSAGES,
        chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    texts = processing_smolvlm.SmolVLMProcessor.replace_video_token(processor, video, 0)
    return own(text.replace("<video>", texts))["input_ids"]


@pytest.mark.parametrize("frames", [8, 12])
def test_ids_that_say_when_frames_were_are_the_processors(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = published_tokenizer(load_tokenizer(), tiny_smolvlm(bundled=True).config)
    words = build_prompt(own, QUESTION, family=SMOLVLM)
    times = FrameTimes(tuple(7.25 * number for number in range(frames)), 91.5)
    spans = [FrameSpan(number, CELLS) for number in range(frames)]
    told = words.at(times)
    wanted = smol_ids(own, times, monkeypatch)
    assert told.input_ids(frames * CELLS, spans).tolist() == [wanted]
    assert told.suffix_ids == words.suffix_ids
    assert told.length(frames * CELLS, spans) <= words.room(frames * CELLS, frames, frames)
    later = FrameTimes(tuple(second + 1 for second in times.seconds), 91.5)
    assert told.input_ids(frames * CELLS, spans).tolist() != [smol_ids(own, later, monkeypatch)]  # negative control
    # What is left of a video says when it was: the text of the first frame, that of the last.
    some = told.input_ids(3, [FrameSpan(0, 2), FrameSpan(frames - 1, 1)])[0].tolist()
    rest = wanted[: len(told.prefix_ids)]
    name = told.names.before(frames - 1) if told.names is not None else ()
    visual = told.video_token_id
    assert some == [*rest, visual, visual, *name, visual, *told.suffix_ids]
    assert f"{int(7.25 * (frames - 1)) // 60:02d}:{int(7.25 * (frames - 1)) % 60:02d}:" in own.decode(name)


def test_a_prompt_that_names_no_times_is_the_same_at_any() -> None:
    words = prompt()
    assert words.at(FrameTimes((0.0,) * FRAMES, 1.0)) is words


def kept(draw: st.DataObject) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and sources of some tokens of some frames, the first among them."""
    slots = [0, *draw.draw(st.lists(st.integers(1, FRAMES - 1), unique=True, max_size=5).map(sorted))]
    sources = torch.zeros(len(slots), FRAMES)
    for slot, frame in enumerate(slots):
        sources[slot, frame] = 0.7
        sources[slot, max(frame - 1, 0)] += 0.3
    cells = [draw.draw(st.lists(st.integers(0, CELLS - 1), unique=True, min_size=1).map(sorted)) for _ in slots]
    return torch.tensor([slot * CELLS + cell for slot, some in enumerate(cells) for cell in some]), sources


@given(st.data())
def test_what_is_left_keeps_the_name_and_the_place_that_it_had(data: st.DataObject) -> None:
    """Ids, positions and embeddings of a shortened prompt are those of the whole one, without what was left out."""
    words = prompt()
    positions, sources = kept(data)
    numbers = [int(row.argmax()) for row in sources]
    spans = frame_spans(positions, sources, CELLS)
    assert [span.number for span in spans] == numbers
    place = torch.tensor([numbers[int(one) // CELLS] * CELLS + int(one) % CELLS for one in positions])
    told = Placing(original=True, bias=True).of_frames(words, place, place.float() + 1, FRAMES, CELLS, spans)
    ids, whole = words.input_ids(len(place), spans)[0], torch.tensor(processor_ids(FRAMES))
    assert torch.equal(whole[told["positions"]], ids)
    assert told["positions"].diff().gt(0).all()
    assert told["positions"][-1] == len(whole) - 1
    # Read up to the end of the video, it goes on where it would have; in a video that is fitted, too.
    after = torch.arange(len(words.suffix_ids))
    for shown in (FRAMES, FRAMES - 5):
        placing = Placing(original=True, most=shown * CELLS)
        given = (place, place.float(), FRAMES, CELLS, spans)
        begin = placing.after(words, FRAMES, Closings(None, (1, CELLS)))
        assert begin is not None
        both = [placing.of_frames(one, *given)["positions"] for one in (words, replace(words, suffix_ids=()))]
        assert torch.equal(torch.cat([both[1], begin + after]), both[0])
    assert Placing(bias=True).after(words, FRAMES, Closings(None, (1, CELLS))) is None
    visual = ids == words.video_token_id
    assert torch.equal(told["bias"], torch.zeros(len(ids)).masked_scatter(visual, place.float() + 1))
    assert len(ids) == words.length(len(place), spans) <= words.room(len(place), len(spans), FRAMES)

    table = torch.randn(1300, 8)
    values = torch.randn(len(place), 8)
    spliced = splice(words, values, lambda given: table[given], spans)
    assert torch.equal(spliced[0], table[ids].masked_scatter(visual[:, None], values))
    assert Placing().of_frames(words, place, place.float(), FRAMES, CELLS, spans) == {}


def test_a_longer_video_is_fitted_into_the_positions_of_the_frames_that_the_model_knows() -> None:
    words, shown = prompt(), 5
    place, bias = torch.arange(FRAMES * CELLS), torch.zeros(FRAMES * CELLS)
    whole = Placing(original=True).of_frames(words, place, bias, FRAMES, CELLS, ALL)["positions"]
    told = Placing(original=True, most=shown * CELLS).of_frames(words, place, bias, FRAMES, CELLS, ALL)["positions"]
    assert torch.equal(whole, torch.arange(len(whole)))
    assert told.diff().ge(0).all()
    assert told.shape == whole.shape
    assert int(told[-1]) + 1 == words.room(shown * CELLS, shown, shown) < len(whole)
    same = Placing(original=True, most=FRAMES * CELLS).of_frames(words, place, bias, FRAMES, CELLS, ALL)["positions"]
    assert torch.equal(same, whole)


def test_the_first_frame_left_is_called_the_first() -> None:
    sources = torch.eye(4)[[2, 3]]
    assert frame_spans(torch.tensor([0, 1, 5]), sources, 4) == (FrameSpan(0, 2), FrameSpan(3, 1))
    assert frame_spans(torch.empty(0, dtype=torch.int64), sources, 4) == ()


def test_a_prompt_that_names_frames_may_be_too_long() -> None:
    words = prompt()
    length = words.length(FRAMES * CELLS, ALL)
    how = {"visual_tokens": FRAMES * CELLS, "left": FRAMES, "frames": FRAMES}
    check_length(words, **how, new_tokens=1, context=length + 1)
    with pytest.raises(UserError, match=f"{length + 1} tokens .* exceed the model's context of {length}"):
        check_length(words, **how, new_tokens=1, context=length)


@pytest.mark.parametrize("text", ["<video>", "<img>", "<IMG_CONTEXT>"])
def test_a_question_that_spells_a_placeholder_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="a control token of the model"):
        build_prompt(tokenizer(), f"What is {text}?", family=INTERNVL)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'][-1]['text'] }}", "<video><video>"])
def test_a_template_without_one_video_is_refused(template: str) -> None:
    own = published_tokenizer(load_tokenizer(), tiny_internvl(bundled=True).config)
    own.chat_template = template
    with pytest.raises(UserError, match=r"the chat template places <video> [02] times; expected once"):
        build_prompt(own, QUESTION, family=INTERNVL)


@pytest.mark.parametrize("family", FAMILIES.values())
def test_a_conversation_shows_its_video_once(family: Any) -> None:
    own = load_tokenizer()
    if family.visual_token not in own.get_added_vocab():
        own = published_tokenizer(own, MODELS[family.model_type](bundled=True).config)
    said = [
        ChatMessage("user", QUESTION, video=True),
        ChatMessage("assistant", "Red."),
        ChatMessage("user", "And now?"),
    ]
    first, later = (build_prompt(own, messages, family=family) for messages in (said[:1], said))
    assert first.prefix_ids == later.prefix_ids
    assert len(first.suffix_ids) < len(later.suffix_ids)
    assert LLAVA_ONEVISION.closings((2, 2)).behind == 1
