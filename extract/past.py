"""Keys and values of what has been run of a batch's samples before: for writing text a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Past:
    """A cache for each module that attends, made when it is first asked for. `length`: positions before those of the
    batch at hand, the same for all of its samples."""

    def __init__(self) -> None:
        self.length = 0
        self._caches: dict[int, Any] = {}

    def cache(self, owner: object, make: Callable[[], Any]) -> Any:
        """The cache of `owner`, which fills it as it runs."""
        if id(owner) not in self._caches:
            self._caches[id(owner)] = make()
        return self._caches[id(owner)]
