"""What `tests.vllm_check` makes of what it finds: what fails it, and how a load is counted."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import vllm_check
from tests.vllm_check import AIM_AT, CLIENTS, LARGER, LONG, SHORT, TOKENS, Rates, failures, load


def rates(ratio: float, wrong: int = 0) -> Rates:
    return {clients: {"ours": 1.0, "vllm": ratio, "ratio": ratio, "wrong": wrong} for clients in CLIENTS}


def test_short_answers_may_be_slower() -> None:
    assert failures(8, {"over the wire": 8}, {SHORT: rates(0.5), LONG: rates(3.0)}, 3.0) == []


def test_the_larger_model_is_held_to_the_aim_where_there_is_one() -> None:
    found = {SHORT: rates(0.5), LONG: rates(2.4), LARGER: rates(9.0)}
    assert failures(8, {}, found, 3.0) == []
    said = failures(8, {}, found | {LARGER: rates(2.9, 1)}, 3.0)
    assert said[0] == f"answers of {LARGER}, 1 clients: 1 answers differ"
    assert said[-1] == f"answers of {LARGER}, {AIM_AT} clients: 2.90 times as fast, and not 3"


@pytest.mark.parametrize(
    ("equal", "short", "long", "said"),
    [
        (7, rates(9.0), rates(9.0), ["over the wire: 1 of 8 answers differ"]),
        (8, rates(9.0), rates(2.99), [f"answers of {LONG}, {AIM_AT} clients: 2.99 times as fast, and not 3"]),
        (8, rates(9.0, 2), rates(9.0), [f"answers of {SHORT}, {n} clients: 2 answers differ" for n in CLIENTS]),
        (8, rates(9.0), rates(9.0, 1), [f"answers of {LONG}, {n} clients: 1 answers differ" for n in CLIENTS]),
    ],
)
def test_what_does_not_hold_fails_it(equal: int, short: Rates, long: Rates, said: list[str]) -> None:
    assert failures(8, {"over the wire": equal}, {SHORT: short, LONG: long}, 3.0) == said


class Answering:
    """Answers about every video at once; every third answer is another one than it should be."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()
        self.watched: list[str] = []
        self.closed: list[str] = []

    def watch(self, clip: str) -> Any:
        self.watched.append(clip)
        return SimpleNamespace(ask=self.ask, close=lambda: self.closed.append(clip))

    def ask(self, question: str, *, max_new_tokens: int) -> Any:
        assert max_new_tokens == TOKENS
        with self.lock:
            self.count += 1
            return SimpleNamespace(tokens=(7, 8) if self.count % 3 else (7, 9))


def test_answers_under_load_are_compared() -> None:
    pipeline = Answering()
    right = [(("a.mp4", "What?"), {"tokens": [7, 8]}), (("b.mp4", "Where?"), {"tokens": [7, 8]})]
    right.append((("a.mp4", "Why?"), {"tokens": [7, 8]}))  # a video is watched once, however many questions it has
    rate, wrong = load(pipeline, right, 2, 0.05, TOKENS)
    assert rate > 0
    assert wrong == pipeline.count // 3
    assert sorted(pipeline.watched) == sorted(pipeline.closed) == ["a.mp4", "b.mp4"]


def test_an_answer_that_fails_ends_the_load() -> None:
    pipeline = SimpleNamespace(watch=lambda clip: SimpleNamespace(ask=lambda *_, **__: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        load(pipeline, [(("a.mp4", "What?"), {"tokens": []})], 2, 60.0, TOKENS)


@pytest.mark.usefixtures("one_thread")
def test_nothing_but_their_length_ends_long_answers(engine: Path, drawn_clip: Path) -> None:
    with vllm_check.opened(engine, "torch", endless=True) as pipeline:
        answer = pipeline.ask(drawn_clip, "What happens?", max_new_tokens=TOKENS)
    assert len(answer.tokens) == TOKENS
    with vllm_check.opened(engine, "torch") as pipeline:
        assert pipeline.ask(drawn_clip, "What happens?", max_new_tokens=2).tokens == answer.tokens[:2]
