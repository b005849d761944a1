"""OpenAI's chat completions protocol: parses requests and makes response objects.

An unsupported field that would change the answer is refused by its name, never ignored; a neutral value (`n` 1,
`logprobs` false, null for anything) is accepted. Numbers are checked where they are used, by `earlytom.numbers`. Works
on dicts; knows nothing of pipelines or of the web framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from earlytom.errors import UserError
from earlytom.numbers import shown, whole
from runtime.decoder.sampling import Sampling
from runtime.serve.errors import ServeError

MOST_STOPS = 4
LONGEST_STOP = 256  # characters
# Of a body: millions of empty objects would take gigabytes, and seconds in which nobody is heard.
_MOST_COMMAS = 200_000
_TAKEN = {
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "seed", "stop", "media_io_kwargs", "earlytom"),
    *("user", "safety_identifier", "metadata", "prompt_cache_key"),  # do not change the answer
}
# OpenAI's fields that are accepted with these neutral values only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    # vLLM's clients send its defaults explicitly.
    **dict.fromkeys(("min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("best_of", "length_penalty"), (1,)),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "echo", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    "stop_token_ids": ([],),
}


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request, its messages still raw.

    Attributes:
        model: the client's name of it.
        messages: raw.
        sampling, stop, frames, kept: as in `Pipeline.submit`.
        max_tokens: None if not given.
        stream: whether the answer is streamed; include_usage: with a usage chunk at its end.
    """

    model: str
    messages: list[Any]
    sampling: Sampling
    stop: tuple[str, ...]
    frames: int | None
    max_tokens: int | None
    stream: bool
    include_usage: bool
    kept: bool


def parse(content: bytes, counts: Sequence[int], most_tokens: int) -> ChatRequest:
    """Parse the body of a request; ServeError 400 if it is invalid.

    Args:
        counts: the engine's frame counts.
        most_tokens: the most tokens of an answer.
    """
    given = _object(content)
    _check_names(given)
    if not isinstance(given.get("model"), str):
        refuse("model", "give the name of the model, a text (GET /v1/models lists it)")
    if not isinstance(given.get("messages"), list) or not given["messages"]:
        refuse("messages", "give a list of at least one message")
    stream = _switch(given, "stream")
    options = _inner(given, "stream_options", {"include_usage"})
    if options and not stream:
        refuse("stream_options", "they are for stream: true")
    return ChatRequest(
        model=given["model"],
        messages=given["messages"],
        sampling=_sampling(given),
        stop=_stops(given.get("stop")),
        frames=_frames(given, counts),
        max_tokens=_max_tokens(given, most_tokens),
        stream=stream,
        include_usage=_switch(options, "include_usage", "stream_options."),
        kept=_switch(_inner(given, "earlytom", {"kept"}), "kept", "earlytom."),
    )


def refuse(param: str, what: str, code: str = "invalid_request") -> NoReturn:
    """Raise the error of an invalid field of the request."""
    raise ServeError(400, code, f"{param}: {what}", param=param)


def unsupported(param: str, what: str = "this server does not support it; leave it out") -> NoReturn:
    """Raise the error of an unsupported field."""
    refuse(param, what, "unsupported_parameter")


def only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse unknown fields of an object, except with the neutral values null, false and []."""
    for name, value in given.items():
        if name not in known and value is not None and value is not False and value != []:
            unsupported(f"{where}{name}"[:200])


def _object(content: bytes) -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    if content.count(b",") > _MOST_COMMAS:
        raise ServeError(400, "invalid_request", f"the body has more than {_MOST_COMMAS} commas; send less in one")
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=constant)
    except RecursionError:
        raise ServeError(400, "invalid_request", "the body is nested too deeply") from None
    except ValueError as error:
        raise ServeError(400, "invalid_request", f"the body is no JSON in UTF-8: {error}") from None
    if not isinstance(found, dict):
        raise ServeError(400, "invalid_request", "the body is no JSON object; give {'model': ..., 'messages': [...]}")
    return found


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _TAKEN or value is None:
            continue
        if name not in _NEUTRAL:
            unsupported(name[:200])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name]):
            unsupported(name, f"only {' or '.join(map(json.dumps, _NEUTRAL[name]))} is supported, got {shown(value)}")


def _switch(given: Mapping[str, Any], name: str, where: str = "") -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        refuse(where + name, f"give true or false, got {shown(value)}")
    return bool(value)


def _inner(given: Mapping[str, Any], name: str, known: set[str]) -> dict[str, Any]:
    """The object in a field, which may have known fields only."""
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(name, f"give an object, got {shown(value)}")
    only(value, known, f"{name}.")
    return value


def _sampling(given: Mapping[str, Any]) -> Sampling:
    found: dict[str, Any] = {name: given.get(name) for name in ("temperature", "top_p", "top_k", "seed")}
    if found["top_k"] == -1 and not isinstance(found["top_k"], bool):
        found["top_k"] = 0  # vLLM's clients send -1 for all tokens
    for name, value in found.items():
        try:
            Sampling(**{name: value} if value is not None else {})
        except UserError as error:
            refuse(name, str(error))
    return Sampling(**{name: value for name, value in found.items() if value is not None})


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        refuse("stop", f"give a text that is not empty, or a list of such texts, got {shown(given)}")
    if len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
        refuse("stop", f"give at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
    return tuple(stops)


def _frames(given: Mapping[str, Any], counts: Sequence[int]) -> int | None:
    """`media_io_kwargs.video.num_frames`, as vLLM's clients send it."""
    video = _inner(_inner(given, "media_io_kwargs", {"video"}), "video", {"num_frames"})
    wanted = video.get("num_frames")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted not in counts):
        listed = ", ".join(map(str, counts))
        refuse("media_io_kwargs.video.num_frames", f"this engine samples {listed} frames, got {shown(wanted)}")
    return wanted


def _max_tokens(given: Mapping[str, Any], most: int) -> int | None:
    asked = {name: given[name] for name in ("max_completion_tokens", "max_tokens") if given.get(name) is not None}
    for name, value in asked.items():
        try:
            whole(name, value, 1, most)
        except UserError as error:
            refuse(name, str(error))
    if len(set(asked.values())) > 1:
        refuse("max_tokens", "it differs from max_completion_tokens; give one of them")
    return next(iter(asked.values()), None)


# Answers


@dataclass(frozen=True)
class Reply:
    """The common fields of an answer's response objects."""

    id: str
    created: int  # seconds since 1970
    model: str

    def whole(self, text: str, finish: str, usage: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        """The response with a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion", [choice]) | {"usage": usage, "earlytom": more}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A chunk of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage chunk after the last one, sent if the client asks for it."""
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return about | {"choices": choices, "system_fingerprint": None}


def usage_of(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """The `usage` object: token counts of an answer."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
