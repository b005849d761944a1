"""The server's Prometheus metrics.

    metrics = Metrics("earlytom:", model="earlytom")
    metrics.gauges(running=..., waiting=..., cache_usage=...)
    metrics.observe(answer, seconds)
    metrics.render()

Names have vLLM's suffixes and label, so that its dashboards work with the prefix "vllm:". Times are seconds; prompt
tokens and the prefix cache count all tokens of the prompt, visual ones included. Every server has its own registry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from earlytom.errors import UserError
from earlytom.numbers import shown

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("decode", "preprocess", "vision", "prefill")
_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# Histogram buckets in seconds, from a token on a GPU to a long answer on a CPU.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _LONG),
    "inter_token_latency_seconds": ("Between a token and the next.", _SHORT),
    "e2e_request_latency_seconds": ("From a request's arrival to the end of its answer.", _LONG),
    "request_queue_time_seconds": ("In line, behind other requests.", _LONG),
    "request_prefill_time_seconds": ("Reading the prompt, to the first token.", _LONG),
    "request_decode_time_seconds": ("From the first token to the last.", _LONG),
}
_COUNTERS = {
    "prompt_tokens": "Positions of prompts, visual tokens among them.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Positions of prompts that were looked for among what was read before.",
    "prefix_cache_hits": "Those of them that were found.",
}


class AnswerTimes(Protocol):
    """The timings of an answer, in seconds; `runtime.pipeline.Timings`."""

    @property
    def waiting(self) -> float: ...
    @property
    def decode(self) -> float: ...
    @property
    def preprocess(self) -> float: ...
    @property
    def vision(self) -> float: ...
    @property
    def prefill(self) -> float: ...
    @property
    def first_token(self) -> float: ...
    @property
    def per_token(self) -> float: ...
    @property
    def total(self) -> float: ...


class Answered(Protocol):
    """The counted attributes of an answer; `runtime.pipeline.Answer`."""

    @property
    def finish(self) -> str: ...
    @property
    def timings(self) -> AnswerTimes: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...


class Metrics:
    """The metrics of one server.

    prefix: of all names. model: the value of the label `model_name`.

    Raises:
        UserError: a prefix that no name may begin with.
    """

    def __init__(self, prefix: str = "earlytom:", *, model: str = "earlytom") -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise UserError(f"--metrics-prefix {shown(prefix)}: give letters, digits, _ and :, as in vllm:")
        self._registry = CollectorRegistry()
        self._model = model
        self._prefix = prefix
        self._times = {
            name: Histogram(prefix + name, about, ["model_name"], buckets=buckets, registry=self._registry).labels(
                model
            )
            for name, (about, buckets) in _HISTOGRAMS.items()
        }
        self._counts = {
            name: Counter(prefix + name, about, ["model_name"], registry=self._registry).labels(model)
            for name, about in _COUNTERS.items()
        }
        self._ended = self._counter("request_success", "Requests answered, by why the answer ended.", "finished_reason")
        self._refused = self._counter("request_refused", "Requests that got no answer, by status.", "status")
        stages = Histogram(
            prefix + "request_stage_seconds",
            "Of the stages before an answer: decoding, resizing, the vision engine, reading the prompt.",
            ["model_name", "stage"],
            buckets=_LONG,
            registry=self._registry,
        )
        self._stages = {stage: stages.labels(model, stage) for stage in STAGES}
        for reason in ("stop", "length", "abort"):  # there from the start, so that rates have a first value
            self._ended.labels(model, reason)

    def gauges(
        self, *, running: Callable[[], float], waiting: Callable[[], float], cache_usage: Callable[[], float]
    ) -> None:
        """Set, once, the functions read at each `render`: requests being answered, requests waiting, and the used share
        of the prefix cache.
        """
        for name, about, read in (
            ("num_requests_running", "Requests that are being answered.", running),
            ("num_requests_waiting", "Requests in line.", waiting),
            ("kv_cache_usage_perc", "Share of the memory for videos that were read, 1 is all.", cache_usage),
        ):
            gauge = Gauge(self._prefix + name, about, ["model_name"], registry=self._registry)
            gauge.labels(self._model).set_function(read)

    def observe(self, answer: Answered, seconds: float, gaps: Sequence[float] | None = None) -> None:
        """Count a finished answer.

        seconds: from the request's arrival to the answer's end, longer than the pipeline's own total.
        gaps: seconds between its tokens; default: the mean for each.
        """
        times = answer.timings
        after_first = max(0.0, times.total - times.first_token)
        self._times["time_to_first_token_seconds"].observe(max(times.first_token, seconds - after_first))
        self._times["e2e_request_latency_seconds"].observe(seconds)
        self._times["request_queue_time_seconds"].observe(times.waiting)
        self._times["request_prefill_time_seconds"].observe(times.prefill)
        self._times["request_decode_time_seconds"].observe(after_first)
        for gap in [times.per_token] * (answer.generated_tokens - 1) if gaps is None else gaps:
            self._times["inter_token_latency_seconds"].observe(gap)
        for stage, histogram in self._stages.items():
            histogram.observe(getattr(times, stage))
        self._counts["prompt_tokens"].inc(answer.prompt_tokens)
        self._counts["generation_tokens"].inc(answer.generated_tokens)
        self._counts["prefix_cache_queries"].inc(answer.prompt_tokens)
        self._counts["prefix_cache_hits"].inc(answer.cached_tokens)
        self.ended(answer.finish)

    def ended(self, reason: str) -> None:
        """Count the end of a request: "stop", "length", or "abort" if its caller disconnected."""
        self._ended.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """Count a request that got a status instead of an answer."""
        self._refused.labels(self._model, str(status)).inc()

    def render(self) -> bytes:
        """All metrics as text, of `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, label: str) -> Any:
        return Counter(self._prefix + name, about, ["model_name", label], registry=self._registry)
