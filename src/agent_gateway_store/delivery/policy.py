"""When a notice is sent again, and when it is given up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from agent_gateway_store.hooks.dispatch import DeliveryReport
from agent_gateway_store.models.delivery import DeliveryStatus
from agent_gateway_store.settings import StoreSettings

# A receiver that restarts is back in seconds, one that is down for days is asked once an hour.
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 3600.0
JITTER_S = 2.0
# What a receiver may ask for: a day, so that none puts a notice off for ever, and a second, so that none makes a loop.
LONGEST_ASKED_S = 86_400.0
_SHORTEST_S = 1.0
# Beyond two timeouts, the one of an attempt and the one it may wait for its turn: for commits on a busy database.
_LEASE_MARGIN_S = 10.0
# `GRACE_SECONDS` of the executor, and a second for what lies between the look at the clock and the call.
_GIVE_WAY_S = 1.5


def wait_s(attempt: int, asked_s: float | None) -> float:
    """Return the seconds to wait after failed attempt number `attempt`: as asked, else twice as long each time."""
    if asked_s is not None:
        return min(max(asked_s, _SHORTEST_S), LONGEST_ASKED_S)
    jitter = random.uniform(0, JITTER_S)  # noqa: S311
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 60) + jitter)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a worker goes by.

    Attributes:
        lease_s: For how long a claimed row is nobody else's, in seconds.
        send_within_s: How long after its claim an attempt may still begin, so that it ends before the lease.
    """

    concurrency: int
    max_attempts: int
    poll_s: float
    lease_s: float
    send_within_s: float

    @classmethod
    def of(cls, settings: StoreSettings) -> Policy:
        """Return what the settings say."""
        timeout_s = settings.plugin_timeout_seconds
        lease_s = 2 * timeout_s + _LEASE_MARGIN_S
        return cls(
            concurrency=settings.notification_concurrency,
            max_attempts=settings.notification_max_attempts,
            poll_s=settings.notification_poll_seconds,
            lease_s=lease_s,
            send_within_s=lease_s - timeout_s - _GIVE_WAY_S,
        )

    def after(self, report: DeliveryReport, attempt: int) -> tuple[DeliveryStatus, float]:
        """Return the status of a row after an attempt, and in how many seconds the next one is due."""
        if report.ok:
            return DeliveryStatus.DELIVERED, 0.0
        if report.is_permanent or attempt >= self.max_attempts:
            return DeliveryStatus.DEAD, 0.0
        return DeliveryStatus.DUE, wait_s(attempt, report.retry_after_s)
