"""`gateway-store doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from agent_gateway_store.cli import plugins
from agent_gateway_store.cli.context import options_of, run, settings_of, sqlite_file
from agent_gateway_store.cli.db import engine_for, explain_state, schema_state
from agent_gateway_store.cli.errors import ExitCode, explain
from agent_gateway_store.cli.output import JsonOption, complain, print_fields, print_json

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from agent_gateway_store.settings import StoreSettings

__all__ = ["doctor"]

_MAX_USED = 1000
_SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
# What a snapshot shows was committed by transactions that began before its end.
_FOREIGN_TRANSACTIONS = """
SELECT EXISTS (
    SELECT FROM audit_events WHERE transaction_id >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
)
"""


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: By subject, JSON values.
        warnings: What should be looked at.
        problems: What does not work.
        code: How the process ends.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    code: ExitCode = ExitCode.OK

    def warning(self, text: str) -> None:
        """Note what works, but not as it should."""
        self.warnings.append(text)

    def problem(self, text: str, code: ExitCode) -> None:
        """Note what does not work; a dependency that is down outweighs the rest."""
        self.problems.append(text)
        self.code = max(self.code, code)

    @property
    def schema_is_current(self) -> bool:
        """True if the database can be used."""
        return bool(self.facts.get("schema", {}).get("state") == "current")

    def flat(self) -> Iterator[tuple[str, Any]]:
        """Yield the facts as names and values for people."""
        for subject, fact in self.facts.items():
            if not isinstance(fact, dict):
                yield subject, fact
                continue
            for name, value in fact.items():
                yield f"{subject} {name.replace('_', ' ')}", "none" if value in (None, []) else value


def doctor(ctx: typer.Context, json: JsonOption = False) -> None:
    """Check the package, the database, Redis and the plugins; changes nothing.

    Exit code 5: the database or Redis is down; 1: something else is wrong; 0: all is well, or there are warnings only.
    """
    settings = settings_of(ctx)
    report = run(_examine(ctx, settings))
    if json:
        print_json({**report.facts, "problems": report.problems, "warnings": report.warnings})
    else:
        print_fields(report.flat())
        for text in report.warnings:
            complain(f"Warning: {text}")
        for text in report.problems:
            complain(f"Problem: {text}")
    if report.code is not ExitCode.OK:
        raise typer.Exit(report.code)


async def _examine(ctx: typer.Context, settings: StoreSettings) -> Report:
    from importlib.metadata import version

    report = Report()
    report.facts["version"] = version("agent-gateway-store")
    await _check_database(report, settings.database_url)
    await _check_redis(report, settings)
    _check_plugins(report, settings)
    if report.schema_is_current:
        try:
            await _check_transactions(report, settings.database_url)
            await _check_approvals(report, ctx, settings)
            await _check_notifications(report, ctx, settings)
        except Exception as exc:
            report.problem(*explain(exc))
    try:
        await _check_spool(report, settings)
    except Exception as exc:
        report.problem(*explain(exc))
    return report


async def _check_database(report: Report, url: str) -> None:
    """Reach the database, read its schema and the settings that decide about durability."""
    from agent_gateway_store.settings import mask_url

    facts: dict[str, Any] = {"url": mask_url(url), "kind": None, "reachable": False}
    report.facts["database"] = facts
    try:
        async with engine_for(url) as engine:
            facts["kind"] = engine.dialect.name
            state = await schema_state(url)
            if (file := sqlite_file(url)) is not None:
                facts["file"] = str(file.absolute())
                if not file.exists():
                    report.facts["schema"] = state
                    report.warning("The database file does not exist: the first use makes it.")
                    return
            await _read_facts(report, facts, engine.connect())
            facts["reachable"] = True
            report.facts["schema"] = state
            if state["state"] != "current":
                report.problem(explain_state(state), ExitCode.ERROR)
                return
            await _compare(report, engine)
    except Exception as exc:
        report.problem(*explain(exc))


async def _compare(report: Report, engine: AsyncEngine) -> None:
    from agent_gateway_store.storage import migrate

    differences = await migrate.differences(engine)
    report.facts["schema"]["differences"] = differences
    if differences:
        report.problem("The schema differs from the models: see `gateway-store db check`.", ExitCode.ERROR)


async def _read_facts(report: Report, facts: dict[str, Any], connecting: Any) -> None:
    from agent_gateway_store.storage.errors import translate_errors

    with translate_errors("be examined"):
        async with connecting as connection:
            if facts["kind"] == "sqlite":
                facts["journal_mode"] = await _scalar(connection, "PRAGMA journal_mode")
                facts["synchronous"] = _SYNCHRONOUS[await _scalar(connection, "PRAGMA synchronous")]
                return
            facts["server_version"] = await _scalar(connection, "SHOW server_version")
            facts["synchronous_commit"] = await _scalar(connection, "SHOW synchronous_commit")
    if facts["synchronous_commit"] == "off":
        report.warning("synchronous_commit is off: a crash of the server may lose what it acknowledged; set it to on.")


async def _check_transactions(report: Report, url: str) -> None:
    """Look for events with transaction ids that this PostgreSQL server has not given out: those of a restored dump."""
    from agent_gateway_store.storage.errors import translate_errors

    async with engine_for(url) as engine:
        if engine.dialect.name != "postgresql":
            return
        with translate_errors("be examined"):
            async with engine.connect() as connection:
                is_foreign = await _scalar(connection, _FOREIGN_TRANSACTIONS)
    report.facts["database"]["foreign_transactions"] = is_foreign
    if is_foreign:
        report.problem(
            "Audit events hold transaction ids of another server, as after restoring a dump, so that `audit tail`, "
            "`follow` and `changes` would miss events: while nothing writes, run `UPDATE audit_events SET "
            "transaction_id = NULL` once as the owner of the table, and begin with new cursors.",
            ExitCode.ERROR,
        )


async def _scalar(connection: AsyncConnection, statement: str) -> Any:
    from sqlalchemy import text

    return (await connection.execute(text(statement))).scalar()


async def _check_redis(report: Report, settings: StoreSettings) -> None:
    """Ask Redis for a key that nobody writes."""
    from agent_gateway_store.settings import mask_url
    from agent_gateway_store.storage.cache import create_redis
    from agent_gateway_store.storage.redis_cache import RedisCache

    if not settings.redis_url:
        report.facts["redis"] = {"state": "off"}
        return
    facts = report.facts["redis"] = {"url": mask_url(settings.redis_url), "state": "down"}
    try:
        client = create_redis(settings.redis_url, timeout_s=settings.redis_timeout_seconds)
    except Exception as exc:
        report.problem(*explain(exc))
        return
    try:
        redis = RedisCache(client, timeout_s=settings.redis_timeout_seconds)
        await redis.get("agent-gateway-store:doctor")
        if redis.is_available:
            facts["state"] = "reachable"
        else:
            report.problem(
                "Redis does not answer: check that it runs and that REDIS_URL is right; the store works without it.",
                ExitCode.UNAVAILABLE,
            )
    finally:
        await client.aclose()


async def _check_spool(report: Report, settings: StoreSettings) -> None:
    from agent_gateway_store.audit.spool import Spool
    from agent_gateway_store.storage.urls import parse_database_url

    facts: dict[str, Any] = {"mode": settings.audit_mode, "spool_path": str(settings.audit_spool_path)}
    report.facts["audit"] = facts
    spool = Spool(settings.audit_spool_path, parse_database_url(settings.database_url)[0])
    try:
        waiting, quarantined = await spool.counts()
    finally:
        await spool.close()
    facts |= {"spool_waiting": waiting, "spool_quarantined": quarantined}
    if waiting:
        report.warning(f"{waiting} events wait in the spool: an open store brings them in while the database answers.")
    if quarantined:
        report.warning(f"{quarantined} events were refused by the database and are kept in the spool's quarantine.")


def _check_plugins(report: Report, settings: StoreSettings) -> None:
    records = plugins.plugin_records(settings)
    report.facts["plugins"] = {record["name"]: record["state"] for record in records}
    for record in records:
        if record["state"] == "broken":
            report.problem(f"Plugin {record['name']} is broken: {record['error']}.", ExitCode.ERROR)


async def _check_approvals(report: Report, ctx: typer.Context, settings: StoreSettings) -> None:
    from agent_gateway_store.approval import ApprovalBackend, ApprovalManager
    from agent_gateway_store.storage.database import Database
    from agent_gateway_store.storage.redis_cache import RedisCache

    # Not through an open store, which would bring spooled events in: this command changes nothing.
    async with engine_for(settings.database_url) as engine:
        database = Database(engine, owned=False)
        database.bind_to_loop()
        approvals = ApprovalManager(ApprovalBackend(database, RedisCache(None), settings), org_id=options_of(ctx).org)
        used = await approvals.list_requests("USED", limit=_MAX_USED)
    unknown = sum(request.outcome is None for request in used)
    report.facts["approvals"] = {"used_without_outcome": unknown, "used_examined": len(used)}
    if unknown:
        report.warning(
            f"{unknown} of the newest {len(used)} used approvals have no outcome: find out what became of their calls."
        )


async def _check_notifications(report: Report, ctx: typer.Context, settings: StoreSettings) -> None:
    from agent_gateway_store.delivery import NotificationManager, StoreOutbox
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.storage.database import Database

    loaded = Plugins().notifiers(settings)
    async with engine_for(settings.database_url) as engine:
        database = Database(engine, owned=False)
        database.bind_to_loop()
        outbox = StoreOutbox(database, settings)
        counts = await NotificationManager(database, outbox, org_id=options_of(ctx).org).counts()
    away = {row["notifier"]: row["waiting"] for row in counts if row["waiting"] and row["notifier"] not in loaded}
    dead = sum(row["dead"] for row in counts)
    report.facts["notifications"] = {
        "waiting": sum(row["waiting"] for row in counts),
        "due": sum(row["due"] for row in counts),
        "dead": dead,
        "not_loaded_here": sorted(away),
    }
    if dead:
        report.warning(f"{dead} notices were given up: see `gateway-store notifications list --status DEAD`.")
    for name, waiting in sorted(away.items()):
        report.warning(
            f"{waiting} notices wait for the notifier {name}, which is not loaded here: run a worker that has it."
        )
