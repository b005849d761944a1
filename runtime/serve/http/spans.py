"""Spans of questions, for OpenTelemetry: sent to a collector in OTLP over HTTP, as JSON.

    spans = Spans("http://collector:4318", name="earlytom")
    spans.question(began=..., ended=..., traceparent=request_header, answer=answer)
    spans.close()

A question is one span, with OpenTelemetry's attribute names for generative models, and its stages are child spans. A
`traceparent` header makes it part of the caller's trace. A span has times, counts and a status: no texts, no videos, no
keys. A thread of its own sends them, so no question waits: if the collector is slow, the oldest queued spans are
dropped; an unreachable collector is logged once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import secrets
import threading
import time
from collections import deque
from typing import Any
from urllib.parse import urlsplit

from runtime.service.requests import Answer, Timings

_EVERY_SECONDS, _MOST, _WAITING = 1.0, 512, 4096  # between two requests; spans per request; spans in the queue
_SEND_SECONDS = 5.0
_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SERVER, _INTERNAL, _ERROR = 2, 1, 2  # OTLP's numbers: two kinds of spans, and a status
_log = logging.getLogger(__name__)

Attributes = dict[str, str | int]


class Spans:
    """Sends spans to a collector.

    Args:
        url: the collector's; without a path, /v1/traces is added.
        name: the service's and the model's name.
    """

    def __init__(self, url: str, *, name: str, every_seconds: float = _EVERY_SECONDS) -> None:
        self._at = urlsplit(url)
        self._path = self._at.path if self._at.path not in ("", "/") else "/v1/traces"
        self._name, self._every = name, every_seconds
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_WAITING)
        self._over = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._send_all, name="earlytom-spans", daemon=True)
        self._thread.start()

    def question(
        self,
        *,
        began: float,
        traceparent: str | None = None,
        answer: Answer | None = None,
        status: int = 200,
        code: str = "",
    ) -> None:
        """Queue the spans of a question that has just ended.

        Args:
            began: `time.monotonic` of its arrival.
            traceparent: the header's value; an invalid one is ignored.
            answer: None if it failed.
            status, code: HTTP status and, if it failed, the error's code.
        """
        end = time.time_ns()
        start = end - int((time.monotonic() - began) * 1e9)
        trace, parent = _parent_of(traceparent)
        span = secrets.token_hex(8)
        about: Attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": self._name,
            "http.response.status_code": status,
        }
        if code:
            about["error.type"] = code
        if answer is not None:
            about |= {
                "gen_ai.usage.input_tokens": answer.prompt_tokens,
                "gen_ai.usage.output_tokens": answer.generated_tokens,
                "gen_ai.response.finish_reasons": answer.finish,
                "earlytom.video_tokens": answer.visual_tokens,
                "earlytom.cached_tokens": answer.cached_tokens,
            }
        made = [_span(trace, span, parent, f"chat {self._name}", _SERVER, start, end, about, failed=bool(code))]
        for name, first, last in _stages(answer.timings, start, end) if answer is not None else []:
            made.append(_span(trace, secrets.token_hex(8), span, name, _INTERNAL, first, last, {}))
        self._waiting.extend(made)

    def close(self) -> None:
        """Send the queued spans, and end the thread. A second call does nothing."""
        self._over.set()
        self._thread.join(2 * _SEND_SECONDS)

    def _send_all(self) -> None:
        while not self._over.wait(self._every):
            self._send()
        self._send()

    def _send(self) -> None:
        while self._waiting:
            several: list[dict[str, Any]] = []
            with contextlib.suppress(IndexError):
                while len(several) < _MOST:
                    several.append(self._waiting.popleft())
            try:
                self._post(several)
            except (OSError, http.client.HTTPException) as error:
                if not self._told:
                    _log.warning("spans do not reach the collector (%s); further ones are dropped", error)
                self._told = True
                return
            self._told = False

    def _post(self, several: list[dict[str, Any]]) -> None:
        service = {"attributes": _attributes({"service.name": self._name})}
        scope = {"scope": {"name": "earlytom"}, "spans": several}
        body = json.dumps({"resourceSpans": [{"resource": service, "scopeSpans": [scope]}]}).encode()
        kind = http.client.HTTPSConnection if self._at.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._at.hostname or "", self._at.port, timeout=_SEND_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", self._path, body, {"content-type": "application/json"})
            if (status := connection.getresponse().status) >= 300:
                raise http.client.HTTPException(f"status {status}")


def _parent_of(header: str | None) -> tuple[str, str]:
    """Ids of the trace and of the parent span; without a valid header a new trace and no parent."""
    found = _PARENT.fullmatch(header or "")
    if found is None or set(found[1]) == {"0"} or set(found[2]) == {"0"}:
        return secrets.token_hex(16), ""
    return found[1], found[2]


def _stages(times: Timings, start: int, end: int) -> list[tuple[str, int, int]]:
    """Name, start and end of each stage that took time, consecutive, the last one ending with the answer."""
    seconds = {
        "generate": max(0.0, times.total - times.first_token),
        "prefill": times.prefill,
        "vision": times.vision,
        "wait": times.waiting,
        "preprocess": times.preprocess,
        "decode video": times.decode,
    }
    found = []
    for name, length in seconds.items():
        first = max(start, end - int(length * 1e9))
        if first < end:
            found.append((name, first, end))
        end = first
    return found[::-1]


def _span(
    trace: str,
    span: str,
    parent: str,
    name: str,
    kind: int,
    start: int,
    end: int,
    about: Attributes,
    *,
    failed: bool = False,
) -> dict[str, Any]:
    return {
        "traceId": trace,
        "spanId": span,
        "parentSpanId": parent,
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(end),
        "attributes": _attributes(about),
        "status": {"code": _ERROR} if failed else {},
    }


def _attributes(about: Attributes) -> list[dict[str, Any]]:
    return [
        {"key": name, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for name, value in about.items()
    ]
