"""Holds: what they cover is decided when it matters, so that events that arrive later are covered, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    and_,
    bindparam,
    delete,
    exists,
    false,
    func,
    insert,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.visitors import replacement_traverse

from agent_gateway_store._text import code_text, is_blank
from agent_gateway_store.audit.doors import HOLD, RELEASE, write_door
from agent_gateway_store.audit.filters import criteria
from agent_gateway_store.audit.selects import conditions
from agent_gateway_store.encoding.sanitize import Scrubber, storable_key
from agent_gateway_store.errors import HoldNotFoundError, UnreadableRowError
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.columns import INVALID
from agent_gateway_store.models.retention import AuditHold, AuditPrune, Hold
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import is_refused, readable_rows
from agent_gateway_store.storage.filters import searched_text
from agent_gateway_store.storage.statements import Statement

_holds = AuditHold.__table__
_prunes = AuditPrune.__table__


def as_stored(filters: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """Return checked filters as JSON that means the same whenever it is read; periods count back from `now`."""
    checked = criteria(filters, org_id=None, now=now).values
    stored: dict[str, Any] = {}
    for name, given in filters.items():
        if given is not None:
            # A text is turned into a pattern each time.
            value = searched_text(name, given) if name == "text" else checked[f"p_{name}"]
            stored[name] = value.isoformat() if isinstance(value, datetime) else value
    return stored


def covers(dialect: str, filters: Mapping[str, Any]) -> ColumnElement[bool]:
    """Return the condition of the events that a hold with these filters covers; it is never NULL."""
    found = criteria(filters, org_id=None)

    def with_value(element: Any, **_options: Any) -> Any:
        if not isinstance(element, BindParameter) or element.key not in found.values:
            return None
        # Under a name of its own, as several holds stand in one statement.
        return bindparam(None, found.values[element.key], element.type, unique=True)

    matches = and_(true(), *conditions(dialect, found.shape))
    return func.coalesce(replacement_traverse(matches, {}, with_value), false())


_HOLDS = Statement(select(_holds).order_by(_holds.c.placed_at, _holds.c.name))


async def read_holds(connection: AsyncConnection, *, repairs: bool = False) -> list[Hold]:
    """Return the holds in force, oldest first.

    One that cannot be read may cover anything: UnreadableRowError; with `repairs` it comes without filters, and with a
    word about it for its reason.
    """
    found = []
    for row in await _HOLDS.rows(connection, {}):
        shown = repaired(row)
        hold = {name: shown[name] for name in ("name", "reason", "placed_at", "filters")}
        try:
            with readable_rows(f"Row {shown['name']} of {_holds.name}", "release this hold, and place it anew"):
                criteria(row["filters"], org_id=None)
        except UnreadableRowError as exc:
            if not repairs:
                raise
            hold |= {"filters": {}, "reason": f"{INVALID}: {exc}"}
        found.append(Hold(by=shown["placed_by"], **hold))
    return found


async def lock_holds(connection: AsyncConnection) -> list[Hold]:
    """Keep holds from being placed or released until this transaction ends, and return those in force.

    The lock of retention is in a connection of its own, which may end before what it protects; this one ends with it.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(text("LOCK TABLE audit_holds IN SHARE MODE"))
    return await read_holds(connection)


async def require_archive(connection: AsyncConnection, holds: Sequence[Hold]) -> None:
    """Raise ValueError where one of the holds may cover events of an archive, which only its folder can tell."""
    archived = exists().where(_prunes.c.archive.is_not(None), _prunes.c.events > 0)
    if holds and (await connection.execute(select(archived))).scalar():
        raise ValueError(
            "A hold may cover events of the archive, and the approvals that they name: give archive=FOLDER "
            "(`--archive FOLDER`)."
        )


def is_held(dialect: str, holds: Sequence[Hold]) -> ColumnElement[bool]:
    """Return the condition of the events that any hold covers; it is never NULL."""
    return or_(false(), *(covers(dialect, hold.filters) for hold in holds))


async def place(
    connection: AsyncConnection, name: str, filters: Mapping[str, Any], *, reason: str, by: str, environment: str
) -> Hold:
    """Place a hold and write the event that says so; ValueError if there is one of this name."""
    name, by, reason = storable_key(name), storable_key(by), Scrubber().text("reason", reason)
    # The database's, as of a prune: with this machine's clock ahead, events would be left out.
    now = (await connection.execute(select(db_now()))).scalar_one()
    hold = Hold(name=name, reason=reason, by=by, placed_at=now, filters=as_stored(filters, now))
    values = {"name": name, "reason": reason, "placed_by": by, "placed_at": now, "filters": hold.filters}
    try:
        await connection.execute(insert(_holds).values(values))
    except IntegrityError as exc:
        if is_refused(exc):
            raise
        text = f"There is a hold {code_text(name)} already: release it first, or choose another name."
        raise ValueError(text) from exc
    facts = {"name": name, "filters": hold.filters, "reason": reason}
    await write_door(connection, HOLD, facts, by=by, environment=environment, why="An operator placed a hold.")
    return hold


async def release(connection: AsyncConnection, name: str, *, by: str, environment: str) -> Hold:
    """Release a hold and write the event that says so; HoldNotFoundError if there is none of this name."""
    # As given: earlier versions stored it so.
    names = (name, storable_key(name))
    found = next((each for each in await read_holds(connection, repairs=True) if each.name in names), None)
    if found is None:
        raise HoldNotFoundError(name)
    await connection.execute(delete(_holds).where(_holds.c.name == found.name))
    facts = {"name": found.name, "filters": found.filters, "reason": found.reason}
    await write_door(connection, RELEASE, facts, by=by, environment=environment, why="An operator released a hold.")
    return found


def require_named(**texts: str) -> None:
    """Raise ValueError for a text that is blank: it is written to the record."""
    for name, value in texts.items():
        if is_blank(value):
            raise ValueError(f"{name} must not be blank: it is written to the log.")
