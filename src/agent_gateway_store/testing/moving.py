"""A clock that tests move."""

from __future__ import annotations

from datetime import datetime, timedelta

from agent_gateway_store import clock

__all__ = ["MovableClock"]


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
        """Put the clock back to the real time."""
        clock.reset()
