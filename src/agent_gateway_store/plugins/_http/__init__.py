"""HTTP from the bundled plugins to the outside: which addresses, for how long, and how much is read."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = ["MAX_RETRY_AFTER_SECONDS", "retry_after_s", "time_limit_s"]

# A day: an outbox row that waits longer has no use for most approvals, which have expired.
MAX_RETRY_AFTER_SECONDS = 24 * 3600.0


def time_limit_s(settings: StoreSettings) -> float:
    """Return the seconds for one delivery: a little less than the plugin has, so that our own error says why."""
    # Half a second is left for rendering the notice and for its thread, which take milliseconds on an idle machine.
    return max(settings.plugin_timeout_seconds - 0.5, settings.plugin_timeout_seconds / 2)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3), at most a day; None if none.

    Args:
        header: A number of seconds, or a date.
    """
    if header is None:
        return None
    header = header.strip()
    # Nine digits are 31 years: more than is kept of it, and a number that `float` reads in any case.
    if header.isascii() and header.isdecimal():
        return min(float(header[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(header)
    except (TypeError, ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)
