"""Doubles for tests: a notifier that records, notices, a clock to move, and a wait for what happens in the background.

To import it loads no pydantic, since the pytest plugin does so in every test run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from agent_gateway_store import clock

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

# Seconds between two checks: short beside any wait for a database, long enough to leave the processor to others.
_POLL_S = 0.005


class RecordingNotifier:
    """Keeps every notice, in the order of arrival. A notice that arrives twice is kept twice.

    Notices are sent in the background, so wait for them rather than look at once.

    Args:
        name: Its name among the notifiers.
    """

    def __init__(self, name: str = "recording") -> None:
        self.name = name
        self.notices: list[Notice] = []

    @property
    def pending(self) -> list[Notice]:
        """Notices of approvals that wait for a decision."""
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
        """Wait until `count` notices have arrived, and return all that have.

        Args:
            count: At least this many.
            event: Count and return only these; None: all.
            timeout_s: Seconds to wait at most.

        Raises:
            AssertionError: They did not arrive in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._enough(count, event, deadline):
            await asyncio.sleep(_POLL_S)
        return self._of(event)

    def wait(
        self, count: int = 1, *, event: Literal["pending", "decision"] | None = None, timeout_s: float = 5.0
    ) -> list[Notice]:
        """Wait as `wait_for` does, blocking; for tests that are not async."""
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
            raise AssertionError(f"{found} of {count} {event or ''} notices arrived in time".replace("  ", " "))
        return False


def make_notice(event: Literal["pending", "decision"] = "pending", **fields: Any) -> Notice:
    """Return a notice as the store makes them, of a fresh approval unless `approval_id` is given.

    Args:
        event: `pending`: an approval waits; `decision`: approver-1 has approved it.
        fields: Fields of `Notice` to set.
    """
    from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall

    now = clock.utc_now()
    given: dict[str, Any] = {
        "event": event,
        "delivery_id": uuid4(),
        "approval_id": uuid4(),
        "org_id": "default",
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete_file", arguments={"path": "reports/old.txt"}),
        "risk_explanation": "It deletes a file.",
        "created_at": now,
        "expires_at": now + timedelta(hours=1),
        "status": ApprovalStatus.PENDING,
    }
    if event == "decision":
        given |= {"status": ApprovalStatus.APPROVED, "approver_id": "approver-1", "note": "fine", "decided_at": now}
    return Notice(**(given | fields))


class MovableClock:
    """Moves the clock of this process: times that the package reads, and deadlines that the database judges for it."""

    @property
    def now(self) -> datetime:
        """The time now (aware UTC), as the package sees it."""
        return clock.utc_now()

    def move(self, by: timedelta | float) -> None:
        """Move the clock.

        Args:
            by: A timedelta, or seconds; negative goes back. Moves add up.
        """
        clock.move(by if isinstance(by, timedelta) else timedelta(seconds=by))

    def reset(self) -> None:
        """Set the clock back to the real time."""
        clock.reset()


def wait_until(condition: Callable[[], object], *, timeout_s: float = 5.0) -> None:
    """Return as soon as `condition()` is true. Blocks; for tests that are not async.

    Args:
        condition: Called again and again.
        timeout_s: Seconds to wait at most.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not become true within {timeout_s:g} seconds")
        time.sleep(_POLL_S)
