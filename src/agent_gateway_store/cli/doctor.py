"""`gateway-store doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from agent_gateway_store.cli.context import options_of, run, settings_of
from agent_gateway_store.cli.db import engine_for
from agent_gateway_store.cli.errors import ExitCode, explain
from agent_gateway_store.cli.health import Report, check_database, check_redis, check_transactions
from agent_gateway_store.cli.output import JsonOption, complain, print_fields, print_json

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = ["doctor"]

_MAX_USED = 1000


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
    await check_database(report, settings.database_url)
    await check_redis(report, settings)
    _check_plugins(report, settings)
    if report.schema_is_current:
        try:
            await check_transactions(report, settings.database_url)
            await _check_approvals(report, ctx, settings)
            await _check_notifications(report, ctx, settings)
        except Exception as exc:
            report.problem(*explain(exc))
    try:
        await _check_spool(report, settings)
    except Exception as exc:
        report.problem(*explain(exc))
    return report


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
    from agent_gateway_store.cli.plugins import plugin_records

    records = plugin_records(settings)
    report.facts["plugins"] = {record["name"]: record["state"] for record in records}
    for record in records:
        if record["state"] == "broken":
            report.problem(f"Plugin {record['name']} is broken: {record['error']}.", ExitCode.ERROR)


async def _check_approvals(report: Report, ctx: typer.Context, settings: StoreSettings) -> None:
    from agent_gateway_store.approval import ApprovalManager
    from agent_gateway_store.storage.database import Database
    from agent_gateway_store.storage.redis_cache import RedisCache

    # Not through an open store, which would bring spooled events in: this command changes nothing.
    async with engine_for(settings.database_url) as engine:
        database = Database(engine, owned=False)
        database.bind_to_loop()
        approvals = ApprovalManager.over(database, RedisCache(None), settings, org_id=options_of(ctx).org)
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
