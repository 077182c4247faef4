"""`store.notifications`: list, count, send, redrive and prune the rows of the outbox."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, case, delete, func, literal_column, select, update

from agent_gateway_store.delivery.attempts import deliveries
from agent_gateway_store.delivery.outbox import StoreOutbox
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import Database, changed
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.filters import require_between, uuid_of
from agent_gateway_store.storage.identity import restored_identity
from agent_gateway_store.storage.pagination import decode_place, encode_place, invalid_cursor, listing_fingerprint
from agent_gateway_store.storage.statements import Statement, literal_number

_COLUMNS = (
    *("created_at", "notifier", "event", "status", "attempts", "next_attempt_at", "last_error"),
    *("approval_id", "delivery_id"),
)
_COUNTED = ("notifier", "is_loaded", "waiting", "due", "dead", "oldest")
# Deleted in some 10 ms: no other writer of SQLite waits longer for it.
_PRUNE_BATCH = 1000


class NotificationManager:
    """The outbox of an open store.

    A row is written for each notifier in the transaction of the change, so either both exist or neither. It is DUE
    until the notifier has taken the notice (DELIVERED), or has failed too often or for good (DEAD, a dead letter).
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
        about = None if approval_id is None else uuid_of("approval_id", approval_id)
        conditions = self._conditions(notifier=notifier, status=wanted, approval_id=about)
        scope = listing_fingerprint("notifications.list", self._org_id, [wanted, notifier, about])
        # Few rows are about one approval: read in the order of ids the whole table would be looked through for them.
        newest = deliveries.c.id if about is None else deliveries.c.id + literal_column("0")
        statement = select(deliveries).where(*conditions).order_by(newest.desc()).limit(literal_number(limit + 1))
        async with self._database.read() as connection:
            restored = await restored_identity(connection)
            if cursor is not None:
                if (row_id := int.from_bytes(decode_place(scope, cursor, 8, restored))) >= 2**63:
                    raise invalid_cursor()
                statement = statement.where(deliveries.c.id < row_id)
            rows = await Statement(statement).rows(connection, {})
        found = [NotificationDelivery.from_row(repaired(row)) for row in rows[:limit]]
        next_cursor = encode_place(scope, rows[limit - 1]["id"].to_bytes(8), restored) if len(rows) > limit else None
        return Page(found, next_cursor=next_cursor, columns=_COLUMNS)

    async def counts(self) -> Page[dict[str, Any]]:
        """Count what has not arrived, a line for each notifier.

        `waiting` are DUE, `due` those of them whose time has come, `dead` the dead letters, `oldest` when the oldest of
        all these was written. A notifier that is not `is_loaded` in this process is left to one that has it.
        """
        is_waiting = deliveries.c.status == _literal(DeliveryStatus.DUE)
        is_due = and_(is_waiting, deliveries.c.next_attempt_at <= db_now())
        statement = (
            select(
                deliveries.c.notifier,
                func.sum(case((is_waiting, 1), else_=0)).label("waiting"),
                func.sum(case((is_due, 1), else_=0)).label("due"),
                func.sum(case((is_waiting, 0), else_=1)).label("dead"),
                func.min(deliveries.c.created_at).label("oldest"),
            )
            .where(
                deliveries.c.status.in_([_literal(DeliveryStatus.DUE), _literal(DeliveryStatus.DEAD)]),
                *self._conditions(),
            )
            .group_by(deliveries.c.notifier)
        )
        async with self._database.read() as connection:
            found = {row["notifier"]: dict(row) for row in (await connection.execute(statement)).mappings()}
        loaded, nothing = self._outbox.notifiers, {"waiting": 0, "due": 0, "dead": 0, "oldest": None}
        lines = [
            {**nothing, **found.get(name, {}), "notifier": name, "is_loaded": name in loaded}
            for name in sorted({*found, *loaded})
        ]
        return Page(lines, columns=_COUNTED)

    async def redrive(self, delivery_id: UUID | str | None = None, *, notifier: str | None = None) -> int:
        """Send dead letters again: one, or all. They keep their delivery id and get all their attempts again.

        Args:
            delivery_id: Which one; None: all.
            notifier: Only those to this one.

        Returns:
            How many there were; 0 if there is no such dead letter.

        Raises:
            ValueError: `delivery_id` is no UUID.
        """
        named = None if delivery_id is None else uuid_of("delivery_id", delivery_id)
        statement = (
            update(deliveries)
            .where(
                deliveries.c.status == _literal(DeliveryStatus.DEAD),
                *self._conditions(notifier=notifier, delivery_id=named),
            )
            .values(status=DeliveryStatus.DUE, attempts=0, next_attempt_at=db_now())
        )
        return await changed(self._database, statement)

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
        old = (
            select(deliveries.c.id)
            .where(
                deliveries.c.status == _literal(DeliveryStatus.DELIVERED),
                # As a subquery the time is taken once, so that the index finds the rows.
                deliveries.c.delivered_at < select(db_now(plus=-older_than)).scalar_subquery(),
                *self._conditions(),
            )
            .order_by(deliveries.c.delivered_at)
            .limit(literal_number(_PRUNE_BATCH))
            .with_for_update(skip_locked=True)
        )

        @retry_conflicts
        async def prune_some() -> int:
            async with self._database.write() as connection:
                ids = (await connection.execute(old)).scalars().all()
                if ids:
                    await connection.execute(delete(deliveries).where(deliveries.c.id.in_(ids)))
                return len(ids)

        total, found = 0, _PRUNE_BATCH
        while found == _PRUNE_BATCH:
            found = await prune_some()
            total += found
        return total

    def _conditions(self, *, notifier: str | None = None, **equal: Any) -> tuple[ColumnElement[bool], ...]:
        equal |= {"org_id": self._org_id, "notifier": None if notifier is None else storable_key(notifier)}
        return tuple(
            deliveries.c[name] == (_literal(value) if name == "status" else value)
            for name, value in equal.items()
            if value is not None
        )


def _literal(status: DeliveryStatus) -> ColumnElement[Any]:
    # In the text, so that PostgreSQL knows how many rows it is about: a status is of few or of most.
    return literal_column(repr(str(status)))
