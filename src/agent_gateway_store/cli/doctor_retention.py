"""What `doctor` says of retention: how much is there, how it grows, what is held, and how the last prune ended."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

# Chosen: a week evens out weekends.
_GROWTH_DAYS = 7
_POSTGRES_BYTES = "SELECT pg_total_relation_size('audit_events') + pg_total_relation_size('audit_leaves')"
_SQLITE_BYTES = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"


async def retention_facts(engine: AsyncEngine, file: Path | None) -> dict[str, Any]:
    """Return the facts; `file` is that of a SQLite database, whose disk can be seen from here."""
    from sqlalchemy import func, select

    from agent_gateway_store.audit.selects import table
    from agent_gateway_store.clock import utc_now
    from agent_gateway_store.storage.errors import translate_errors

    since = utc_now() - timedelta(days=_GROWTH_DAYS)
    with translate_errors("be examined"):
        async with engine.connect() as connection:
            counted = select(func.min(table.c.timestamp), func.count(), func.count().filter(table.c.timestamp >= since))
            oldest, rows, recent = (await connection.execute(counted)).one()
            sql = _POSTGRES_BYTES if engine.dialect.name == "postgresql" else _SQLITE_BYTES
            size = int((await connection.exec_driver_sql(sql)).scalar() or 0)
            free = await _free_bytes(connection, file)
            held = await _held(connection)
            last = await _last_prune(connection)
    days = _span_days(oldest, since)
    growth = round(size / rows * recent / days) if rows and recent else 0
    return {
        "oldest_event": oldest,
        "events": rows,
        "bytes": size,
        "bytes_per_day": growth,
        "disk_free_bytes": free,
        "days_until_full": None if free is None or not growth else free // growth,
        "holds": held[0],
        "held_events": held[1],
        "last_prune": last,
    }


def _span_days(oldest: datetime | None, since: datetime) -> float:
    from agent_gateway_store.clock import utc_now

    # A younger log has grown for as long as it is there; at least an hour, so that a first burst is no trend.
    start = max(oldest, since) if oldest else since
    return max((utc_now() - start) / timedelta(days=1), 1 / 24)


async def _free_bytes(connection: AsyncConnection, file: Path | None) -> int | None:
    """Return the free bytes of the disk; None where a server's folder cannot be seen from here."""
    if file is None:
        if connection.dialect.name != "postgresql":
            return None
        folder = "SELECT setting FROM pg_settings WHERE name = 'data_directory'"
        host = "SELECT inet_server_addr() IS NULL OR inet_server_addr() = inet_client_addr()"
        if not (await connection.exec_driver_sql(host)).scalar():
            return None
        # Only roles of pg_read_all_settings see it.
        file = Path((await connection.exec_driver_sql(folder)).scalar() or "")
        if not file.name:
            return None
    return free_bytes(file)


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk that holds `path`, or is to hold it; None if that cannot be seen."""
    try:
        return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free
    except OSError:
        return None


async def _held(connection: AsyncConnection) -> tuple[list[str], int]:
    from sqlalchemy import func, select

    from agent_gateway_store.audit.selects import table
    from agent_gateway_store.retention.holds import is_held, read_holds

    if not (holds := await read_holds(connection)):
        return [], 0
    counted = select(func.count()).select_from(table).where(is_held(connection.dialect.name, holds))
    return [hold.name for hold in holds], (await connection.execute(counted)).scalar_one()


async def _last_prune(connection: AsyncConnection) -> str | None:
    from sqlalchemy import select

    from agent_gateway_store.models.retention import AuditPrune

    prunes = AuditPrune.__table__  # type: ignore[attr-defined]
    found = (await connection.execute(select(prunes).order_by(prunes.c.id.desc()).limit(1))).mappings().first()
    if found is None:
        return None
    when = (found["ended_at"] or found["started_at"]).isoformat(timespec="seconds")
    result = found["result"] or "not ended: it is at work, or was killed"
    return f"{when}, by {found['pruned_by']}, {found['events']:,} events: {result}"
