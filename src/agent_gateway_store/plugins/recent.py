"""A memory with an end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["Recent"]

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key, of which only the latest are kept.

    Args:
        limit: How many. Beyond, what was put longest ago is forgotten.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return the value of `key`, None if there is none (any more)."""
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep `value`, as the latest."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._values.popitem(last=False)

    def pop(self, key: K) -> None:
        """Forget `key`, if it is there."""
        self._values.pop(key, None)

    def __len__(self) -> int:
        return len(self._values)
