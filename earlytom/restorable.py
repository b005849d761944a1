"""Changes to modules that can be taken back."""

from __future__ import annotations

from typing import Any, Self


class Restorable:
    """Instance attributes put on modules, which `restore()` or the end of a `with` block takes off again."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []  # owner, name and the instance attribute that was there, if any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the model back as it was. Calling it twice does nothing."""
        for owner, name, before in self._before:
            del vars(owner)[name]
            if before is not None:
                setattr(owner, name, before)
        self._before = []

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        """Set `owner.name` until `restore`."""
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, replacement)
