"""What `doctor` says of the database: whether it can be used, and with the right schema what its tables hold."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store._text import escape, word
from agent_gateway_store.audit.doors import write_door
from agent_gateway_store.audit.selects import table
from agent_gateway_store.cli.context import sqlite_file
from agent_gateway_store.cli.db import engine_for, schema_state
from agent_gateway_store.cli.errors import ExitCode
from agent_gateway_store.clock import utc_now
from agent_gateway_store.evidence.sealer import may_not_write
from agent_gateway_store.models.retention import AuditPrune
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.retention.holds import is_held, read_holds
from agent_gateway_store.settings import StoreSettings, mask_url
from agent_gateway_store.storage import append_only, migrate
from agent_gateway_store.storage.database import NO_WRITES, Database, create_engine
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import IDS_IN_USE, is_id_taken, is_outage, sqlstate_of, translate_errors
from agent_gateway_store.storage.files import open_to_others
from agent_gateway_store.storage.identity import IS_APART, read_identity
from agent_gateway_store.storage.sequences import tables_behind
from agent_gateway_store.storage.urls import real_sqlite_file

if TYPE_CHECKING:
    from agent_gateway_store.cli.doctor import Report

# Chosen: long enough to order a disk.
_DAYS_TO_ACT = 30
# Chosen: a weekend.
_DAYS_TOO_LATE = 3
# Chosen: a week evens out weekends.
_GROWTH_DAYS = 7
# Chosen: NTP keeps machines within milliseconds, and deadlines of approvals are minutes.
_CLOCK_S = 5.0
# Chosen: what a person still takes for the present. A replica that lags for longer does not catch up by itself.
_LAG_S = 60.0
# In the order of the numbers that `PRAGMA synchronous` returns (https://www.sqlite.org/pragma.html#pragma_synchronous).
_SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
# What the role or the server says: our own connections set it to on.
_SYNCHRONOUS_COMMIT = "SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'"
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
SELECT relname FROM pg_class
WHERE relpersistence <> 'p' AND oid = ANY (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS name)
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
_LOG = """
SELECT (SELECT count(*) FROM audit_leaves) AS sealed, (SELECT max(size) FROM audit_checkpoints) AS last_checkpoint, (
    SELECT count(*) FROM audit_events AS event
    WHERE NOT EXISTS (SELECT 1 FROM audit_leaves AS leaf WHERE leaf.event_id = event.id)
) AS unsealed
"""
# A superuser is a member of every role.
_OWNS_TABLES = """
SELECT bool_or(pg_has_role(relowner, 'MEMBER')) FROM pg_class
WHERE oid IN (to_regclass('audit_events'), to_regclass('audit_leaves'), to_regclass('audit_checkpoints'))
"""
_POSTGRES_BYTES = "SELECT pg_total_relation_size('audit_events') + pg_total_relation_size('audit_leaves')"
_SQLITE_BYTES = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
# Of a server on this machine. Only roles of pg_read_all_settings see the folder.
_POSTGRES_FOLDER = """
SELECT setting FROM pg_settings WHERE name = 'data_directory'
    AND (inet_server_addr() IS NULL OR inet_server_addr() = inet_client_addr())
"""


@asynccontextmanager
async def _examined(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Give a connection to look at the database with; errors become ours."""
    with translate_errors("be examined"):
        async with engine.connect() as connection:
            yield connection


@asynccontextmanager
async def bound(
    engine: AsyncEngine, *, owned: bool = False, replica: Database | None = None
) -> AsyncIterator[Database]:
    """Give the engine as a database of this process and event loop; one that is `owned` is disposed of."""
    database = Database(engine, owned=owned, replica=replica)
    database.bind_to_loop()
    try:
        yield database
    finally:
        await database.close()


async def _scalar(connection: AsyncConnection, sql: str, **values: Any) -> Any:
    return (await connection.execute(text(sql), values)).scalar()


async def _names(connection: AsyncConnection, sql: str, **values: Any) -> list[str]:
    return sorted((await connection.execute(text(sql), values)).scalars())


async def check_database(report: Report, url: str) -> None:
    """Connect to the database, read its schema and the settings that decide about durability."""
    facts: dict[str, Any] = {"url": mask_url(url), "kind": None, "reachable": False}
    report.facts["database"] = facts
    async with engine_for(url) as engine:
        facts["kind"] = engine.dialect.name
        state = await schema_state(url)
        if (file := sqlite_file(url)) is not None:
            facts["file"] = str(file.absolute())
            real = real_sqlite_file(engine.url) or file
            check_modes(report, file, real.with_name(f"{real.name}.lock"))
            if not file.exists():
                report.facts["schema"] = state
                report.warning("The database file does not exist: the first use creates it.")
                if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
                    said = f"{file.absolute().parent} cannot be written: choose another folder, or let this user write."
                    report.problem(said, ExitCode.UNAVAILABLE)
                return
        async with _examined(engine) as connection:
            await _check_settings(report, facts, connection)
        facts["reachable"] = True
        async with report.noting_errors():
            await migrate.check_server(engine)
        report.facts["schema"] = state
        if state["state"] != "current":
            report.problem(str(migrate.out_of_date(state["current"])))
            return
        state["differences"] = await migrate.differences(engine)
        if state["differences"]:
            report.problem("The schema differs from the models: see `gateway-store db check`.")


async def _check_settings(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    if facts["kind"] == "sqlite":
        facts["journal_mode"] = await _scalar(connection, "PRAGMA journal_mode")
        facts["synchronous"] = _SYNCHRONOUS[await _scalar(connection, "PRAGMA synchronous")]
        return
    facts["server_version"] = await _scalar(connection, "SHOW server_version")
    facts["encoding"] = await _scalar(connection, "SHOW server_encoding")
    facts["synchronous_commit"] = await _scalar(connection, _SYNCHRONOUS_COMMIT)
    if facts["synchronous_commit"] == "off":
        report.warning(
            "synchronous_commit is off by default: through PgBouncer, or with an engine that is handed in, a crash of "
            "the server may lose what it acknowledged; set it to on for the gateway's role."
        )
    if await _scalar(connection, "SHOW transaction_read_only") == "on":
        report.problem(f"{NO_WRITES} Until then events wait in the spool.", ExitCode.UNAVAILABLE)


async def check_contents(report: Report, engine: AsyncEngine, settings: StoreSettings, org: str | None) -> None:
    """Note what somebody must act on; changes nothing. Events are tried for `org`, or for `default`."""
    facts = report.facts["database"]
    facts["identity"] = await read_identity(engine)
    checks: list[Callable[..., Awaitable[None]]]
    checks = [_check_clock, _check_ids, partial(_check_insert, org_id=org or "default")]
    if facts["kind"] == "postgresql":
        checks += [_check_statistics, _check_policies, _check_persistence, _check_transactions]
    for check in checks:
        async with report.noting_errors(), _examined(engine) as connection:
            await check(report, facts, connection)
    if settings.database_read_url:
        await _check_replica(report, engine, settings.database_read_url, facts["identity"])
    async with _examined(engine) as connection:
        await _check_log(report, connection)
        await _check_retention(report, connection, sqlite_file(settings.database_url))


async def _check_clock(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    """Compare the clocks; half of what the answer took may be wrong."""
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


async def _check_ids(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    found = facts["ids_in_use"] = await tables_behind(connection)
    if found:
        report.problem(f"The database cannot number rows of {', '.join(found)}: {IDS_IN_USE}.")


async def _check_insert(report: Report, facts: dict[str, Any], connection: AsyncConnection, *, org_id: str) -> None:
    """Insert an event and roll it back: a trigger, a right or a constraint may refuse what the schema allows."""
    facts["takes_events"] = False
    try:
        row_id = await write_door(
            connection, "doctor", {}, by="doctor", environment="doctor", why="Rolled back.", org_id=org_id
        )
        facts["takes_events"] = True
        if facts["kind"] == "postgresql" and await _scalar(connection, _WRONG_TRANSACTION, id=row_id):
            report.problem(
                "New audit events do not get the id of their transaction, so that `audit tail`, `follow` and sinks "
                f"miss them: find out who changed that, and run `{_TRANSACTION_DEFAULT}` as the owner of the table."
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


async def _check_statistics(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    found = facts["never_analysed"] = await _names(connection, _NEVER_ANALYSED)
    if found:
        report.problem(
            f"PostgreSQL has no statistics of {', '.join(found)}, as after a restore, and plans badly: run "
            "`ANALYZE` there, and see that autovacuum is on."
        )


async def _check_policies(report: Report, _facts: dict[str, Any], connection: AsyncConnection) -> None:
    if found := await _names(connection, _WITH_POLICIES):
        report.warning(
            f"Row-level security of {', '.join(found)} shows a role what its policies let it see: run "
            "`evidence verify` as a role to which none applies."
        )


async def _check_persistence(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    facts["unlogged_tables"] = await _names(connection, _NOT_LOGGED, names=[*metadata.tables])
    for name in facts["unlogged_tables"]:
        report.problem(
            f"The table {name} is UNLOGGED: a crash of the server empties it, and standbys do not have it. Run `ALTER "
            f"TABLE {name} SET LOGGED` as its owner."
        )


async def _check_transactions(report: Report, facts: dict[str, Any], connection: AsyncConnection) -> None:
    """Find events with transaction ids that this PostgreSQL server has not given out: those of a restored dump."""
    facts["foreign_transactions"] = await _scalar(connection, _FOREIGN_TRANSACTIONS)
    if facts["foreign_transactions"]:
        report.problem(
            "Audit events hold transaction ids of another server, as after restoring a dump, so that `audit tail`, "
            "`follow` and `changes` would miss events: run `gateway-store db restored --by NAME` once as the owner of "
            "the tables, and begin with new cursors."
        )


async def _check_replica(report: Report, engine: AsyncEngine, url: str, identity: str) -> None:
    facts = report.facts["replica"] = {"url": mask_url(url), "reachable": False}
    async with report.noting_errors():
        async with bound(create_engine(url, reads=True), owned=True) as database:
            found = await read_identity(database.engine, reads=True)
            age_s = await database.replica_age_s()
            facts |= {"reachable": True, "is_standby": age_s is not None, "age_s": age_s}
            async with bound(engine, replica=database) as both:
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


async def _check_log(report: Report, connection: AsyncConnection) -> None:
    """Find triggers that do not protect the log, a role that could switch them off, and what is not sealed."""
    missing = await append_only.unprotected(connection)
    others = await append_only.foreign_triggers(connection)
    is_open = await append_only.is_door_open(connection)
    off = await append_only.where_triggers_are_off(connection)
    log = (await connection.execute(text(_LOG))).mappings().one()
    report.facts["log"] = {**log, "triggers_missing": [*missing]}
    for name, statement in missing.items():
        report.problem(
            f"The trigger {name} is missing, switched off or not as it was made, so that rows of the audit log can be "
            f"changed: find out who did that, verify the log, and run `{statement}` as the owner of the tables."
        )
    for statement in off:
        report.problem(
            "session_replication_role is replica, so that no trigger refuses changes of the audit log: find out who "
            f"did that, verify the log, and run `{statement}` as a superuser."
        )
    if is_open:
        report.problem(
            "The table audit_door has a row, so that rows of the audit log can be changed: find out who left it, "
            "verify the log, and run `DELETE FROM audit_door` as the owner of the tables."
        )
    if others:
        report.warning(
            f"Triggers or rules on the tables of the audit log are not the store's ({', '.join(map(word, others))}): "
            "they can change or drop what is written; find out whose they are."
        )
    if connection.dialect.name == "postgresql" and await _scalar(connection, _OWNS_TABLES):
        report.warning(
            "This role owns the tables it writes, so that it can switch off the triggers of the audit log: let another "
            "role own them (see `A role that can only add to the audit log` in the documentation)."
        )


async def _check_retention(report: Report, connection: AsyncConnection, file: Path | None) -> None:
    """Say how the log grows, what is held, and how the last prune ended; warn before the disk is full.

    Args:
        file: Of a SQLite database, whose disk can be seen from here.
    """
    is_postgres = connection.dialect.name == "postgresql"
    since = utc_now() - timedelta(days=_GROWTH_DAYS)
    totals = select(func.min(table.c.timestamp), func.count(), func.count().filter(table.c.timestamp >= since))
    oldest, rows, recent = (await connection.execute(totals)).one()
    size = int(await _scalar(connection, _POSTGRES_BYTES if is_postgres else _SQLITE_BYTES) or 0)
    if is_postgres and (folder := await _scalar(connection, _POSTGRES_FOLDER)):
        file = Path(folder)
    free = None if file is None else free_bytes(file)
    held = 0
    if holds := await read_holds(connection):
        counted = select(func.count()).select_from(table).where(is_held(connection.dialect.name, holds))
        held = (await connection.execute(counted)).scalar_one()
    # A younger log has grown for as long as it is there; at least an hour: a first burst is not a trend.
    start = max(oldest, since) if oldest else since
    days = max((utc_now() - start) / timedelta(days=1), 1 / 24)
    growth = round(size / rows * recent / days) if rows and recent else 0
    left = None if free is None or not growth else free // growth
    last_prune = await _last_prune(connection)
    report.facts["retention"] = {
        "oldest_event": oldest,
        "events": rows,
        "bytes": size,
        "bytes_per_day": growth,
        "disk_free_bytes": free,
        "days_until_full": left,
        "holds": [hold.name for hold in holds],
        "held_events": held,
        "last_prune": last_prune,
    }
    if left is not None and left < _DAYS_TO_ACT:
        advice = "run `gateway-store retention prune`, or give it more room."
        note = report.problem if left < _DAYS_TOO_LATE else report.warning
        note(f"The disk of the database is full in {left} days at this rate: {advice}")
    if last_prune is not None and "failed" in last_prune:
        report.warning(f"The last prune failed ({last_prune}): run it again by hand and see why.")


async def _last_prune(connection: AsyncConnection) -> str | None:
    prunes = AuditPrune.__table__
    found = (await connection.execute(select(prunes).order_by(prunes.c.id.desc()).limit(1))).mappings().first()
    if found is None:
        return None
    when = (found["ended_at"] or found["started_at"]).isoformat(timespec="seconds")
    result = found["result"] or "not ended: it is at work, or was killed"
    return f"{when}, by {found['pruned_by']}, {found['events']:,} events: {result}"


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk that holds `path`, or is to hold it; None if that cannot be seen."""
    try:
        return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free
    except OSError:
        return None


def check_modes(report: Report, *paths: Path) -> None:
    """Warn of files and folders that other users of the machine can open."""
    for path in paths:
        if mode := open_to_others(path):
            wanted = "700" if path.is_dir() else "600"
            report.warning(f"{path} is open to other users of this machine (mode {mode}): run `chmod {wanted} {path}`.")
