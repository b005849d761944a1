"""Prefixes of watched videos, as many as fit into a number of bytes; the one not used for longest goes first.

It knows of its values only how large they are, so it keeps anything with `.bytes`. All methods may be called from many
threads. Whoever holds a value keeps it: eviction forgets, it does not destroy.

    cache: PrefixCache[str, Prefix] = PrefixCache(2 << 30)
    cache.put("clip.mp4", prefix)
    prefix = cache.get("clip.mp4")  # or None
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from earlytom.errors import UserError
from runtime.forks import Home


class Sized(Protocol):
    """Anything that says how much memory it takes."""

    @property
    def bytes(self) -> int:
        """At least 0."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


@dataclass(frozen=True)
class Counters:
    """What happened since the cache was made, and what is in it now.

    Attributes:
        hits, misses: values that `get` found, and did not.
        evictions: values that had to go to make room; those that were replaced, dropped or cleared do not count.
        entries, bytes: values that it holds, and their size.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


class PrefixCache(Generic[K, V]):
    """Values by key; together they never take more than `limit` bytes.

    In a fork of the process every method raises `Closed`.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"a cache's limit is a number of bytes, got {limit}")
        self.limit = limit
        self._home = Home("this cache of watched videos")
        self._lock = threading.Lock()
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()  # with the size it came with, used last at the end
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as used now; None if there is none (any more)."""
        self._home.check()
        with self._lock:
            if key not in self._held:
                self._misses += 1
                return None
            self._hits += 1
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: K, value: V) -> None:
        """Keep a value, in place of the one that the key had; others go until there is room.

        Raises:
            UserError: it is larger than the whole cache; nothing has changed then.
        """
        self._home.check()
        size = value.bytes
        if size > self.limit:
            raise UserError(
                f"{key!r} takes {size:,} bytes and the cache holds {self.limit:,} in all: make it larger, or use an "
                "engine with fewer frames or tokens"
            )
        # Let go after the lock: the end of a value may run code that comes back here.
        gone: list[object] = []
        with self._lock:
            gone.append(self._remove(key))
            while self._bytes + size > self.limit:
                gone.append(self._remove(next(iter(self._held))))
                self._evictions += 1
            self._held[key] = (value, size)
            self._bytes += size

    def drop(self, key: K) -> bool:
        """Forget a key; whether there was something to forget."""
        self._home.check()
        with self._lock:
            gone = self._remove(key)
        return gone is not None

    def clear(self) -> None:
        """Forget everything; the counters go on."""
        self._home.check()
        with self._lock:
            gone, self._held = self._held, OrderedDict()
            self._bytes = 0
        gone.clear()

    def keys(self) -> tuple[K, ...]:
        """What is in it, the next to go first."""
        self._home.check()
        with self._lock:
            return tuple(self._held)

    @property
    def counters(self) -> Counters:
        """All of one moment."""
        self._home.check()
        with self._lock:
            return Counters(self._hits, self._misses, self._evictions, len(self._held), self._bytes)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        """Whether `get` would find it; counts as no use."""
        return key in self._held

    def _remove(self, key: K) -> tuple[V, int] | None:
        """Take a key out, if it is there; by the holder of the lock."""
        entry = self._held.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1]
        return entry
