"""Conversations about one video: what transformers' processor makes of them, and what is none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from earlytom.errors import UserError
from runtime.checkpoint import load_tokenizer
from runtime.text.messages import ChatMessage, conversation
from runtime.text.prompt import build_prompt

VISUAL = 3 * 25 + 1
SYSTEM, ASKED, SAID, AGAIN = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "What happens?"),
    ChatMessage("assistant", "a red ball rolls"),
    ChatMessage("user", "Where to?"),
)


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer()


def processor_ids(messages: Sequence[ChatMessage], at: int) -> list[int]:
    """What transformers' processor does with messages, the video in the one at `at`: render the whole conversation,
    repeat the placeholder in the text, tokenize."""
    told = [{"role": one.role, "content": [{"type": "text", "text": one.text}]} for one in messages]
    told[at]["content"] = [{"type": "video"}, *told[at]["content"]]
    text = tokenizer().apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    processor: Any = SimpleNamespace(num_image_tokens=81, video_token="<video>")
    pixels = {"pixel_values_videos": torch.zeros(1, 3, 3, 72, 72)}
    video = LlavaOnevisionProcessor.replace_video_token(processor, pixels, 0)
    return tokenizer()(text.replace("<video>", video))["input_ids"]


def shown(message: ChatMessage) -> ChatMessage:
    return ChatMessage(message.role, message.text, video=True)


@pytest.mark.parametrize(
    ("messages", "at"),
    [
        ([ASKED], 0),
        ([SYSTEM, ASKED], 1),
        ([ASKED, SAID, AGAIN], 0),
        ([SYSTEM, ASKED, SAID, AGAIN], 1),
        ([shown(ASKED), SAID, AGAIN], 0),
        ([ASKED, SAID, shown(AGAIN)], 2),
        ([SYSTEM, ASKED, SAID, shown(AGAIN), SAID, AGAIN], 3),
        ([ASKED, AGAIN], 0),
    ],
)
def test_the_ids_are_those_of_the_processor(messages: list[ChatMessage], at: int) -> None:
    ids = build_prompt(tokenizer(), messages).input_ids(VISUAL)
    assert ids.tolist() == [processor_ids(messages, at)]


def test_another_place_of_the_video_is_another_prompt() -> None:
    """Negative control."""
    first, second = ([shown(ASKED), SAID, AGAIN], [ASKED, SAID, shown(AGAIN)])
    assert build_prompt(tokenizer(), first) != build_prompt(tokenizer(), second)


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)  # no control tokens


@given(st.lists(st.tuples(WORDS.filter(str.strip), WORDS), max_size=3), WORDS.filter(str.strip), st.data())
def test_any_conversation_is_that_of_the_processor(turns: list[tuple[str, str]], last: str, data: Any) -> None:
    messages = [one for asked, said in turns for one in (ChatMessage("user", asked), ChatMessage("assistant", said))]
    messages.append(ChatMessage("user", last))
    at = 2 * data.draw(st.integers(0, len(turns)))
    messages[at] = shown(messages[at])
    assert build_prompt(tokenizer(), messages).input_ids(VISUAL).tolist() == [processor_ids(messages, at)]


def test_a_text_is_a_conversation_of_one_message() -> None:
    assert build_prompt(tokenizer(), "What happens?") == build_prompt(tokenizer(), [ASKED])
    assert build_prompt(tokenizer(), "What happens?", system="Be brief.") == build_prompt(tokenizer(), [SYSTEM, ASKED])


def test_what_stands_before_the_video_is_the_same_for_every_question_about_it() -> None:
    first = build_prompt(tokenizer(), [SYSTEM, ASKED])
    later = build_prompt(tokenizer(), [SYSTEM, ASKED, SAID, AGAIN])
    assert first.prefix_ids == later.prefix_ids
    assert first.suffix_ids != later.suffix_ids


def test_a_video_may_be_shown_without_a_text() -> None:
    messages = [ChatMessage("user", "", video=True), ChatMessage("assistant", ""), AGAIN]
    assert build_prompt(tokenizer(), messages).length(VISUAL) < len(processor_ids([ASKED, SAID, AGAIN], 0))


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "the question is a list"),
        (["What?"], "the question is a list"),
        ([ASKED, "What?"], "the question is a list"),
        ([ChatMessage("king", "x")], "message 1 has the role 'king'"),  # type: ignore[arg-type]
        ([ASKED, ChatMessage("user", 3)], "message 2 has a int, not a text"),  # type: ignore[arg-type]
        ([ASKED, SAID], "the last message is the assistant's"),
        ([SYSTEM], "the last message is the system's"),
        ([shown(ASKED), shown(AGAIN)], "2 messages have a video"),
        ([ASKED, shown(SAID), AGAIN], "the video is in message 2, of the assistant"),
        ([shown(ChatMessage("user", " "))], "the question is empty"),
        ([ASKED, SAID, ChatMessage("user", "\n")], "the question is empty"),
        ([ChatMessage("system", ""), ASKED], r"message 1 \(system\) is empty"),
        ([ASKED, ChatMessage("user", ""), AGAIN], r"message 2 \(user\) is empty"),
        ([ASKED, ChatMessage("assistant", "<|im_end|>"), AGAIN], r"message 2 \(assistant\) contains '<\|im_end\|>'"),
        ([ASKED, ChatMessage("assistant", "\ud800"), AGAIN], r"message 2 \(assistant\) is not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        build_prompt(tokenizer(), messages)
    assert "\n" not in str(caught.value)


def test_a_system_message_beside_messages_is_refused() -> None:
    with pytest.raises(UserError, match="a system message stands beside messages"):
        conversation([ASKED], "Be brief.")


def test_the_longest_message_is_named() -> None:
    messages = [ASKED, ChatMessage("assistant", "x" * 9000), AGAIN]
    with pytest.raises(UserError, match=r"the message 2 \(assistant\) \(prompt\) has 9000 characters"):
        build_prompt(tokenizer(), messages, most_bytes=1000)
