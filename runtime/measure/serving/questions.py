"""The requests: questions about videos, and about unlimited copies of these that are new to the server.

A copy of an mp4 file is the file with an ignored box at its end that holds a number: another hash, but the same frames
and so the same answer. Once answers are learned (`Workload.learn`), mixed-up ones are noticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from earlytom.errors import UserError
from earlytom.numbers import real

_BOX = b"free"  # ISO/IEC 14496-12, 8.1.2: to be ignored
_MARK = "\0video\0"


class SentVideo:
    """A video file in the form of requests.

    Args:
        name: for errors.
        content: the file's bytes.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.base64 = base64.b64encode(content)
        # All of a copy but its number is hashed and encoded once; padded, as base64 encodes three bytes at a time.
        filling = -(len(content) + 8) % 3
        self._head = content + struct.pack(">I", 16 + filling) + _BOX + bytes(filling)
        self._hashed, self._encoded = hashlib.sha256(self._head), base64.b64encode(self._head)

    @property
    def copies(self) -> bool:
        """Whether copies can be made: it is an ISO base media file, such as mp4."""
        return self.content[4:8] == b"ftyp"

    def copy(self, number: int) -> tuple[bytes, str]:
        """Content of copy `number` (0 to 2^64 - 1) in base64, and its sha256."""
        tail, hashed = struct.pack(">Q", number), self._hashed.copy()
        hashed.update(tail)
        return self._encoded + base64.b64encode(tail), hashed.hexdigest()


@dataclass(frozen=True)
class ToSend:
    """A request.

    Attributes:
        pair: index into `Workload.pairs`.
        body: JSON.
        stream: whether its answer is streamed.
        sha256: of its video.
        fresh: whether the video is new to the server.
    """

    pair: int
    body: bytes
    stream: bool
    sha256: str
    fresh: bool


class Workload:
    """Questions about videos, and the expected answers.

    Args:
        pairs: of a video and a question.
        model: its name on the server.
        max_tokens: of an answer.

    Attributes:
        answers: expected for each pair; None until learned.
    """

    def __init__(self, pairs: Sequence[tuple[SentVideo, str]], model: str, max_tokens: int) -> None:
        self.pairs = list(pairs)
        self.answers: list[str | None] = [None] * len(self.pairs)
        self._shells = {
            stream: [self._shell(q, model, max_tokens, stream) for _, q in pairs] for stream in (False, True)
        }
        self._number = secrets.randbits(62)  # a server may remember the copies of an earlier run

    def known(self, pair: int, *, stream: bool = True) -> ToSend:
        """The request about the video itself."""
        video = self.pairs[pair][0]
        return self._request(pair, stream, video.base64, video.sha256, fresh=False)

    def fresh(self, pair: int, *, stream: bool = True) -> ToSend:
        """A request about a new copy."""
        self._number += 1
        return self._request(pair, stream, *self.pairs[pair][0].copy(self._number), fresh=True)

    def draw(self, count: int, repeated: float, seed: int, *, alternate: bool = False) -> Iterator[ToSend]:
        """`count` requests about random pairs, a share `repeated` of them about the videos themselves, not new copies.

        `alternate`: every second answer is not streamed.
        """
        real("the share of repeated videos", repeated, 0, 1)
        for video, _ in self.pairs:
            if repeated < 1 and not video.copies:
                raise UserError(f"{video.name} is no mp4, and only of those there can be copies: give --repeat 1")
        chance = np.random.default_rng(seed)
        pairs, again = chance.integers(len(self.pairs), size=count), chance.random(count) < repeated
        return self._drawn([int(pair) for pair in pairs], [bool(one) for one in again], alternate)

    def _drawn(self, pairs: list[int], again: list[bool], alternate: bool) -> Iterator[ToSend]:
        for at, (pair, known) in enumerate(zip(pairs, again, strict=True)):
            make = self.known if known else self.fresh
            yield make(pair, stream=not (alternate and at % 2))

    def learn(self, pair: int, text: str) -> None:
        """Expect this answer from now on."""
        self.answers[pair] = text

    def right(self, request: ToSend, text: str, video: str) -> bool:
        """Whether an answer belongs to the request, by its text and, if the server returns it, its video's hash."""
        expected = self.answers[request.pair]
        return (expected is None or text == expected) and video in ("", request.sha256)

    def _request(self, pair: int, stream: bool, content: bytes, sha256: str, *, fresh: bool) -> ToSend:
        before, after = self._shells[stream][pair]
        return ToSend(pair, b"".join((before, content, after)), stream, sha256, fresh)

    @staticmethod
    def _shell(question: str, model: str, max_tokens: int, stream: bool) -> tuple[bytes, bytes]:
        """The body before and after the video."""
        url = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{_MARK}"}}
        told: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": [url, {"type": "text", "text": question}]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        if stream:
            told["stream_options"] = {"include_usage": True}
        before, after = json.dumps(told).encode().split(json.dumps(_MARK)[1:-1].encode())
        return before, after
