"""Leaves a receiver alone that asked for it."""

from __future__ import annotations

import time

from agent_gateway_store.errors import NotDeliveredError

__all__ = ["MAX_PAUSE_SECONDS", "Pause"]

MAX_PAUSE_SECONDS = 60.0
"""A receiver that asks for longer is tried once in this time: one notice must not silence all others for a day."""


class Pause:
    """How long nothing is to be sent. Belongs to one receiver; may be used from any thread."""

    def __init__(self) -> None:
        self._until = 0.0

    def begin(self, seconds: float | None) -> None:
        """Send nothing for `seconds`, at most a minute; None or 0 changes nothing."""
        if seconds:
            self._until = max(self._until, time.monotonic() + min(seconds, MAX_PAUSE_SECONDS))

    def require_over(self) -> None:
        """Return if sending is allowed.

        Raises:
            NotDeliveredError: It is not allowed yet; `retry_after_s` is how long that lasts.
        """
        left = self._until - time.monotonic()
        if left > 0:
            raise NotDeliveredError("The receiver asked to be left alone for a while.", retry_after_s=left)
