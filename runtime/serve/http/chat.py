"""Converts the messages of a request to a conversation about one video.

A message's content is a text, or a list of parts: texts, and in a user's message the video (`video_url`, or `file` with
the id of an uploaded one). A video that a client repeats verbatim in several messages is one video; it stays in the
first of them, so that all questions share its prefix. Several texts of a message are joined by line breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from earlytom.numbers import shown
from runtime.serve.media import VideoPart
from runtime.serve.protocol import only, refuse, unsupported
from runtime.text.messages import ChatMessage, Role

_ROLES = {role: role for role in get_args(Role)} | {"developer": "system"}
_MOST_MESSAGES = 1000


def conversation_of(messages: Sequence[Any]) -> tuple[list[ChatMessage], VideoPart]:
    """The conversation and its video.

    Raises:
        ServeError: 400: messages of another form than OpenAI's, no video, or more than one.
    """
    if len(messages) > _MOST_MESSAGES:
        refuse("messages", f"there are {len(messages)}; give at most {_MOST_MESSAGES}")
    found: list[ChatMessage] = []
    video: VideoPart | None = None
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        role = _role(message, where)
        texts, videos = _parts(message.get("content"), role, where)
        shows = video is None and bool(videos)
        video = videos[0] if shows else video
        if any(one != video for one in videos):
            refuse("messages", "there is more than one video; ask about one at a time", "one_video")
        found.append(ChatMessage(role, "\n".join(texts), video=shows))
    if video is None:
        refuse("messages", "there is no video; add a part {'type': 'video_url', 'video_url': {...}}", "one_video")
    return found, video


def _role(message: Any, where: str) -> Role:
    if not isinstance(message, dict):
        refuse("messages", f"{where} is no object; give {{'role': ..., 'content': ...}}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse("messages", f"{where} has the role {shown(role)}; give one of {', '.join(_ROLES)}")
    only(message, {"role", "content"}, f"{where}.")
    return _ROLES[role]


def _parts(content: Any, role: Role, where: str) -> tuple[list[str], list[VideoPart]]:
    """Texts and videos of a message."""
    if isinstance(content, str) or (content is None and role == "assistant"):
        return [content or ""], []
    if not isinstance(content, list):
        refuse("messages", f"{where}.content is {shown(content)}; give a text or a list of parts")
    texts, videos = [], []
    for number, part in enumerate(content):
        here = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part, {"type", "text"}, "text", here))
        elif kind in ("video_url", "file"):
            if role != "user":
                refuse("messages", f"{here} is a video of the {role}; videos are the user's")
            videos.append(_video(part, kind, here))
        elif isinstance(kind, str):
            unsupported("messages", f"{here} has the type {shown(kind)}; text, video_url and file are supported")
        else:
            refuse("messages", f"{here} is {shown(part)}; give an object with a type")
    return texts, videos


def _video(part: dict[str, Any], kind: str, here: str) -> VideoPart:
    only(part, {"type", kind}, f"{here}.")
    inner = part.get(kind)
    name = "url" if kind == "video_url" else "file_id"
    if not isinstance(inner, dict):
        refuse("messages", f"{here}.{kind} is {shown(inner)}; give {{'{name}': ...}}")
    text = _text(inner, {name}, name, f"{here}.{kind}")
    if not text:
        refuse("messages", f"{here}.{kind}.{name} is empty")
    return VideoPart(file=text) if kind == "file" else VideoPart(url=text)


def _text(given: dict[str, Any], known: set[str], name: str, where: str) -> str:
    only(given, known, f"{where}.")
    text = given.get(name)
    if not isinstance(text, str):
        refuse("messages", f"{where}.{name} is {shown(text)}; give a text")
    return text
