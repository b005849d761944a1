"""Prompts: what transformers' processor makes of one video and one text, and texts that would break it."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from earlytom.errors import UserError
from runtime.checkpoint import VisionPart, load_model, load_tokenizer
from runtime.text.messages import ChatMessage
from runtime.text.prompt import (
    Prompt,
    _refuse_long,
    build_prompt,
    bytes_per_token,
    check_length,
    splice,
    stop_token_ids,
)
from tests.runtime.text.test_messages import processor_ids

QUESTION = "What colour is the big circle?"
FRAMES, CELLS = 3, 25
VISUAL = FRAMES * CELLS + 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@functools.cache
def shared_tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model(talkative: Path) -> Any:
    return load_model(talkative)


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, FRAMES, 3, 72, 72, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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
    before = [] if system is None else [ChatMessage("system", system)]
    expected = processor_ids([*before, ChatMessage("user", question)], -1)
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
        spliced = splice(prompt, torch.cat([visual[:-1], part.closing[None]]), model.get_input_embeddings())
        assert torch.equal(spliced, expected)
        assert torch.equal(splice(prompt, visual, model.get_input_embeddings()), expected)
        assert not torch.equal(splice(prompt, visual.flip(0), model.get_input_embeddings()), expected)


def test_spliced_tokens_take_the_type_of_the_text(tokenizer: Any, model: Any) -> None:
    prompt = build_prompt(tokenizer, QUESTION)
    visual = torch.full((4, 256), 0.1, dtype=torch.float16)
    spliced = splice(prompt, visual, model.get_input_embeddings())
    assert spliced.dtype == torch.float32
    assert spliced.shape == (1, prompt.length(4), 256)
    assert torch.equal(spliced[0, len(prompt.prefix_ids)], visual[0].float())


def test_both_ways_into_the_model_give_the_same_answer(tokenizer: Any, model: Any) -> None:
    prompt = build_prompt(tokenizer, QUESTION)
    with torch.no_grad():
        visual = model.get_video_features(pixels()).pooler_output[0]
        embeddings = splice(prompt, visual, model.get_input_embeddings())
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


@pytest.mark.parametrize("given", [None, 1.5, "3", True, 0, -1, float("nan")])
def test_a_count_of_new_tokens_that_is_no_whole_number_is_refused(tokenizer: Any, given: Any) -> None:
    prompt = build_prompt(tokenizer, "What happens?")
    check_length(prompt, visual_tokens=1, new_tokens=3, context=4096)
    with pytest.raises(UserError, match=r"max_new_tokens .* must be a whole number of at least 1, got"):
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


# A text that is too long for certain


def test_a_token_stands_for_so_many_bytes(tokenizer: Any) -> None:
    found = bytes_per_token(tokenizer)
    assert found is not None
    for token, index in tokenizer.get_vocab().items():
        assert len(tokenizer.decode([index]).encode("utf-8", "replace")) <= max(found, 3), token


@given(st.text(alphabet=st.sampled_from("ab e\u0301\u00e9\u212b\u1fbe\u0308\U0001d160 \n1"), max_size=60))
def test_no_text_that_fits_is_refused(text: str) -> None:
    """Its tokens times the bytes of the longest are never fewer than its bytes, once it is normalised."""
    tokenizer = shared_tokenizer()
    reach = bytes_per_token(tokenizer)
    assert reach is not None
    ids = tokenizer(text)["input_ids"]
    _refuse_long(tokenizer, text, len(ids) * reach, {"question": text})


def test_a_long_text_is_refused_before_it_is_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = bytes_per_token(tokenizer)
    assert reach is not None
    texts = {"ascii": "x" * 1_000_000, "composed": "e\u0301" * 400_000}

    def tokenize(*args: Any, **how: Any) -> Any:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(type(tokenizer), "__call__", tokenize)
    for text in texts.values():
        for how, name in (((text, None), r"question \(prompt\)"), ((QUESTION, text), r"system message \(system\)")):
            with pytest.raises(UserError, match=rf"the {name} has {len(text)} characters.*shorten") as caught:
                build_prompt(tokenizer, how[0], system=how[1], most_bytes=4096 * reach)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 300
    with pytest.raises(AssertionError, match="it was tokenized"):  # negative control
        build_prompt(tokenizer, QUESTION, most_bytes=4096 * reach)


def test_a_text_that_just_fits_is_taken(tokenizer: Any) -> None:
    """The longest token, again and again, as much as the bound allows: a bound that is one byte lower refuses it."""
    names = {token: len(token) for token in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)}
    word = tokenizer.decode([tokenizer.get_vocab()[max(names, key=names.__getitem__)]])
    text = word * 200
    size = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}],
            tokenize=False,
            add_generation_prompt=True,
        ).encode()
    )
    assert build_prompt(tokenizer, text, most_bytes=size) == build_prompt(tokenizer, text)
    with pytest.raises(UserError, match="cannot fit"):
        build_prompt(tokenizer, text, most_bytes=size - 1)


def test_tokenizers_that_may_lose_text_promise_nothing() -> None:
    def fast(model: Any, splitter: Any, **how: Any) -> Any:
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = splitter
        return PreTrainedTokenizerFast(tokenizer_object=made, **how)

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    whole, part = models.BPE(letters, []), models.BPE({"a": 0, "b": 1}, [])
    level = pre_tokenizers.ByteLevel()
    assert bytes_per_token(fast(whole, level)) == 1  # negative control
    dropping = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), level])
    spaced = tokenizers.AddedToken("<gap>", lstrip=True)
    for odd in (
        fast(part, level),
        fast(whole, dropping),
        fast(whole, pre_tokenizers.Whitespace()),
        fast(models.WordLevel({"a": 0}, unk_token="a"), level),
        fast(whole, level, additional_special_tokens=[spaced]),
        SimpleNamespace(),
    ):
        assert bytes_per_token(odd) is None


def test_a_normalizer_that_shortens_a_text_is_asked_first() -> None:
    tokenizer: Any = load_tokenizer()
    text = "a" + " " * 5000 + "b"
    with pytest.raises(UserError, match="cannot fit"):
        build_prompt(tokenizer, text, most_bytes=1000)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    assert build_prompt(tokenizer, text, most_bytes=1000) == build_prompt(tokenizer, "a b")
