"""A notifier that keeps what it is told."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

__all__ = ["RecordingNotifier"]

_POLL_S = 0.005


class RecordingNotifier:
    """Keeps every notice, in the order of arrival. A notice that comes twice is kept twice.

    Notices are sent in the background, so wait for them rather than look at once.

    Args:
        name: Its name among the notifiers.
    """

    def __init__(self, name: str = "recording") -> None:
        self.name = name
        self.notices: list[Notice] = []

    @property
    def pending(self) -> list[Notice]:
        """Notices that somebody must decide."""
        return [notice for notice in self.notices if notice.event == "pending"]

    @property
    def decisions(self) -> list[Notice]:
        """Notices of decisions."""
        return [notice for notice in self.notices if notice.event == "decision"]

    async def notify_pending(self, notice: Notice) -> None:
        """Keep it."""
        self.notices.append(notice)

    async def notify_decision(self, notice: Notice) -> None:
        """Keep it."""
        self.notices.append(notice)

    async def wait_for(
        self, count: int = 1, *, event: Literal["pending", "decision"] | None = None, timeout_s: float = 5.0
    ) -> list[Notice]:
        """Wait until so many notices have come, and return all there are.

        Args:
            count: At least so many.
            event: Count and return only these; None: all.
            timeout_s: Seconds to wait at most.

        Raises:
            AssertionError: They did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._enough(count, event, deadline):
            await asyncio.sleep(_POLL_S)
        return self._of(event)

    def wait(
        self, count: int = 1, *, event: Literal["pending", "decision"] | None = None, timeout_s: float = 5.0
    ) -> list[Notice]:
        """Do as `wait_for`, blocking; for tests that are not async."""
        deadline = time.monotonic() + timeout_s
        while not self._enough(count, event, deadline):
            time.sleep(_POLL_S)
        return self._of(event)

    def _of(self, event: str | None) -> list[Notice]:
        return [notice for notice in list(self.notices) if event in (None, notice.event)]

    def _enough(self, count: int, event: str | None, deadline: float) -> bool:
        if (found := len(self._of(event))) >= count:
            return True
        if time.monotonic() > deadline:
            raise AssertionError(f"{found} of {count} {event or ''} notices came in time".replace("  ", " "))
        return False
