"""A conversation about one video: its messages, one of which holds the video.

A plain-text question is a conversation of one message, or of two with a system message before it. Conversations are
checked here, before a chat template renders them. Nothing here knows of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from earlytom.errors import UserError
from earlytom.numbers import shown

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: may be empty for an assistant, and for a user's message with the video if a later one asks.
        video: whether the video is in this message, before its text. At most one message, of a user, has it; if none
            has, it goes into the first user's.
    """

    role: Role
    text: str
    video: bool = False


def conversation(question: str | Sequence[ChatMessage], system: str | None = None) -> dict[str, ChatMessage]:
    """Check a question; returns its messages, exactly one with the video, keyed by their names in errors.

    Args:
        question: a text, or messages, the last of which is a user's.
        system: a system message before a text.

    Raises:
        UserError: no text, no messages, a system message beside messages, an unknown role, a message without a text,
            two videos, one that is not in a user's message, or a last message that is not a user's.
    """
    if isinstance(question, list | tuple) and question and all(isinstance(one, ChatMessage) for one in question):
        return _checked(question, system)
    for what, argument, given in (("question", "prompt", question), ("system message", "system", system)):
        if given is None and what == "system message":
            continue
        if not isinstance(given, str):
            more = ", or a list of ChatMessage" if what == "question" else ""
            raise UserError(f"the {what} is a {type(given).__name__}, not a text: give {argument} a str{more}")
        if not given.strip():
            raise UserError(
                f"the {what} is empty ({argument}={given[:9]!r}); expected a text, as in: python -m runtime.ask VIDEO "
                "'What happens?'"
            )
    assert isinstance(question, str)
    before = {} if system is None else {"system message": ChatMessage("system", system)}
    return before | {"question": ChatMessage("user", question, video=True)}


def rendered(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take."""
    return [
        {
            "role": one.role,
            "content": [{"type": "video"}] * one.video + [{"type": "text", "text": one.text}] * bool(one.text),
        }
        for one in messages
    ]


def _checked(messages: Sequence[ChatMessage], system: str | None) -> dict[str, ChatMessage]:
    if system is not None:
        raise UserError("a system message stands beside messages: give it as the first of them, or give a text")
    for number, one in enumerate(messages, 1):
        if one.role not in get_args(Role):
            raise UserError(f"message {number} has the role {shown(one.role)}: give one of {', '.join(get_args(Role))}")
        if not isinstance(one.text, str):
            raise UserError(f"message {number} has a {type(one.text).__name__}, not a text: give it a str")
        if one.video and one.role != "user":
            raise UserError(f"the video is in message {number}, of the {one.role}: put it into a user's")
    if messages[-1].role != "user":
        raise UserError(f"the last message is the {messages[-1].role}'s: end with the question of a user")
    if (videos := sum(one.video for one in messages)) > 1:
        raise UserError(f"{videos} messages have a video: ask about one video at a time")
    if not videos:
        first = next(at for at, one in enumerate(messages) if one.role == "user")
        messages = [dataclasses.replace(one, video=at == first) for at, one in enumerate(messages)]
    for number, one in enumerate(messages, 1):
        if not one.text.strip() and not (one.role == "assistant" or (one.video and number < len(messages))):
            what = "the question is empty" if number == len(messages) else f"message {number} ({one.role}) is empty"
            raise UserError(f"{what}; expected a text")
    last = len(messages)
    return {"question" if at == last else f"message {at} ({one.role})": one for at, one in enumerate(messages, 1)}
