"""`store.notifications`: what was sent, what was not, and sending it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement

from agent_gateway_store.delivery import queries
from agent_gateway_store.delivery.claims import deliveries
from agent_gateway_store.delivery.outbox import StoreOutbox
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.filters import require_between
from agent_gateway_store.storage.pagination import listing_fingerprint

__all__ = ["NotificationManager"]

_PRUNE_BATCH = 1000


class NotificationManager:
    """The outbox of an open store.

    A row is written for each notifier with the change it tells of, so either both exist or neither. It is DUE until the
    notifier has taken the notice (DELIVERED), or has failed too often or for good (DEAD, a dead letter).
    """

    def __init__(self, database: Database, outbox: StoreOutbox, *, org_id: str | None = None) -> None:
        self._database, self._outbox, self._org_id = database, outbox, org_id

    async def list(
        self,
        status: DeliveryStatus | str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        *,
        notifier: str | None = None,
        approval_id: UUID | str | None = None,
    ) -> Page[NotificationDelivery]:
        """Return deliveries, newest first. `next_cursor` leads on; new deliveries do not move it.

        Args:
            status: Only DUE, DELIVERED or DEAD. None: all.
            limit: At most so many.
            cursor: `next_cursor` of the page before.
            notifier: Only to this one.
            approval_id: Only about this approval.

        Raises:
            InvalidCursorError: The cursor did not come from this listing.
            ValueError: There is no such status, the id is none, or `limit` is below 1 or above 2^31 - 1.
        """
        require_between("limit", limit, 1, hint="for more deliveries, go on with next_cursor")
        wanted = None if status is None else DeliveryStatus(status)
        about = None if approval_id is None else _uuid(approval_id)
        conditions = self._mine(notifier=notifier, status=wanted, approval_id=about)
        scope = listing_fingerprint("notifications.list", self._org_id, [wanted, notifier, about])
        async with self._database.read() as connection:
            return await queries.page(connection, *conditions, scope=scope, limit=limit, cursor=cursor)

    async def counts(self) -> Page[dict[str, Any]]:
        """Count what has not arrived, a line for each notifier.

        `waiting` are DUE, `due` those of them whose time has come, `dead` the dead letters, `oldest` when the oldest of
        all these was written. A notifier that is not `is_loaded` in this process is left to one that has it.
        """
        async with self._database.read() as connection:
            return await queries.counts(connection, *self._mine(), loaded=self._outbox.notifiers)

    async def redrive(self, delivery_id: UUID | str | None = None, *, notifier: str | None = None) -> int:
        """Send dead letters again: one, or all. They keep their delivery id and have all their tries before them.

        Args:
            delivery_id: Which one; None: all.
            notifier: Only those to this one.

        Returns:
            How many there were; 0 if there is no such dead letter.

        Raises:
            ValueError: `delivery_id` is no UUID.
        """
        named = None if delivery_id is None else _uuid(delivery_id)
        async with self._database.write() as connection:
            return await queries.redrive(connection, *self._mine(notifier=notifier, delivery_id=named))

    async def run(self, *, once: bool = False) -> int:
        """Send what is due to the notifiers of this process. Any number of processes may do so at once.

        An open store does this by itself unless NOTIFICATION_WORKER is off.

        Args:
            once: True returns when nothing is due any more; False goes on until it is cancelled, also while the
                database is away.

        Returns:
            How many notices of this store arrived meanwhile.

        Raises:
            StoreNotOpenError: The store is not open.
            StoreUnavailableError: With `once`: the database is away.
        """
        self._database.check_owner()
        return await self._outbox.worker.run(once=once, org_id=self._org_id)

    async def prune(self, older_than: timedelta) -> int:
        """Delete the record of notices that arrived longer ago than `older_than`; returns how many.

        What has not arrived is never deleted.

        Raises:
            ValueError: `older_than` is negative.
        """
        if older_than < timedelta():
            raise ValueError("older_than must not be negative.")
        total, found = 0, _PRUNE_BATCH
        while found == _PRUNE_BATCH:
            async with self._database.write() as connection:
                found = await queries.prune(connection, *self._mine(), older_than=older_than, limit=_PRUNE_BATCH)
            total += found
        return total

    def _mine(self, *, notifier: str | None = None, **equal: Any) -> tuple[ColumnElement[bool], ...]:
        equal |= {"org_id": self._org_id, "notifier": None if notifier is None else storable_key(notifier)}
        return tuple(deliveries.c[name] == value for name, value in equal.items() if value is not None)


def _uuid(value: UUID | str) -> UUID:
    return value if isinstance(value, UUID) else UUID(value)
