"""From answered requests to figures: latency, throughput, goodput, errors, and whether the generator kept up.

Latencies are of good answers only. Goodput is the rate of those within every objective, as in `vllm bench serve`; a
latency that an answer does not have (TPOT of one token) counts as within.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.measure.clock import percentiles
from runtime.measure.serving.client import ServedAnswer
from runtime.measure.serving.generator import SentRequest

LATENCIES: dict[str, Callable[[ServedAnswer], float | None]] = {
    "ttft": lambda answer: answer.first,
    "tpot": lambda answer: answer.per_token,
    "e2e": lambda answer: answer.seconds,
}
WRONG = "wrong"


def kept(answer: ServedAnswer, wanted: Mapping[str, float]) -> bool:
    """Whether a good answer is within every objective (seconds by latency)."""
    values = {name: LATENCIES[name](answer) for name in wanted}
    return all(value is None or value <= wanted[name] for name, value in values.items())


def figures(
    sent: Sequence[SentRequest[Any]], right: Callable[[Any, ServedAnswer], bool], wanted: Mapping[str, float]
) -> dict[str, Any]:
    """The record of one run, in seconds; None for latencies that no request has.

    `right`: whether an answer belongs to its request.
    """
    good = [one.answer for one in sent if one.answer.good]
    wrong = sum(one.answer.good and not right(one.request, one.answer) for one in sent)
    errors = Counter(one.answer.status for one in sent if not one.answer.good)
    seconds = max((one.ended for one in sent), default=0.0)
    tokens = sum(answer.tokens for answer in good)
    within = sum(kept(answer, wanted) for answer in good)
    return {
        "requests": len(sent),
        "good": len(good),
        WRONG: wrong,
        "errors": dict(sorted(errors.items())),
        "seconds": seconds,
        "offered_per_second": _rate(len(sent), max((one.due for one in sent), default=0.0)),
        "requests_per_second": _rate(len(good), seconds),
        "tokens_per_second": _rate(tokens, seconds),
        "goodput_per_second": _rate(within, seconds) if wanted else None,
        "kept_objectives": within if wanted else None,
        **{name: spread([of(answer) for answer in good]) for name, of in LATENCIES.items()},
        "itl": spread([gap for answer in good for gap in answer.gaps]),
        "cached_share": _rate(sum(a.cached_tokens for a in good), sum(a.prompt_tokens for a in good)),
        "late": spread([one.late for one in sent]),
        "held": spread([one.held for one in sent]),
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """p50, p90, p99 and maximum of the values that are not None."""
    there = [value for value in values if value is not None]
    return percentiles(there) | {"max": max(there)} if there else None


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds else None
