"""Write to the outbox: one row for each notifier, in the transaction that makes the change it tells of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Float,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    insert,
    literal_column,
    not_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from agent_gateway_store.approval.statements import INSERT, insert_request
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import ApprovalStatus, Notice
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.rows import RowsParameter
from agent_gateway_store.storage.statements import Statement, unindexed

__all__ = ["Later", "Outbox", "insert_and_tell", "record"]

deliveries = NotificationDelivery.__table__  # type: ignore[attr-defined]
_PLACEHOLDER = UUID(int=0)
_COLUMNS = (
    *("delivery_id", "org_id", "approval_id", "notifier", "event", "payload"),
    *("status", "attempts", "next_attempt_at", "created_at"),
)


class Outbox(Protocol):
    """To whom notices go, and who sends them."""

    @property
    def notifiers(self) -> Sequence[str]:
        """Names of the notifiers that get a row each."""
        ...

    @property
    def lease_s(self) -> float | None:
        """For how many seconds a new row is kept for `send`; None: any worker may send it at once."""
        ...

    def send(self, notice: Notice, mine: Mapping[str, UUID]) -> None:
        """Hear of a notice whose rows are committed.

        Args:
            notice: Without a `delivery_id` that means anything.
            mine: Notifier to delivery id, of the rows kept for this process.
        """
        ...


class Later:
    """An outbox whose rows are sent by a worker somewhere else."""

    lease_s = None

    def __init__(self, notifiers: Iterable[str]) -> None:
        self.notifiers = tuple(notifiers)

    def send(self, notice: Notice, mine: Mapping[str, UUID]) -> None:
        """Leave it to the worker."""


def _utc_text(moment: ColumnElement[Any]) -> ColumnElement[str]:
    # Spelt out, for the JSON of a timestamp is in the time zone of the session.
    return func.to_char(
        func.timezone(literal_column("'UTC'"), moment), literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")
    )


def _insert_and_tell(dialect: str) -> Any:
    new = insert_request(dialect).cte("new")
    told = func.unnest(
        bindparam("p_notifiers", type_=ARRAY(Text())), bindparam("p_delivery_ids", type_=ARRAY(Uuid()))
    ).table_valued(column("notifier", Text()), column("delivery_id", Uuid()), name="told")
    told = told.render_derived()
    lease_s: ColumnElement[Any] = bindparam("p_lease_s", type_=Float(53))
    facts = func.jsonb_build_object(
        *(literal_column("'created_at'"), _utc_text(new.c.created_at)),
        *(literal_column("'expires_at'"), _utc_text(new.c.expires_at)),
        *(literal_column("'delivery_id'"), told.c.delivery_id),
    )
    rows = select(
        *(told.c.delivery_id, new.c.org_id, new.c.approval_id, told.c.notifier, literal_column("'pending'")),
        bindparam("p_notice", type_=JSONB()).op("||")(facts),
        literal_column("'DUE'"),
        case((lease_s.is_(None), literal_column("0")), else_=literal_column("1")),
        case((lease_s.is_(None), db_now()), else_=db_now(plus="p_lease_s")),
        db_now(),
    ).select_from(new.join(told, true()))
    writing = insert(deliveries).from_select(_COLUMNS, rows).cte("writing")
    return select(*new.c).add_cte(writing)


_INSERT_AND_TELL = Statement(_insert_and_tell)


_NOTICES = RowsParameter(
    "notices",
    {
        "delivery_id": Uuid(),
        "org_id": Text(),
        "approval_id": Uuid(),
        "notifier": Text(),
        "event": Text(),
        "payload": Text(),
    },
)


def _record(dialect: str) -> Any:
    notices = _NOTICES.table(dialect)
    lease_s: ColumnElement[Any] = bindparam("p_lease_s", type_=Float(53))
    before = deliveries.alias("before")
    # A notice that waits for an earlier one about the same approval is sent by whoever delivers that.
    is_held_up = (
        select(literal_column("1"))
        .select_from(before)
        .where(
            before.c.approval_id == notices.c.approval_id,
            # The index over status and notifier holds a whole backlog, the one over approval_id a few rows.
            unindexed(before.c.notifier) == notices.c.notifier,
            unindexed(before.c.status) == literal_column("'DUE'"),
        )
        .limit(literal_column("1"))
        .offset(literal_column("0"))
        .exists()
    )
    is_mine = and_(lease_s.is_not(None), not_(is_held_up)).label("is_mine")
    # Materialised, so that it looks back once for each row and not once for each use of the answer.
    new = select(*notices.c, is_mine).cte("new").prefix_with("MATERIALIZED")
    payload = cast(new.c.payload, JSONB()) if dialect == "postgresql" else new.c.payload
    rows = select(
        *(new.c.delivery_id, new.c.org_id, new.c.approval_id, new.c.notifier, new.c.event, payload),
        literal_column("'DUE'"),
        case((new.c.is_mine, literal_column("1")), else_=literal_column("0")),
        case((new.c.is_mine, db_now(plus="p_lease_s")), else_=db_now()),
        db_now(),
    )
    return insert(deliveries).from_select(_COLUMNS, rows).returning(deliveries.c.delivery_id, deliveries.c.attempts)


_RECORD = Statement(_record)


async def insert_and_tell(
    connection: AnyConnection, values: Mapping[str, Any], outbox: Outbox
) -> tuple[Mapping[str, Any] | None, dict[str, UUID]]:
    """Insert an approval and the rows of its notice; in one statement on PostgreSQL.

    Args:
        connection: In a transaction, unless one statement is enough.
        values: As `issue_values` gives them.
        outbox: Who is told.

    Returns:
        The approval, or None if it stands already, and then nothing is written; notifier to delivery id of the rows
        kept for this process.
    """
    told = {name: uuid4() for name in outbox.notifiers}
    if not told:
        return await INSERT.first(connection, values), {}
    notice = _pending(values)
    if dialect_of(connection) == "postgresql":
        shown = notice.model_dump(mode="json", exclude={"created_at", "expires_at", "delivery_id"})
        to = {"p_notifiers": list(told), "p_delivery_ids": list(told.values())}
        given = {**values, **to, "p_notice": shown, "p_lease_s": outbox.lease_s}
        row = await _INSERT_AND_TELL.first(connection, given)
    else:
        row = await INSERT.first(connection, values)
        if row is not None:
            asked = notice.model_copy(update={"created_at": row["created_at"], "expires_at": row["expires_at"]})
            await _write(connection, [(asked, told)], outbox.lease_s)
    return row, told if row is not None and outbox.lease_s is not None else {}


def _pending(values: Mapping[str, Any]) -> Notice:
    return Notice(
        event="pending",
        delivery_id=_PLACEHOLDER,
        approval_id=values["p_approval_id"],
        org_id=values["p_org_id"],
        request_id=values["p_request_id"],
        caller_id=values["p_caller_id"],
        tool_call=values["p_tool_call"],
        risk_explanation=values["p_risk_explanation"],
        status=ApprovalStatus.PENDING,
    )


async def record(connection: AnyConnection, notices: Sequence[Notice], outbox: Outbox) -> list[dict[str, UUID]]:
    """Write the rows of `notices`; does not commit.

    Returns:
        For each notice: notifier to delivery id of the rows kept for this process.
    """
    told = [(notice, {name: uuid4() for name in outbox.notifiers}) for notice in notices]
    if not told or not outbox.notifiers:
        return [{} for _ in notices]
    mine = await _write(connection, told, outbox.lease_s)
    return [{name: each for name, each in to.items() if each in mine} for _, to in told]


async def _write(
    connection: AnyConnection, told: Sequence[tuple[Notice, Mapping[str, UUID]]], lease_s: float | None
) -> frozenset[UUID]:
    rows = [
        {
            "delivery_id": delivery_id,
            "org_id": notice.org_id,
            "approval_id": notice.approval_id,
            "notifier": name,
            "event": notice.event,
            "payload": notice.model_copy(update={"delivery_id": delivery_id}).model_dump_json(),
        }
        for notice, to in told
        for name, delivery_id in to.items()
    ]
    given = _NOTICES.values(dialect_of(connection), rows)
    written = await _RECORD.rows(connection, {**given, "p_lease_s": lease_s})
    return frozenset(row["delivery_id"] for row in written if row["attempts"])
