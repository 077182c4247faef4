"""New events in the order of their commits: none missed and none twice, however long transactions stay open.

Ids are handed out before rows become visible, so `id > last` misses what a slow transaction commits later. On
PostgreSQL each row therefore holds the id of its transaction, and a position in the log is a snapshot: the transactions
that were at their end when it was taken. What is new since then are the rows of all others that have ended meanwhile
(PostgreSQL's documentation of `pg_current_snapshot`). SQLite has one writer at a time, so that ids are given in the
order of commits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    tuple_,
    union_all,
)

from agent_gateway_store.audit.filters import Criteria
from agent_gateway_store.audit.reading import events_of
from agent_gateway_store.audit.selects import FIELDS, SameDialect, conditions, parameters, selected, table
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.pagination import decode, encode, invalid_cursor
from agent_gateway_store.storage.statements import CompiledStatement, compiled, dialect_of, fetch

__all__ = ["changes"]

_LARGEST = 2**63
_Shape = tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class _Place:
    """Where a reader stands.

    Attributes:
        since: The snapshot whose rows are read already (PostgreSQL).
        until: The snapshot whose rows are being read; None: all of them were.
        transaction: Of the last row read from `until`; None while history is read, which goes by id.
        id: Of the last row read.
    """

    since: str | None = None
    until: str | None = None
    transaction: int | None = None
    id: int = 0


async def changes(
    connection: AnyConnection, found: Criteria, cursor: str, limit: int
) -> tuple[list[AuditEvent], str, bool]:
    """Return the next events behind `cursor` (or "now", or "beginning"), the cursor behind them, and if there are more.

    Raises:
        InvalidCursorError: The cursor is not of this listing.
    """
    dialect = dialect_of(connection)
    step = _postgres_step if dialect.name == "postgresql" else _sqlite_step
    place = None if cursor in ("now", "beginning") else _decoded(found.scope, cursor, dialect.name)
    rows, place, is_more = await step(connection, dialect, found, place, cursor == "now", limit)
    return events_of(rows), encode(found.scope, json.dumps(asdict(place), separators=(",", ":")).encode()), is_more


async def _sqlite_step(
    connection: AnyConnection, dialect: Dialect, found: Criteria, place: _Place | None, is_now: bool, limit: int
) -> tuple[Sequence[Sequence[Any]], _Place, bool]:
    # Both statements read one snapshot: what no filter lets through is not looked at again.
    newest = (await fetch(connection, compiled(select(func.max(table.c.id)), dialect), {}))[0][0] or 0
    if place is None and is_now:
        return [], _Place(id=newest), False
    last_id = place.id if place else 0
    values = parameters(dialect, found.values) | {"p_id": last_id}
    rows = await fetch(connection, _query("added", dialect, found, limit + 1), values)
    if len(rows) <= limit:
        return rows, _Place(id=max(newest, last_id)), False
    return rows[:limit], _Place(id=rows[limit - 1][0]), True


async def _postgres_step(
    connection: AnyConnection, dialect: Dialect, found: Criteria, place: _Place | None, is_now: bool, limit: int
) -> tuple[Sequence[Sequence[Any]], _Place, bool]:
    if place is None or place.until is None:
        now = str((await fetch(connection, compiled(select(_NOW), dialect), {}))[0][0])
        if place is None:
            place = _Place(since=now) if is_now else _Place(until=now)
        else:
            place = _Place(since=place.since, until=now, transaction=0)
    if place.until is None:
        return [], place, False
    is_history = place.since is None
    values = parameters(dialect, found.values) | {"p_until": place.until, "p_id": place.id}
    if place.since is not None:
        first_open, in_progress = _unseen(place.since)
        values |= {"p_open": first_open, "p_in_progress": in_progress, "p_transaction": place.transaction or 0}
        values["p_end"] = _unseen(place.until)[0]
    query = _query("history" if is_history else "new", dialect, found, limit + 1)
    rows = await fetch(connection, query, values)
    is_more, rows = len(rows) > limit, [tuple(row) for row in rows[:limit]]
    events = [row[:-1] for row in rows]
    if not is_more:
        return events, _Place(since=place.until), False
    last = rows[-1]
    reached = _Place(place.since, place.until, None if is_history else last[-1], last[0])
    return events, reached, True


_NOW: ColumnElement[str] = literal_column("pg_current_snapshot()::text")
_TRANSACTION = table.c.transaction_id


def _query(kind: str, dialect: Dialect, found: Criteria, count: int) -> CompiledStatement:
    return _compiled(kind, dialect.name, found.shape, count, SameDialect(dialect))


@lru_cache(maxsize=128)
def _compiled(kind: str, dialect: str, shape: _Shape, count: int, same: SameDialect) -> CompiledStatement:
    make = {"added": _added, "history": _history, "new": _new}[kind]
    return compiled(make(dialect, shape, count), same.dialect)


def _added(dialect: str, shape: _Shape, count: int) -> Select[Any]:
    """What has a larger id."""
    statement = selected(dialect).where(table.c.id > bindparam("p_id", type_=BigInteger()), *conditions(dialect, shape))
    return statement.order_by(table.c.id).limit(literal_column(str(count), Integer()))


def _history(dialect: str, shape: _Shape, count: int) -> Select[Any]:
    """What the snapshot `until` holds, by id; rows from before the column was there have no transaction."""
    statement = selected(dialect).add_columns(_TRANSACTION)
    seen = or_(_TRANSACTION.is_(None), _visible())
    statement = statement.where(table.c.id > bindparam("p_id", type_=BigInteger()), seen)
    statement = statement.where(*conditions(dialect, shape))
    return statement.order_by(table.c.id).limit(literal_column(str(count), Integer()))


def _new(dialect: str, shape: _Shape, count: int) -> Select[Any]:
    """What the snapshot `until` holds and `since` does not, by transaction and id: two walks along one index."""
    behind = tuple_(_TRANSACTION, table.c.id) > tuple_(
        bindparam("p_transaction", type_=BigInteger()), bindparam("p_id", type_=BigInteger())
    )
    later = and_(
        bindparam("p_open", type_=BigInteger()) <= _TRANSACTION, bindparam("p_end", type_=BigInteger()) > _TRANSACTION
    )
    in_progress = any_(bindparam("p_in_progress", type_=ARRAY(BigInteger())))
    arms = [
        selected(dialect)
        .add_columns(_TRANSACTION)
        .where(unseen, behind, _visible(), *conditions(dialect, shape))
        .order_by(_TRANSACTION, table.c.id)
        .limit(literal_column(str(count), Integer()))
        for unseen in (later, in_progress == _TRANSACTION)
    ]
    both = union_all(*(select(arm.subquery()) for arm in arms)).subquery()
    statement = select(*(both.c[name] for name in (*FIELDS, "transaction_id")))
    return statement.order_by(both.c.transaction_id, both.c.id).limit(literal_column(str(count), Integer()))


def _visible() -> ColumnElement[bool]:
    until = bindparam("p_until", type_=Text())
    return func.pg_visible_in_snapshot(
        literal_column("audit_events.transaction_id::text::xid8"), until.op("::")(literal_column("pg_snapshot"))
    )


def _unseen(snapshot: str) -> tuple[int, list[int]]:
    """Return the first transaction that had not begun, and those that had begun and not ended."""
    _, first_open, in_progress = snapshot.split(":")
    return int(first_open), [int(each) for each in in_progress.split(",") if each]


def _decoded(scope: bytes, cursor: str, dialect: str) -> _Place:
    payload = decode(scope, cursor)
    try:
        place = _Place(**json.loads(payload))
        numbers = [place.id, place.transaction or 0]
        snapshots = [each for each in (place.since, place.until) if each is not None]
        for snapshot in snapshots:
            first_open, in_progress = _unseen(snapshot)
            numbers += [int(snapshot.partition(":")[0]), first_open, *in_progress]
        if all(type(each) is int and 0 <= each < _LARGEST for each in numbers) and bool(snapshots) == (
            dialect == "postgresql"
        ):
            return place
    except (ValueError, TypeError, AttributeError):
        pass
    raise invalid_cursor()
