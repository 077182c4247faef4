"""What `doctor` says of a database that answers: whether it takes an event, its clock, ids, replica, size and modes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_gateway_store._text import escape
from agent_gateway_store.clock import utc_now

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from agent_gateway_store.cli.doctor import Report
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.storage.database import Database

# Chosen: NTP keeps machines within milliseconds, and deadlines of approvals are minutes.
_CLOCK_S = 5.0
# Chosen: what a person still takes for the present. A replica that lags for longer does not catch up by itself.
_LAG_S = 60.0
# A table below a megabyte is read within milliseconds, whatever the plan is.
_NEVER_ANALYSED = """
SELECT relname FROM pg_class
WHERE oid = ANY (ARRAY[to_regclass('audit_events'), to_regclass('audit_leaves'), to_regclass('approval_requests'),
        to_regclass('notification_deliveries')])
    AND pg_relation_size(oid) > 1048576
    AND has_table_privilege(oid, 'SELECT') -- pg_stats shows a role only what it may read
    AND NOT EXISTS (
        SELECT FROM pg_stats WHERE tablename = relname AND schemaname = relnamespace::regnamespace::name
    )
"""
_WITH_POLICIES = """
SELECT relname FROM pg_class
WHERE relrowsecurity AND oid = ANY (ARRAY[to_regclass('audit_events'), to_regclass('audit_leaves'),
        to_regclass('audit_tiles'), to_regclass('audit_checkpoints')])
"""
# Acknowledged rows of such tables are gone after a crash of the server, and its standbys do not have them.
_NOT_LOGGED = """
SELECT relname::text FROM pg_class
WHERE relpersistence <> 'p' AND oid = ANY (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS name)
ORDER BY relname
"""
_WRONG_TRANSACTION = """
SELECT transaction_id IS DISTINCT FROM pg_current_xact_id()::text::bigint FROM audit_events WHERE id = :id
"""
_TRANSACTION_DEFAULT = "ALTER TABLE audit_events ALTER transaction_id SET DEFAULT (pg_current_xact_id()::text::bigint)"
# A row that a snapshot shows was committed by a transaction that began before the end of the snapshot.
_FOREIGN_TRANSACTIONS = """
SELECT EXISTS (
    SELECT FROM audit_events WHERE transaction_id >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
        AND id > (SELECT coalesce(max(history_id), 0) FROM database_identity)
)
"""
# Chosen: a week evens out weekends.
_GROWTH_DAYS = 7
_POSTGRES_BYTES = "SELECT pg_total_relation_size('audit_events') + pg_total_relation_size('audit_leaves')"
_SQLITE_BYTES = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"


@asynccontextmanager
async def examined(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Give a connection to look at the database with; errors become ours."""
    from agent_gateway_store.storage.errors import translate_errors

    with translate_errors("be examined"):
        async with engine.connect() as connection:
            yield connection


@asynccontextmanager
async def bound(engine: AsyncEngine, *, owned: bool = False) -> AsyncIterator[Database]:
    """Give the engine as a database of this process and event loop; one that is `owned` is disposed of."""
    from agent_gateway_store.storage.database import Database

    database = Database(engine, owned=owned)
    database.bind_to_loop()
    try:
        yield database
    finally:
        await database.close()


async def check_server(report: Report, engine: AsyncEngine, settings: StoreSettings, org_id: str | None) -> None:
    """Note what somebody must act on; changes nothing. Events are tried for `org_id`, or for `default`."""
    facts = report.facts["database"]
    checks: list[Callable[[Report, dict[str, Any], AsyncEngine], Awaitable[None]]]
    checks = [_check_clock, _check_ids, partial(_check_insert, org_id=org_id or "default")]
    if engine.dialect.name == "postgresql":
        checks += [_check_statistics, _check_policies, _check_persistence, _check_transactions]
    for check in checks:
        async with report.noting_errors():
            await check(report, facts, engine)
    if settings.database_read_url:
        await _check_replica(report, engine, settings.database_read_url, facts["identity"])


async def _check_clock(report: Report, facts: dict[str, Any], engine: AsyncEngine) -> None:
    """Compare the clocks; half of what the answer took may be wrong."""
    from sqlalchemy import select

    from agent_gateway_store.storage.db_clock import db_now

    async with examined(engine) as connection:
        await connection.exec_driver_sql("SELECT 1")
        before = utc_now()
        there = (await connection.execute(select(db_now()))).scalar_one()
    took = utc_now() - before
    apart_s = facts["clock_difference_s"] = round((there - before - took / 2).total_seconds(), 3)
    if abs(apart_s) > _CLOCK_S:
        report.problem(
            f"The clocks of this machine and of the database are {abs(apart_s):g} seconds apart: set them by NTP. "
            "Events are stamped by the one, and deadlines of approvals are judged by the other."
        )


async def _check_ids(report: Report, facts: dict[str, Any], engine: AsyncEngine) -> None:
    from agent_gateway_store.storage.errors import IDS_IN_USE
    from agent_gateway_store.storage.sequences import tables_behind

    async with examined(engine) as connection:
        found = facts["ids_in_use"] = await tables_behind(connection)
    if found:
        report.problem(f"The database cannot number rows of {', '.join(found)}: {IDS_IN_USE}.")


async def _check_insert(report: Report, facts: dict[str, Any], engine: AsyncEngine, *, org_id: str) -> None:
    """Insert an event and roll it back: a trigger, a right or a constraint may refuse what the schema allows."""
    from sqlalchemy import text

    from agent_gateway_store.audit.doors import write_door
    from agent_gateway_store.evidence.sealer import may_not_write
    from agent_gateway_store.storage.errors import IDS_IN_USE, is_id_taken, is_outage, sqlstate_of

    facts["takes_events"] = False
    async with examined(engine) as connection:
        try:
            why = "Rolled back."
            row_id = await write_door(
                connection, "doctor", {}, by="doctor", environment="doctor", why=why, org_id=org_id
            )
            facts["takes_events"] = True
            if connection.dialect.name == "postgresql":
                is_wrong = (await connection.execute(text(_WRONG_TRANSACTION), {"id": row_id})).scalar()
                if is_wrong:
                    report.problem(
                        "New audit events do not get the id of their transaction, so that `audit tail`, `follow` and "
                        f"sinks miss them: find out who changed that, and run `{_TRANSACTION_DEFAULT}` as the owner of "
                        "the table."
                    )
        except Exception as exc:
            if may_not_write(exc) and is_outage(exc):
                # A role of an auditor, or a server that reads only, of which more is said elsewhere.
                report.warning("This role may not add audit events: run doctor as the gateway's role, too.")
            elif is_id_taken(exc):
                # Said already, unless this role may not look at the sequence.
                if "audit_events" not in facts.get("ids_in_use", ()):
                    report.problem(f"The database cannot number rows of audit_events: {IDS_IN_USE}.")
            elif is_outage(exc) and sqlstate_of(exc) is None:
                raise
            else:
                reason = escape(str(getattr(exc, "orig", None) or exc).splitlines()[0])
                report.problem(
                    f"The database refuses audit events ({reason}): find the trigger, constraint or policy on "
                    "audit_events that does so, and drop it. Until then events go to the quarantine of the spool. "
                    "If this role writes for one organisation only, run doctor with `--org`."
                )
        finally:
            await connection.rollback()


async def _names(engine: AsyncEngine, sql: str) -> list[str]:
    async with examined(engine) as connection:
        return sorted((await connection.exec_driver_sql(sql)).scalars())


async def _check_statistics(report: Report, facts: dict[str, Any], engine: AsyncEngine) -> None:
    found = facts["never_analysed"] = await _names(engine, _NEVER_ANALYSED)
    if found:
        report.problem(
            f"PostgreSQL has no statistics of {', '.join(found)}, as after a restore, and plans badly: run "
            "`ANALYZE` there, and see that autovacuum is on."
        )


async def _check_policies(report: Report, _facts: dict[str, Any], engine: AsyncEngine) -> None:
    if found := await _names(engine, _WITH_POLICIES):
        report.warning(
            f"Row-level security of {', '.join(found)} shows a role what its policies let it see: run "
            "`evidence verify` as a role to which none applies."
        )


async def _check_transactions(report: Report, facts: dict[str, Any], engine: AsyncEngine) -> None:
    """Find events with transaction ids that this PostgreSQL server has not given out: those of a restored dump."""
    async with examined(engine) as connection:
        is_foreign = facts["foreign_transactions"] = (await connection.exec_driver_sql(_FOREIGN_TRANSACTIONS)).scalar()
    if is_foreign:
        report.problem(
            "Audit events hold transaction ids of another server, as after restoring a dump, so that `audit tail`, "
            "`follow` and `changes` would miss events: run `gateway-store db restored --by NAME` once as the owner of "
            "the tables, and begin with new cursors."
        )


async def _check_persistence(report: Report, facts: dict[str, Any], engine: AsyncEngine) -> None:
    from sqlalchemy import text

    from agent_gateway_store.models.tables import metadata

    async with examined(engine) as connection:
        found = (await connection.execute(text(_NOT_LOGGED), {"names": [*metadata.tables]})).scalars().all()
    facts["unlogged_tables"] = [*found]
    for name in found:
        report.problem(
            f"The table {name} is UNLOGGED: a crash of the server empties it, and standbys do not have it. Run `ALTER "
            f"TABLE {name} SET LOGGED` as its owner."
        )


async def _check_replica(report: Report, engine: AsyncEngine, url: str, identity: str) -> None:
    from agent_gateway_store.settings import mask_url
    from agent_gateway_store.storage.database import Database, create_engine
    from agent_gateway_store.storage.identity import IS_APART, read_identity

    facts = report.facts["replica"] = {"url": mask_url(url), "reachable": False}
    async with report.noting_errors():
        async with bound(create_engine(url, reads=True), owned=True) as database:
            found = await read_identity(database.engine, reads=True)
            age_s = await database.replica_age_s()
            facts |= {"reachable": True, "is_standby": age_s is not None, "age_s": age_s}
            both = Database(engine, owned=False, replica=database)
            both.bind_to_loop()
            is_apart = found == identity and await both.is_replica_apart()
        if found != identity:
            report.problem("DATABASE_READ_URL leads to another database: name a replica of this one.")
        elif is_apart:
            report.problem(IS_APART)
        elif age_s is not None and age_s > _LAG_S:
            report.problem(
                f"The replica of DATABASE_READ_URL is {age_s:.0f} seconds behind: look at pg_stat_replication on the "
                "primary, and at long reads on the replica."
            )


async def retention_facts(engine: AsyncEngine, file: Path | None) -> dict[str, Any]:
    """Return how much is there, how it grows, what is held, and how the last prune ended.

    Args:
        file: Of a SQLite database, whose disk can be seen from here.
    """
    from sqlalchemy import func, select

    from agent_gateway_store.audit.selects import table

    since = utc_now() - timedelta(days=_GROWTH_DAYS)
    async with examined(engine) as connection:
        counted = select(func.min(table.c.timestamp), func.count(), func.count().filter(table.c.timestamp >= since))
        oldest, rows, recent = (await connection.execute(counted)).one()
        sql = _POSTGRES_BYTES if engine.dialect.name == "postgresql" else _SQLITE_BYTES
        size = int((await connection.exec_driver_sql(sql)).scalar() or 0)
        free = await _free_bytes(connection, file)
        holds, held = await _held(connection)
        last = await _last_prune(connection)
    # A younger log has grown for as long as it is there; at least an hour, so that a first burst is no trend.
    start = max(oldest, since) if oldest else since
    days = max((utc_now() - start) / timedelta(days=1), 1 / 24)
    growth = round(size / rows * recent / days) if rows and recent else 0
    return {
        "oldest_event": oldest,
        "events": rows,
        "bytes": size,
        "bytes_per_day": growth,
        "disk_free_bytes": free,
        "days_until_full": None if free is None or not growth else free // growth,
        "holds": holds,
        "held_events": held,
        "last_prune": last,
    }


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


def shown(url: str) -> str:
    """Return the URL of a spooled row as people write it: where it has no port, a colon stands in it all the same."""
    scheme, _, rest = url.partition("://")
    server, _, name = rest.partition("/")
    return f"{scheme}://{server.removesuffix(':')}/{name}"


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

    prunes = AuditPrune.__table__
    found = (await connection.execute(select(prunes).order_by(prunes.c.id.desc()).limit(1))).mappings().first()
    if found is None:
        return None
    when = (found["ended_at"] or found["started_at"]).isoformat(timespec="seconds")
    result = found["result"] or "not ended: it is at work, or was killed"
    return f"{when}, by {found['pruned_by']}, {found['events']:,} events: {result}"


def check_modes(report: Report, *paths: Path) -> None:
    """Warn of files and folders that other users of the machine can open."""
    from agent_gateway_store.storage.files import open_to_others

    for path in paths:
        if mode := open_to_others(path):
            wanted = "700" if path.is_dir() else "600"
            report.warning(f"{path} is open to other users of this machine (mode {mode}): run `chmod {wanted} {path}`.")
