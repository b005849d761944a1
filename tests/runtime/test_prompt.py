"""Prompts: what transformers' processor makes of one video and one text, and texts that would break it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from earlytom.errors import UserError
from runtime.checkpoint import VisionPart, load_model, load_tokenizer
from runtime.prompt import Prompt, build_prompt, check_length, splice, stop_token_ids

QUESTION = "What colour is the big circle?"
FRAMES, GRID, CELLS = 3, 9, 25
VISUAL = FRAMES * CELLS + 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model(talkative: Path) -> Any:
    return load_model(talkative)


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, FRAMES, 3, 72, 72, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def processor_ids(tokenizer: Any, question: str, system: str | None = None) -> list[int]:
    """What transformers' processor does, in its order: render, repeat the placeholder in the text, tokenize."""
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor: Any = SimpleNamespace(num_image_tokens=GRID * GRID, video_token="<video>")
    video = LlavaOnevisionProcessor.replace_video_token(processor, {"pixel_values_videos": pixels()}, 0)
    return tokenizer(text.replace("<video>", video))["input_ids"]


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        "?",
        " leading and trailing \n",
        "Was ist das? 日本語 ☃",
        "a < b > video",
        "{{ 1 }} {% x %}",
        "x" * 5000,
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_ids_are_those_of_the_processor(tokenizer: Any, question: str, system: str | None) -> None:
    prompt = build_prompt(tokenizer, question, system=system)
    expected = processor_ids(tokenizer, question, system)
    assert prompt.input_ids(VISUAL).tolist() == [expected]
    assert prompt.length(VISUAL) == len(expected)
    assert prompt.input_ids(VISUAL - 1).tolist() != [expected]


def test_the_text_around_the_video_is_that_of_the_chat_form(tokenizer: Any) -> None:
    prompt = build_prompt(tokenizer, QUESTION, system="Be brief.")
    before = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.decode(prompt.prefix_ids) == before
    assert tokenizer.decode(prompt.suffix_ids) == f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.video_token_id == tokenizer.convert_tokens_to_ids("<video>")


def test_spliced_embeddings_are_those_of_the_model(tokenizer: Any, model: Any) -> None:
    prompt, part = build_prompt(tokenizer, QUESTION), VisionPart.from_model(model)
    with torch.no_grad():
        visual = model.get_video_features(pixels()).pooler_output[0]  # ends with image_newline
        ids = prompt.input_ids(VISUAL)
        expected = model.get_input_embeddings()(ids)
        expected[ids == prompt.video_token_id] = visual
        spliced = splice(prompt, visual[:-1], part.image_newline, model.get_input_embeddings())
        assert torch.equal(spliced, expected)
        assert torch.equal(splice(prompt, visual, None, model.get_input_embeddings()), expected)
        assert not torch.equal(splice(prompt, visual.flip(0), None, model.get_input_embeddings()), expected)


def test_spliced_tokens_take_the_type_of_the_text(tokenizer: Any, model: Any) -> None:
    prompt = build_prompt(tokenizer, QUESTION)
    visual = torch.full((4, 256), 0.1, dtype=torch.float16)
    spliced = splice(prompt, visual, torch.zeros(256, dtype=torch.bfloat16), model.get_input_embeddings())
    assert spliced.dtype == torch.float32
    assert spliced.shape == (1, prompt.length(5), 256)
    assert torch.equal(spliced[0, len(prompt.prefix_ids)], visual[0].float())


def test_both_ways_into_the_model_give_the_same_answer(tokenizer: Any, model: Any) -> None:
    prompt = build_prompt(tokenizer, QUESTION)
    with torch.no_grad():
        visual = model.get_video_features(pixels()).pooler_output[0]
        embeddings = splice(prompt, visual, None, model.get_input_embeddings())
    ids = prompt.input_ids(VISUAL)
    whole = model.generate(input_ids=ids, pixel_values_videos=pixels(), max_new_tokens=6)[0, ids.shape[1] :]
    mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
    spliced = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=6)[0]
    other = model.generate(input_ids=ids, pixel_values_videos=pixels(1), max_new_tokens=6)[0, ids.shape[1] :]
    assert spliced.tolist() == whole.tolist()
    assert other.tolist() != whole.tolist()


@pytest.mark.parametrize("question", ["", " ", "\n\t"])
def test_an_empty_question_is_refused(tokenizer: Any, question: str) -> None:
    with pytest.raises(UserError, match="empty"):
        build_prompt(tokenizer, question)


@pytest.mark.parametrize("token", ["<video>", "<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens_in_a_text_are_refused(tokenizer: Any, token: str) -> None:
    with pytest.raises(UserError) as error:
        build_prompt(tokenizer, f"What is{token}this?")
    assert token in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="system message"):
        build_prompt(tokenizer, QUESTION, system=f"You are {token}")
    build_prompt(tokenizer, f"What is {token[:-1]} this?")  # only the whole token is one


def test_text_that_is_not_unicode_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        build_prompt(tokenizer, b"caf\xe9?".decode(errors="surrogateescape"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] | length }}",  # no video
        "<video><video>",
        "{{ messages[0]['content'].strip() }}",  # for plain texts only
        "{% for",
    ],
)
def test_a_template_that_does_not_place_one_video_is_refused(template: str) -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template") as error:
        build_prompt(tokenizer, QUESTION)
    assert "\n" not in str(error.value)


def test_another_placeholder_can_be_named(tokenizer: Any) -> None:
    assert build_prompt(tokenizer, QUESTION, video_token="<video>") == build_prompt(tokenizer, QUESTION)
    with pytest.raises(UserError, match="0 times"):
        build_prompt(tokenizer, QUESTION, video_token="<|video_pad|>")


def test_length_is_checked_against_the_context() -> None:
    prompt = Prompt((1, 2), (3,), 9)
    check_length(prompt, visual_tokens=10, new_tokens=7, context=20)
    with pytest.raises(UserError, match=r"21 tokens \(3 of text, 10 of the video, 8 to generate\) .* 20"):
        check_length(prompt, visual_tokens=10, new_tokens=8, context=20)


@pytest.mark.parametrize(("configured", "expected"), [(None, (1277,)), (7, (7,)), ([7, 8], (7, 8))])
def test_stop_tokens_come_from_the_generation_settings_first(
    tokenizer: Any, configured: Any, expected: tuple[int, ...]
) -> None:
    assert stop_token_ids(GenerationConfig(eos_token_id=configured), tokenizer) == expected
    assert stop_token_ids(None, tokenizer) == (1277,)


def test_the_bundled_model_stops_where_generate_does(tokenizer: Any, model: Any) -> None:
    stops = stop_token_ids(model.generation_config, tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(stops)) == ["<|im_end|>", "<|endoftext|>"]


def test_no_stop_token_is_an_error() -> None:
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no stop token"):
        stop_token_ids(GenerationConfig(), tokenizer)


@pytest.mark.parametrize("given", [None, 3, b"What happens?", ["What happens?"]])
def test_a_text_that_is_no_str_is_refused(tokenizer: Any, given: Any) -> None:
    with pytest.raises(UserError, match=f"the question is a {type(given).__name__}"):
        build_prompt(tokenizer, given)
    if given is not None:
        with pytest.raises(UserError, match=f"the system message is a {type(given).__name__}"):
            build_prompt(tokenizer, "What happens?", system=given)


@pytest.mark.parametrize("given", [None, 1.5, "3"])
def test_a_count_of_new_tokens_that_is_no_whole_number_is_refused(tokenizer: Any, given: Any) -> None:
    prompt = build_prompt(tokenizer, "What happens?")
    check_length(prompt, visual_tokens=1, new_tokens=3, context=4096)
    with pytest.raises(UserError, match="max_new_tokens is"):
        check_length(prompt, visual_tokens=1, new_tokens=given, context=4096)


def test_a_long_question_is_no_warning_of_the_tokenizer_s(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    tokenizer = load_tokenizer()  # each says it once
    words = "word " * (tokenizer.model_max_length + 1)
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", "transformers.tokenization_utils_base"):  # whatever is shown elsewhere
            prompt = build_prompt(tokenizer, words)
            quiet = not caplog.records
            tokenizer(words + "again")
    finally:
        logging.disable_propagation()
    assert quiet
    assert "longer than" in caplog.text  # it does speak otherwise
    with pytest.raises(UserError, match="shorten the question"):
        check_length(prompt, visual_tokens=1, new_tokens=1, context=4096)
