"""What the metrics of a store are read from: its counters, and now and then the spool and the database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import func, or_, select

from agent_gateway_store import clock
from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.audit.writer import OpenWriter
from agent_gateway_store.delivery import NotificationManager
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.evidence import AuditLeaf
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.shipping import SinkManager
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.telemetry import Reading

# Prometheus asks every 15 to 60 seconds.
_EVERY_S = 15.0
# Older figures are not given out: an alert on what was true before an outage would hide the outage.
_FRESH_S = 3 * _EVERY_S
_OUTCOMES = ("stored", "duplicate", "spooled", "replayed", "lost")

_events, _leaves = AuditEvent.__table__, AuditLeaf.__table__
_approvals = ApprovalRequest.__table__
_deliveries = NotificationDelivery.__table__
_OPEN = (
    select(_approvals.c.status, func.count(), func.min(_approvals.c.created_at))
    .where(
        or_(
            (_approvals.c.status == "PENDING") & (_approvals.c.expires_at > db_now()),
            (_approvals.c.status == "APPROVED")
            & (func.coalesce(_approvals.c.use_before, _approvals.c.expires_at) > db_now()),
        )
    )
    .group_by(_approvals.c.status)
)
_OLDEST_DUE = (
    select(_deliveries.c.notifier, func.min(_deliveries.c.next_attempt_at))
    .where(_deliveries.c.status == "DUE", _deliveries.c.next_attempt_at <= db_now())
    .group_by(_deliveries.c.notifier)
)
# By the primary key and one index: what was committed late below the last leaf is sealed in the next round.
_UNSEALED = (
    select(_events.c.timestamp)
    .where(_events.c.id > select(func.coalesce(func.max(_leaves.c.event_id), 0)).scalar_subquery())
    .order_by(_events.c.id)
    .limit(1)
)
_OLDEST = select(_events.c.timestamp).order_by(_events.c.timestamp, _events.c.id).limit(1)

_logger = logging.getLogger("agent_gateway_store")


class Figures:
    """The figures of one open store.

    Args:
        writer: Counts events.
        database, redis, notifications, sinks, settings: Of the store.
    """

    def __init__(
        self,
        writer: OpenWriter,
        database: Database,
        redis: RedisCache,
        notifications: NotificationManager,
        sinks: SinkManager,
        settings: StoreSettings,
    ) -> None:
        self._writer, self._database, self._redis = writer, database, redis
        self._notifications, self._sinks = notifications, sinks
        self._floor_s = settings.audit_retention_floor_days * 86_400
        self._task = BackgroundTasks()
        # Replaced as a whole, since other threads read them.
        self._read: dict[Callable[[], object], tuple[float, list[Reading]]] = {}

    def start(self) -> None:
        """Read the spool and the database every 15 seconds from now on."""
        self._task.start(self._run())

    async def close(self) -> None:
        """Read no more."""
        await self._task.cancel()

    def readings(self) -> Iterable[Reading]:
        """Return the counters as they are, and what was read of the spool and the database if that is fresh."""
        if (writer := self._writer.writer) is not None:
            counters = asdict(writer.counters)
            for outcome in _OUTCOMES:
                yield "audit.events", counters[outcome], {"outcome": outcome}
            yield "audit.queue_depth", counters["queue_depth"], {}
            yield "audit.queue_age", writer.queue_age_s, {}
        if self._redis.client is not None:
            yield "redis.breaker_open", int(not self._redis.is_available), {}
        for read_at, readings in list(self._read.values()):
            if time.monotonic() - read_at < _FRESH_S:
                yield from readings

    async def refresh(self) -> None:
        """Read the spool and the database now; what cannot be read is left as it is."""
        for read in (self._read_spool, self._read_database, self._read_sinks):
            try:
                readings = await read()
            except Exception as exc:
                # Gauges that end say so; and the next figures may be there again.
                _logger.debug("Figures cannot be read (%s).", type(exc).__name__)
            else:
                self._read |= {read: (time.monotonic(), readings)}

    async def _run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_EVERY_S)

    async def _read_spool(self) -> list[Reading]:
        spool = self._writer.get().spool
        waiting, quarantined = await spool.counts()
        return [
            ("audit.spool_depth", waiting, {"state": "waiting"}),
            ("audit.spool_depth", quarantined, {"state": "quarantined"}),
            ("audit.spool_age", _age_s(await spool.oldest()), {}),
        ]

    async def _read_database(self) -> list[Reading]:
        async with self._database.read() as connection:
            approvals = {status: (count, oldest) for status, count, oldest in await connection.execute(_OPEN)}
            oldest_due = {row.notifier: row[1] for row in await connection.execute(_OLDEST_DUE)}
            unsealed = (await connection.execute(_UNSEALED)).scalar()
            oldest_event = (await connection.execute(_OLDEST)).scalar()
        readings: list[Reading] = [
            ("approvals.open", approvals.get(status, (0, None))[0], {"status": status})
            for status in ("PENDING", "APPROVED")
        ]
        readings.append(("approvals.oldest_pending_age", _age_s(approvals.get("PENDING", (0, None))[1]), {}))
        for line in await self._notifications.counts():
            notifier = {"notifier": line["notifier"]}
            readings.append(("outbox.due", line["due"], notifier))
            readings.append(("outbox.dead", line["dead"], notifier))
            readings.append(("outbox.oldest_due_age", _age_s(oldest_due.get(line["notifier"])), notifier))
        readings.append(("evidence.seal_lag", _age_s(unsealed), {}))
        readings.append(("retention.lag", max(0.0, _age_s(oldest_event) - self._floor_s), {}))
        return readings

    async def _read_sinks(self) -> list[Reading]:
        readings: list[Reading] = []
        for line in await self._sinks.list():
            sink = {"sink": line["sink"], "org": line["org_id"]}
            readings.append(("sinks.dead", line["dead"], sink))
            if line["lag_s"] is not None:
                readings.append(("sinks.lag", line["lag_s"], sink))
        return readings


def _age_s(since: datetime | None) -> float:
    return 0.0 if since is None else max(0.0, (clock.utc_now() - since).total_seconds())
