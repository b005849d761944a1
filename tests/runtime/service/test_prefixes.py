"""The cache of prefixes against a naive one, under threads, and when values come to their end inside of it."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.service.prefixes import Counters, PrefixCache
from tests.processes import HANG_SECONDS

LIMIT = 10


@dataclass(eq=False)
class Value:
    bytes: int


class Naive:
    """The same by list operations: what is asked for, in the order of use."""

    def __init__(self, limit: int) -> None:
        self.limit, self.entries = limit, list[tuple[int, Value]]()
        self.hits = self.misses = self.evictions = 0

    def find(self, key: int) -> Value | None:
        return next((value for k, value in self.entries if k == key), None)

    def without(self, key: int) -> list[tuple[int, Value]]:
        return [entry for entry in self.entries if entry[0] != key]

    def get(self, key: int) -> Value | None:
        value = self.find(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self.entries = [*self.without(key), (key, value)]
        return value

    def put(self, key: int, value: Value) -> None:
        self.entries = [*self.without(key), (key, value)]
        while self.size() > self.limit:
            self.entries = self.entries[1:]
            self.evictions += 1

    def size(self) -> int:
        return sum(value.bytes for _, value in self.entries)


KEYS = st.integers(0, 5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("put"), KEYS, st.integers(0, LIMIT + 2)),
        st.tuples(st.just("drop"), KEYS),
        st.tuples(st.just("clear")),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_it_does_what_a_naive_one_does(steps: list[tuple]) -> None:
    cache, naive = PrefixCache[int, Value](LIMIT), Naive(LIMIT)
    for what, *args in steps:
        if what == "get":
            assert cache.get(args[0]) is naive.get(args[0])
        elif what == "put":
            key, value = args[0], Value(args[1])
            if value.bytes > LIMIT:
                with pytest.raises(UserError):
                    cache.put(key, value)
            else:
                cache.put(key, value)
                naive.put(key, value)
        elif what == "drop":
            assert cache.drop(args[0]) == (naive.find(args[0]) is not None)
            naive.entries = naive.without(args[0])
        else:
            cache.clear()
            naive.entries = []
        assert cache.keys() == tuple(key for key, _ in naive.entries)
        assert len(cache) == len(naive.entries)
        assert [key in cache for key in range(6)] == [naive.find(key) is not None for key in range(6)]
        assert cache.counters == Counters(naive.hits, naive.misses, naive.evictions, len(naive.entries), naive.size())
        assert cache.counters.bytes <= LIMIT


def test_the_one_not_used_for_longest_goes_first() -> None:
    cache = PrefixCache[str, Value](LIMIT)
    for name in ("a", "b", "c"):
        cache.put(name, Value(3))
    assert cache.get("a") is not None
    assert "b" in cache  # a look is no use
    cache.put("d", Value(3))
    assert cache.keys() == ("c", "a", "d")
    cache.put("c", Value(2))  # a new value for a key that is there evicts nobody
    assert cache.counters.evictions == 1
    cache.put("all", Value(LIMIT))
    assert cache.keys() == ("all",)


def test_something_larger_than_the_cache_is_refused_by_name() -> None:
    cache = PrefixCache[str, Value](LIMIT)
    kept = Value(4)
    cache.put("clip.mp4", kept)
    with pytest.raises(UserError, match=r"'clip.mp4' takes 2,000 bytes and the cache holds 10 in all") as caught:
        cache.put("clip.mp4", Value(2000))
    assert "\n" not in str(caught.value)
    assert cache.get("clip.mp4") is kept
    with pytest.raises(ValueError, match="number of bytes"):
        PrefixCache(-1)


def test_a_cache_of_nothing_holds_nothing() -> None:
    cache = PrefixCache[str, Value](0)
    with pytest.raises(UserError):
        cache.put("a", Value(1))
    assert cache.get("a") is None


def test_a_value_that_grows_does_not_upset_the_sum() -> None:
    cache = PrefixCache[str, Value](LIMIT)
    value = Value(3)
    cache.put("a", value)
    value.bytes = 8
    cache.drop("a")
    assert cache.counters.bytes == 0


def test_it_does_not_keep_what_it_gave_away_and_forgot() -> None:
    cache = PrefixCache[str, Value](LIMIT)
    values = {name: Value(4) for name in ("evicted", "replaced", "dropped", "cleared")}
    gone = {name: weakref.ref(value) for name, value in values.items()}
    cache.put("evicted", values["evicted"])
    cache.put("replaced", values["replaced"])
    cache.put("dropped", values["dropped"])
    cache.put("replaced", Value(4))
    cache.drop("dropped")
    cache.put("cleared", values["cleared"])
    values.clear()
    gc.collect()
    assert [name for name, value in gone.items() if value() is not None] == ["cleared"]
    held = cache.get("cleared")
    cache.clear()
    assert held is not None  # whoever holds a value keeps it
    assert cache.counters == Counters(hits=1, evictions=1)
    del held
    gc.collect()
    assert gone["cleared"]() is None


@pytest.mark.parametrize("way", ["evict", "replace", "drop", "clear"])
def test_a_value_whose_end_comes_back_to_the_cache_does_not_hang_it(way: str) -> None:
    cache = PrefixCache[str, Value](LIMIT)
    seen: list[int] = []

    class Returning(Value):
        def __del__(self) -> None:
            seen.append(cache.counters.bytes)

    cache.put("a", Returning(6))

    def end() -> None:
        if way == "evict":
            cache.put("b", Value(6))
        elif way == "replace":
            cache.put("a", Value(6))
        elif way == "drop":
            cache.drop("a")
        else:
            cache.clear()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()
    assert seen == [6 if way in ("evict", "replace") else 0]


def test_many_threads_leave_it_consistent() -> None:
    cache = PrefixCache[int, Value](LIMIT)
    start = threading.Barrier(8)
    wrong: list[object] = []

    def work(seed: int) -> None:
        start.wait()
        for step in range(500):
            key = (seed * 7 + step * 3) % 11
            if step % 5 == 0:
                cache.put(key, Value(key % 4))
            elif step % 17 == 0:
                cache.drop(key)
            elif (value := cache.get(key)) is not None and value.bytes != key % 4:
                wrong.append(key)
            if cache.counters.bytes > LIMIT:
                wrong.append(cache.counters)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not wrong
    counted = cache.counters
    asked = sum(1 for step in range(500) if step % 5 != 0 and step % 17 != 0)
    assert counted.hits + counted.misses == 8 * asked
    assert counted.hits > 0 < counted.misses
    left = cache.keys()
    assert counted.bytes == sum(key % 4 for key in left)
    assert counted.entries == len(left)
