"""Spans as a collector reads them, and collectors that are slow, wrong or not there."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from runtime.serve.http import spans as spans_module
from runtime.serve.http.spans import Spans
from runtime.service.requests import Answer, Timings
from tests.processes import HANG_SECONDS as LONG

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ANSWER = Answer("4", (19,), "stop", Timings(0.1, 0.2, 0.05, 0.3, 0.15, 0.85, 0.0, 1.0), 126, 143, 130)


class Collector:
    """Takes what is sent, by default."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.paths: list[str] = []
        self.spans: list[dict[str, Any]] = []
        self.came = threading.Semaphore(0)

    @contextlib.contextmanager
    def standing(self) -> Iterator[str]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words: Any) -> None:
                pass

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
                (resource,) = sent["resourceSpans"]
                (scope,) = resource["scopeSpans"]
                assert resource["resource"]["attributes"][0]["key"] == "service.name"
                collector.paths.append(self.path)
                collector.spans += scope["spans"]
                self.send_response(collector.status)
                self.end_headers()
                collector.came.release()

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def values(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


def test_an_answer_is_a_span_with_its_stages_in_it() -> None:
    collector = Collector()
    with collector.standing() as url:
        spans = Spans(url, name="m", every_seconds=LONG)
        spans.question(began=time.monotonic() - 2.0, traceparent=f"00-{TRACE}-{PARENT}-01", answer=ANSWER)
        spans.close()
    whole, *stages = collector.spans
    assert (whole["traceId"], whole["parentSpanId"], whole["name"], whole["kind"]) == (TRACE, PARENT, "chat m", 2)
    about = values(whole)
    assert about["gen_ai.usage.input_tokens"] == "143"
    assert about["gen_ai.usage.output_tokens"] == "1"
    assert about["earlytom.cached_tokens"] == "130"
    assert whole["status"] == {}
    assert [one["name"] for one in stages] == ["decode video", "preprocess", "wait", "vision", "prefill", "generate"]
    assert {(one["traceId"], one["parentSpanId"]) for one in stages} == {(TRACE, whole["spanId"])}
    times = [(int(one["startTimeUnixNano"]), int(one["endTimeUnixNano"])) for one in stages]
    lengths = [(end - start) / 1e9 for start, end in times]
    assert lengths == pytest.approx([0.2, 0.05, 0.1, 0.3, 0.15, 0.15], abs=1e-6)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(times))
    assert int(whole["startTimeUnixNano"]) <= times[0][0]
    assert int(whole["endTimeUnixNano"]) == times[-1][1]
    assert len({one["spanId"] for one in collector.spans}) == 7
    assert collector.paths == ["/v1/traces"]


def test_a_refusal_is_a_span_that_failed_in_a_trace_of_its_own() -> None:
    headers = [None, "", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 9999]
    collector = Collector()
    with collector.standing() as url:
        spans = Spans(url + "/other/path", name="m")
        for header in headers:
            spans.question(began=time.monotonic(), traceparent=header, status=429, code="overloaded")
        assert collector.came.acquire(timeout=LONG)  # by itself
        spans.close()
    assert len(collector.spans) == len(headers)
    for span in collector.spans:
        assert (span["status"], span["parentSpanId"]) == ({"code": 2}, "")
        assert values(span)["error.type"] == "overloaded"
        assert len(span["traceId"]) == 32
    assert len({span["traceId"] for span in collector.spans} | {TRACE}) == len(headers) + 1
    assert set(collector.paths) == {"/other/path"}


def test_a_stage_that_began_before_its_question_is_cut() -> None:
    found = spans_module._stages(ANSWER.timings, 0, 400_000_000)
    assert found == [
        ("vision", 0, 100_000_000),
        ("prefill", 100_000_000, 250_000_000),
        ("generate", 250_000_000, 400_000_000),
    ]


def test_a_collector_that_is_not_there_or_refuses_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for url in ("http://127.0.0.1:9", None):
        with Collector(500).standing() as refusing:
            spans = Spans(url or refusing, name="m", every_seconds=LONG)
            for _ in range(3):
                spans.question(began=time.monotonic(), status=400, code="x")
                spans._send()
            spans.close()
        assert sum("do not reach the collector" in line for line in caplog.messages) == 1
        caplog.clear()


def test_what_waits_has_a_bound() -> None:
    spans = Spans("http://127.0.0.1:9", name="m", every_seconds=LONG)
    for _ in range(spans_module._WAITING + 10):
        spans.question(began=time.monotonic(), status=400, code="x")
    assert len(spans._waiting) == spans_module._WAITING
    spans._waiting.clear()
    spans.close()
