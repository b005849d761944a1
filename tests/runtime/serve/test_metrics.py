"""Metrics, as Prometheus' own parser reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from earlytom.errors import UserError
from runtime.serve.metrics import Metrics


@dataclass(frozen=True)
class Seconds:
    waiting: float = 0.5
    decode: float = 0.02
    preprocess: float = 0.01
    vision: float = 0.2
    prefill: float = 0.1
    first_token: float = 0.9
    per_token: float = 0.03
    total: float = 1.2


@dataclass(frozen=True)
class Reply:
    finish: str = "stop"
    timings: Seconds = field(default_factory=Seconds)
    prompt_tokens: int = 160
    cached_tokens: int = 126
    generated_tokens: int = 11


def values(metrics: Metrics) -> dict[str, float]:
    """`name{label=value}` but for the label of the model."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            assert sample.labels["model_name"] == "earlytom"
            inner = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            found[sample.name + (f"{{{inner}}}" if inner else "")] = sample.value
    return found


@pytest.fixture
def metrics() -> Metrics:
    one = Metrics("earlytom:")
    one.gauges(running=lambda: 1, waiting=lambda: 3, cache_usage=lambda: 0.25)
    return one


def test_an_answer_is_counted_and_timed(metrics: Metrics) -> None:
    metrics.observe(Reply(), 1.5)
    got = {name.removeprefix("earlytom:"): value for name, value in values(metrics).items()}
    wanted = {
        "e2e_request_latency_seconds_sum": 1.5,
        "time_to_first_token_seconds_sum": 1.2,  # 0.3 s of the 1.5 came after it
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 0.1,
        "request_decode_time_seconds_sum": 0.3,
        "inter_token_latency_seconds_count": 10,
        "inter_token_latency_seconds_sum": 0.3,
        "prompt_tokens_total": 160,
        "generation_tokens_total": 11,
        "prefix_cache_queries_total": 160,
        "prefix_cache_hits_total": 126,
        "request_success_total{finished_reason=stop}": 1,
        "request_success_total{finished_reason=abort}": 0,
        "request_stage_seconds_sum{stage=vision}": 0.2,
        "request_stage_seconds_sum{stage=decode}": 0.02,
        "num_requests_running": 1,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.25,
    }
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)


def test_gaps_between_tokens_are_taken_as_they_were(metrics: Metrics) -> None:
    metrics.observe(Reply(generated_tokens=3), 1.5, gaps=[0.25, 0.5])
    got = values(metrics)
    assert got["earlytom:inter_token_latency_seconds_count"] == 2
    assert got["earlytom:inter_token_latency_seconds_sum"] == 0.75


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_answer_of_one_token_has_no_gap(metrics: Metrics, tokens: int) -> None:
    metrics.observe(Reply(generated_tokens=tokens), 1.5)
    assert values(metrics)["earlytom:inter_token_latency_seconds_count"] == 0


def test_refusals_and_ends(metrics: Metrics) -> None:
    for status in (429, 429, 401):
        metrics.refused(status)
    metrics.ended("abort")
    metrics.observe(Reply(finish="length"), 2)
    got = values(metrics)
    assert got["earlytom:request_refused_total{status=429}"] == 2
    assert got["earlytom:request_refused_total{status=401}"] == 1
    assert got["earlytom:request_success_total{finished_reason=abort}"] == 1
    assert got["earlytom:request_success_total{finished_reason=length}"] == 1


def test_gauges_are_asked_each_time() -> None:
    metrics, running = Metrics(), [0]
    metrics.gauges(running=lambda: running[0], waiting=lambda: 0, cache_usage=lambda: 0.0)
    for count in (0, 5, 2):
        running[0] = count
        assert values(metrics)["earlytom:num_requests_running"] == count


@pytest.mark.parametrize("prefix", ["earlytom:", "vllm:", "a_"])
def test_names_are_vllms_behind_the_prefix(prefix: str) -> None:
    metrics = Metrics(prefix)
    metrics.gauges(running=lambda: 0, waiting=lambda: 0, cache_usage=lambda: 0)
    text = metrics.render().decode()
    for name in (
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "prompt_tokens_total"),
        *("e2e_request_latency_seconds_count", "request_queue_time_seconds_bucket", "generation_tokens_total"),
        *("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "request_success_total"),
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total"),
        *("prefix_cache_hits_total", "request_stage_seconds_bucket"),
    ):
        assert re.search(rf"^{prefix}{name}\{{", text, re.MULTILINE), name
    assert not [line for line in text.splitlines() if not line.startswith(("#", prefix))]


def test_two_servers_do_not_mix(metrics: Metrics) -> None:
    other = Metrics("earlytom:")
    other.observe(Reply(), 1)
    assert values(metrics)["earlytom:prompt_tokens_total"] == 0


@pytest.mark.parametrize("prefix", ["", "1a", "a b", "a-", "a{", None, 3, "é"])
def test_a_prefix_that_no_name_may_have(prefix: Any) -> None:
    with pytest.raises(UserError, match="--metrics-prefix"):
        Metrics(prefix)


def test_a_models_name_may_be_anything() -> None:
    metrics = Metrics(model='a"b\\c\n')
    metrics.observe(Reply(), 1)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert {sample.labels["model_name"] for family in families for sample in family.samples} == {'a"b\\c\n'}
