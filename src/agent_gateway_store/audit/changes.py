"""New events in the order of their commits: none missed and none twice, however long transactions stay open.

Ids are given before rows become visible, so `id > last` would miss rows that a slow transaction commits later. On
PostgreSQL each row therefore holds the id of its transaction, and a position in the log is a snapshot: the transactions
that had ended when it was taken. New since then are the rows of all other transactions that have ended by now
(PostgreSQL's documentation of `pg_current_snapshot`). SQLite has one writer at a time, so ids are in the order of
commits.

Both kinds of ids can be given twice. A PostgreSQL server that was killed gives again every transaction id above the
newest one in the log that it had flushed, and SQLite may have given the id of a deleted newest row again before
migration 0008. So a snapshot that is kept ends at the newest event that it contains: that event was flushed before
anybody could see it, and no id up to its own is given again. A cursor also names that event. If it is missing, this is
not the database that the cursor came from; it may be a standby that was promoted before it had received everything.

A prune takes away old events, never the newest one, and notes the highest ids that it took away. A reader that has
passed those goes on; one that has not is refused, as it would miss events.

A cursor names its database, too, and is refused after `gateway-store db restored`. What was in the backup is history
from then on: its transaction ids are those of another server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    text,
    tuple_,
    union_all,
)

from agent_gateway_store.audit.selects import FIELDS, events_of, select_events, table
from agent_gateway_store.errors import EventsPrunedError, InvalidCursorError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.filters import Criteria, Shape
from agent_gateway_store.storage.pagination import decode, encode, invalid_cursor
from agent_gateway_store.storage.statements import Statement, literal_number

# Of one statement: in a table that was never analysed PostgreSQL takes neighbours by id for scattered, and for a few
# thousand of them would rather read and sort all of it.
_ROWS = 500
# Ids are signed 64-bit integers in both databases.
_LARGEST = 2**63
# 64 bits in hex: enough to distinguish two events that were given the same ids.
_MARK_DIGITS = 16
# The snapshot that contains no transaction: PostgreSQL's ids begin at 3.
_NOTHING = "1:1:"


class _Snapshot(NamedTuple):
    """What a snapshot of PostgreSQL says, whose text is `oldest:end:id,id,...`: all before `oldest` had ended."""

    oldest: int
    # The first transaction that had not begun.
    end: int
    in_progress: list[int]

    @classmethod
    def parse(cls, text: str) -> _Snapshot:
        oldest, end, in_progress = text.split(":")
        return cls(int(oldest), int(end), [int(each) for each in in_progress.split(",") if each])


@dataclass(frozen=True)
class _Place:
    """The position of a reader.

    Attributes:
        since: The snapshot whose rows are read already (PostgreSQL).
        until: The snapshot whose rows are being read; None: all of them were.
        transaction: Of the last row read from `until`; None while history is read, in the order of ids.
        id: Of the last row read.
        mark: The newest event passed: its id and a digest of what it is. None in cursors of earlier versions, and
            where no event was passed.
        database: The identity of the database. None in cursors of earlier versions.
        pruned: How many events had been pruned when it was known that it had missed none.
    """

    since: str | None = None
    until: str | None = None
    transaction: int | None = None
    id: int = 0
    mark: tuple[int, str] | None = None
    database: str | None = None
    pruned: int = 0


async def changes(
    connection: AnyConnection, found: Criteria, cursor: str, limit: int
) -> tuple[list[AuditEvent], str, bool]:
    """Return the next events after `cursor` (or "now", or "beginning"), the cursor after them, and if there are more.

    A `limit` of 0 with "beginning" returns a cursor before everything, which tells of what is pruned from now on.

    Raises:
        InvalidCursorError: The cursor is not of this listing, or the newest event that it has passed is missing here.
    """
    dialect = dialect_of(connection)
    step = _postgres_step if dialect == "postgresql" else _sqlite_step
    place = None if cursor in ("now", "beginning") else _decoded(found.scope, cursor, dialect)
    rows: list[Sequence[Any]] = []
    while True:
        more, place, is_more = await step(connection, found, place, cursor == "now", min(_ROWS, limit - len(rows)))
        rows += more
        if not is_more or len(rows) == limit:
            break
    return events_of(rows), encode(found.scope, json.dumps(asdict(place), separators=(",", ":")).encode()), is_more


async def _sqlite_step(
    connection: AnyConnection, found: Criteria, place: _Place | None, is_now: bool, limit: int
) -> tuple[Sequence[Sequence[Any]], _Place, bool]:
    # Both statements read the same snapshot, so the new position may skip every event that no filter matches.
    values = {"p_mark": place.mark[0] if place and place.mark else None}
    state = (await _STATE.tuples(connection, values))[0]
    newest_id, newest, marked, is_gone, pruned, pruned_id, archive, identity, history_id = state
    _check_database(place, identity, history_id)
    if place is not None and not ((newest_id or 0) >= place.id and _holds(place, marked, is_gone)):
        raise _other_database()
    if place is not None and pruned != place.pruned and place.id < (pruned_id or 0):
        raise EventsPrunedError(archive)
    end = _Place(id=newest_id or 0, mark=_mark(newest_id, newest), database=identity, pruned=pruned)
    if place is None and (is_now or limit == 0):
        return [], end if is_now else replace(end, id=0, mark=None), False
    values = {**found.values, "p_id": place.id if place else 0}
    rows = await _statement(_added, found.shape, limit + 1).tuples(connection, values)
    if len(rows) <= limit:
        return rows, end, False
    last_id, request_id = rows[limit - 1][:2]
    return rows[:limit], replace(end, id=last_id, mark=_mark(last_id, request_id)), True


async def _postgres_step(
    connection: AnyConnection, found: Criteria, place: _Place | None, is_now: bool, limit: int
) -> tuple[Sequence[Sequence[Any]], _Place, bool]:
    values: dict[str, Any] = {"p_mark": place.mark[0] if place and place.mark else None}
    state = (await _STATE.tuples(connection, values))[0]
    snapshot, is_standby, edge, last, newest_id, newest, marked, is_gone, pruned, identity, history_id = state
    _check_database(place, identity, history_id)
    begins = place is None
    if place is not None and not (_holds(place, marked, is_gone) and _end(place) <= edge):
        if is_standby:
            # It has not received yet what the cursor has passed.
            return [], place, False
        raise _other_database()
    now, mark = _kept(snapshot, last), _mark(newest_id, newest)
    if place is None:
        place = _Place(since=now, mark=mark, pruned=pruned) if is_now else _Place(until=now, mark=mark, pruned=pruned)
    elif place.until is None:
        place = _Place(since=place.since, until=now, transaction=0, mark=mark, pruned=place.pruned)
    place = replace(place, database=identity)
    if place.until is None or limit == 0:
        return [], place, False
    values = {**found.values, "p_snapshot": place.until, "p_id": place.id, "p_history": history_id or 0}
    if place.since is not None:
        since, until = _Snapshot.parse(place.since), _Snapshot.parse(place.until)
        # Transactions that are still in progress, perhaps long imports, have no visible rows yet.
        ended = sorted({*since.in_progress} - {*until.in_progress})
        values |= {"p_open": since.end, "p_end": until.end, "p_in_progress": ended}
        values["p_transaction"] = place.transaction or 0
    build = _history if place.since is None else _new
    rows = await _statement(build, found.shape, limit + 1).tuples(connection, values)
    if not begins:
        # After the read, which may have missed what was pruned just before it.
        place = await _unpruned(connection, place)
    is_more, rows = len(rows) > limit, [tuple(row) for row in rows[:limit]]
    events = [row[:-1] for row in rows]
    if not is_more:
        return events, _Place(since=place.until, mark=place.mark, database=identity, pruned=place.pruned), False
    transaction = None if place.since is None else rows[-1][-1]
    return events, replace(place, transaction=transaction, id=rows[-1][0]), True


async def _unpruned(connection: AnyConnection, place: _Place) -> _Place:
    """Return the place, which is known now to have missed nothing; else raise EventsPrunedError (PostgreSQL)."""
    pruned, pruned_id, pruned_transaction, archive = (await _PRUNED.tuples(connection, {}))[0]
    if place.since is None:
        # History is read in the order of ids.
        is_behind = place.id < (pruned_id or 0)
    else:
        # Every transaction before the oldest that was in progress is in `since`; of the others in `until`, those up to
        # the row read last.
        passed = _Snapshot.parse(place.since).oldest
        if place.until is not None and place.transaction is not None:
            passed = max(passed, min(_Snapshot.parse(place.until).oldest, place.transaction))
        is_behind = passed <= (pruned_transaction or 0)
    if is_behind and pruned != place.pruned:
        raise EventsPrunedError(archive)
    return replace(place, pruned=pruned)


def _check_database(place: _Place | None, identity: str | None, history_id: int | None) -> None:
    """Refuse a place of another database, or of this one before it was restored."""
    # A cursor of an earlier version names none; it was not handed out after a restore, which that version cannot do.
    if place is not None and not (history_id is None if place.database is None else place.database == identity):
        raise InvalidCursorError(
            "This cursor is of another database, or of this one before `gateway-store db restored`: begin with a new "
            'cursor, or with "beginning".'
        )


def _mark(row_id: int | None, what: str | None) -> tuple[int, str] | None:
    """Return the id and a digest of the newest event passed; `what` distinguishes it from another with the same id."""
    if row_id is None or what is None:
        return None
    return row_id, hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:_MARK_DIGITS]


def _holds(place: _Place, marked: str | None, is_gone: bool | int | None) -> bool:
    """True if the event that the place has passed last is there, or was pruned or erased.

    `marked` is what this database has under its id; `is_gone`: its leaf is there, and no event with its content.
    """
    return place.mark is None or place.mark == _mark(place.mark[0], marked) or bool(is_gone)


def _other_database() -> InvalidCursorError:
    return InvalidCursorError(
        "The newest event that this cursor has passed is not in this database: it was deleted, or the database is a "
        'restored copy or a promoted standby that lacks it. Begin with a new cursor, or with "beginning".'
    )


def _kept(snapshot: str, newest: int | None) -> str:
    """Return the part of a snapshot that survives a crash: up to its newest event, whose id is not given again."""
    if newest is None:
        return _NOTHING
    oldest, _, in_progress = _Snapshot.parse(snapshot)
    within = [each for each in in_progress if each <= newest]
    return f"{min(oldest, newest + 1)}:{newest + 1}:{','.join(map(str, within))}"


def _end(place: _Place) -> int:
    """Return the first transaction that is beyond both snapshots of a place."""
    return max(_Snapshot.parse(each).end for each in (place.since, place.until) if each is not None)


_IS_GONE = """
EXISTS (
    SELECT 1 FROM audit_leaves AS leaf LEFT JOIN audit_events AS event ON event.id = leaf.event_id
    WHERE leaf.event_id = :p_mark AND (event.id IS NULL OR leaf.salt IS NULL)
)
"""
_PRUNED_EVENTS = "(SELECT CAST(coalesce(sum(events), 0) AS bigint) FROM audit_prunes)"
_ARCHIVE = "(SELECT archive FROM audit_prunes WHERE last_event_id IS NOT NULL ORDER BY id DESC LIMIT 1)"
_SQLITE_STATE = f"""
SELECT max(id), (SELECT request_id FROM audit_events ORDER BY id DESC LIMIT 1),
    (SELECT request_id FROM audit_events WHERE id = :p_mark), {_IS_GONE}, {_PRUNED_EVENTS},
    (SELECT max(last_event_id) FROM audit_prunes), {_ARCHIVE},
    (SELECT identity FROM database_identity), (SELECT history_id FROM database_identity)
FROM audit_events
"""  # noqa: S608  names of our own

# Rows of open transactions, which may be hundreds of thousands, are skipped: the newest event is looked for between the
# ids of these transactions. A standby's snapshot does not list them, so there the oldest open transaction is the end.
_POSTGRES_STATE = f"""
SELECT snapshot::text, is_standby, edge, newest.transaction_id, newest.id,
    newest.transaction_id || ' ' || newest.request_id, mark.transaction_id || ' ' || mark.request_id, {_IS_GONE},
    {_PRUNED_EVENTS},
    (SELECT identity FROM database_identity), (SELECT history_id FROM database_identity)
FROM (
    SELECT snapshot, is_standby,
        (CASE WHEN is_standby THEN pg_snapshot_xmin(snapshot) ELSE pg_snapshot_xmax(snapshot) END)::text::bigint AS edge
    FROM (SELECT pg_current_snapshot() AS snapshot, pg_is_in_recovery() AS is_standby) AS asked
) AS now
LEFT JOIN LATERAL (
    SELECT found.* FROM (
        SELECT lag(high, 1, 0::bigint) OVER (ORDER BY high) AS low, high
        FROM (
            SELECT edge AS high
            UNION ALL SELECT pg_snapshot_xip(snapshot)::text::bigint WHERE NOT is_standby
        ) AS edges
    ) AS gap
    CROSS JOIN LATERAL (
        SELECT transaction_id, id, request_id FROM audit_events
        WHERE transaction_id > low AND transaction_id < high
            AND id > (SELECT coalesce(max(history_id), 0) FROM database_identity)
        ORDER BY transaction_id DESC LIMIT 1
    ) AS found
    ORDER BY found.transaction_id DESC LIMIT 1
) AS newest ON TRUE
LEFT JOIN audit_events AS mark ON mark.id = :p_mark
"""  # noqa: S608  names of our own


_STATE = Statement(
    lambda dialect: text(_POSTGRES_STATE if dialect == "postgresql" else _SQLITE_STATE).bindparams(
        bindparam("p_mark", type_=BigInteger())
    )
)
_PRUNED = Statement(
    text(f"SELECT {_PRUNED_EVENTS}, max(last_event_id), max(last_transaction_id), {_ARCHIVE} FROM audit_prunes")  # noqa: S608
)
_TRANSACTION = table.c.transaction_id
_HISTORY = bindparam("p_history", type_=BigInteger())


@lru_cache(maxsize=128)
def _statement(build: Callable[[str, Shape, int], Select[Any]], shape: Shape, count: int) -> Statement:
    return Statement(lambda dialect: build(dialect, shape, count))


def _first(statement: Select[Any], count: int, *order: ColumnElement[Any]) -> Select[Any]:
    return statement.order_by(*order).limit(literal_number(count))


def _added(dialect: str, shape: Shape, count: int) -> Select[Any]:
    """Select the rows with a larger id."""
    statement = select_events(dialect, shape).where(table.c.id > bindparam("p_id", type_=BigInteger()))
    return _first(statement, count, table.c.id)


def _history(dialect: str, shape: Shape, count: int) -> Select[Any]:
    """Select the rows in the snapshot `until`, by id; those from before the column or a restore count as in it."""
    statement = select_events(dialect, shape).add_columns(_TRANSACTION)
    seen = or_(_TRANSACTION.is_(None), table.c.id <= _HISTORY, _visible())
    statement = statement.where(table.c.id > bindparam("p_id", type_=BigInteger()), seen)
    return _first(statement, count, table.c.id)


def _new(dialect: str, shape: Shape, count: int) -> Select[Any]:
    """Select the rows in the snapshot `until` but not in `since`, by transaction and id: two scans of one index."""
    behind = tuple_(_TRANSACTION, table.c.id) > tuple_(
        bindparam("p_transaction", type_=BigInteger()), bindparam("p_id", type_=BigInteger())
    )
    later = and_(
        bindparam("p_open", type_=BigInteger()) <= _TRANSACTION, bindparam("p_end", type_=BigInteger()) > _TRANSACTION
    )
    in_progress = any_(bindparam("p_in_progress", type_=ARRAY(BigInteger())))
    # An expression, so that the planner goes by the index of the transactions.
    new = table.c.id + literal_column("0") > _HISTORY
    events = select_events(dialect, shape).add_columns(_TRANSACTION).where(behind, new, _visible())
    arms = [
        _first(events.where(unseen), count, _TRANSACTION, table.c.id) for unseen in (later, in_progress == _TRANSACTION)
    ]
    both = union_all(*(select(arm.subquery()) for arm in arms)).subquery()
    statement = select(*(both.c[name] for name in (*FIELDS, "transaction_id")))
    return _first(statement, count, both.c.transaction_id, both.c.id)


def _visible() -> ColumnElement[bool]:
    until = bindparam("p_snapshot", type_=Text())
    return func.pg_visible_in_snapshot(
        literal_column("audit_events.transaction_id::text::xid8"), until.op("::")(literal_column("pg_snapshot"))
    )


def _decoded(scope: bytes, cursor: str, dialect: str) -> _Place:
    # The fingerprint is not a signature, so a cursor may hold anything, and the database must not be asked for that.
    payload = decode(scope, cursor)
    try:
        place = _Place(**json.loads(payload))
        if not isinstance(place.database, str | None):
            raise TypeError
        numbers = [place.id, place.transaction or 0, place.pruned]
        if place.mark is not None:
            row_id, digest = place.mark
            place = replace(place, mark=(row_id, str(digest)))
            numbers.append(row_id)
        snapshots = [each for each in (place.since, place.until) if each is not None]
        for snapshot in snapshots:
            oldest, end, in_progress = _Snapshot.parse(snapshot)
            numbers += [oldest, end, *in_progress]
        if all(type(each) is int and 0 <= each < _LARGEST for each in numbers) and bool(snapshots) == (
            dialect == "postgresql"
        ):
            return place
    except (ValueError, TypeError, AttributeError):
        pass
    raise invalid_cursor()
