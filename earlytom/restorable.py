"""Monkey patches of modules that can be undone."""

from __future__ import annotations

from typing import Any, Self


class Restorable:
    """Instance attributes set on modules, until `restore()` or the end of a `with` block."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []  # owner, name, previous instance attribute or None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Undo all changes. A second call does nothing."""
        for owner, name, before in self._before:
            del vars(owner)[name]
            if before is not None:
                setattr(owner, name, before)
        self._before = []

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        """Set `owner.name` until `restore`."""
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, replacement)
