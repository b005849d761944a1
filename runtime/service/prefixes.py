"""The prefix cache: least recently used eviction under a limit in bytes.

It needs only the size of its values, so it keeps anything with `.bytes`. All methods are thread-safe. Eviction drops
the cache's reference; a value in use stays valid.

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
    """Counts since the cache was made, and its current content.

    Attributes:
        hits, misses: calls of `get` that found a value, and that did not.
        evictions: values removed to make room; those replaced, dropped or cleared do not count.
        entries, bytes: number of values in the cache, and their total size.
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
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()  # (value, size at `put`), last used at the end
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: K) -> V | None:
        """The value of a key, marked as used; None if it is not in the cache."""
        self._home.check()
        with self._lock:
            if key not in self._held:
                self._misses += 1
                return None
            self._hits += 1
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: K, value: V) -> None:
        """Store a value, replacing the key's old one; others are evicted until there is room.

        Raises UserError, and changes nothing, if it is larger than the whole cache.
        """
        self._home.check()
        size = value.bytes
        if size > self.limit:
            raise UserError(
                f"{key!r} takes {size:,} bytes and the cache holds {self.limit:,} in all: make it larger, or use an "
                "engine with fewer frames or tokens"
            )
        # Freed after the lock is released: a value's finalizer may call this cache.
        gone: list[object] = []
        with self._lock:
            gone.append(self._remove(key))
            while self._bytes + size > self.limit:
                gone.append(self._remove(next(iter(self._held))))
                self._evictions += 1
            self._held[key] = (value, size)
            self._bytes += size

    def drop(self, key: K) -> bool:
        """Remove a key; returns whether it was there."""
        self._home.check()
        with self._lock:
            gone = self._remove(key)
        return gone is not None

    def clear(self) -> None:
        """Remove everything; the counters stay."""
        self._home.check()
        with self._lock:
            gone, self._held = self._held, OrderedDict()
            self._bytes = 0
        gone.clear()

    def keys(self) -> tuple[K, ...]:
        """The keys, the next to be evicted first."""
        self._home.check()
        with self._lock:
            return tuple(self._held)

    @property
    def counters(self) -> Counters:
        """A consistent snapshot."""
        self._home.check()
        with self._lock:
            return Counters(self._hits, self._misses, self._evictions, len(self._held), self._bytes)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        """Whether `get` would find it; does not mark it as used."""
        return key in self._held

    def _remove(self, key: K) -> tuple[V, int] | None:
        """Remove a key, if it is there; call with the lock held."""
        entry = self._held.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1]
        return entry
