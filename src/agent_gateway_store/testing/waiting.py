"""Wait for what happens in the background."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until"]

_POLL_S = 0.005


def wait_until(condition: Callable[[], object], *, timeout_s: float = 5.0) -> None:
    """Return as soon as `condition()` is true. Blocks; for tests that are not async.

    Args:
        condition: Asked again and again.
        timeout_s: Seconds to wait at most.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come true within {timeout_s:g} seconds")
        time.sleep(_POLL_S)
