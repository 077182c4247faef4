"""`gateway-store doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from agent_gateway_store._text import code_text, describe, word
from agent_gateway_store.cli import plugins
from agent_gateway_store.cli.context import options_of, run, settings_of
from agent_gateway_store.cli.db import engine_for
from agent_gateway_store.cli.errors import ExitCode, explain
from agent_gateway_store.cli.output import JsonOption, complain, print_fields, print_json
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import GatewayStoreError, StoreUnavailableError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.storage.database import Database

app = typer.Typer()

# The largest page of `list_requests`: one read, and recent enough for what can still be found out.
_MAX_USED = 1000
# Chosen: a worker that is restarted, or moved to another machine, is back sooner.
_NOBODY_S = 3600.0


@dataclass
class Report:
    """What was found: facts by subject, what works not as it should, what does not work, and the exit code."""

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    code: ExitCode = ExitCode.OK

    def warning(self, text: str) -> None:
        """Note a warning."""
        self.warnings.append(text)

    def problem(self, text: str, code: ExitCode = ExitCode.ERROR) -> None:
        """Note a problem; of several exit codes that of a dependency that is down wins."""
        self.problems.append(text)
        self.code = max(self.code, code)

    @asynccontextmanager
    async def noting_errors(self) -> AsyncIterator[None]:
        """Note an error of one check as a problem, so that the other checks still run."""
        try:
            yield
        except Exception as exc:
            self.problem(*explain(exc))

    def flat(self) -> Iterator[tuple[str, Any]]:
        """Yield the facts as names and values for people."""
        for subject, fact in self.facts.items():
            if not isinstance(fact, dict):
                yield subject, fact
                continue
            for name, value in fact.items():
                yield f"{subject} {name.replace('_', ' ')}", "none" if value in (None, []) else value


@app.command()
def doctor(ctx: typer.Context, json: JsonOption = False) -> None:
    """Check the package, the database, Redis and the plugins; changes nothing.

    Exit code 5: the database or Redis is down; 1: something else is wrong; 0: all is well, or there are warnings only.
    """
    report = run(_examine(settings_of(ctx), options_of(ctx).org))
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


async def _examine(settings: StoreSettings, org: str | None) -> Report:
    from importlib.metadata import version

    from agent_gateway_store.cli.doctor_database import bound, check_contents, check_database

    report = Report({"version": version("agent-gateway-store")})
    async with report.noting_errors():
        await check_database(report, settings.database_url)
    await _check_redis(report, settings)
    _check_plugins(report, settings)
    _check_signing_key(report, settings)
    if report.facts.get("schema", {}).get("state") == "current":
        async with report.noting_errors(), engine_for(settings.database_url) as engine:
            await check_contents(report, engine, settings, org)
            await _check_approvals(report, engine, settings, org)
            async with bound(engine) as database:
                await _check_notifications(report, database, settings, org)
                await _check_sinks(report, database, org)
    async with report.noting_errors():
        await _check_spool(report, settings)
    return report


async def _check_redis(report: Report, settings: StoreSettings) -> None:
    """Have Redis do what the store asks of it, with a key of our own that is deleted again."""
    from agent_gateway_store.settings import mask_url
    from agent_gateway_store.storage.cache import NO_CLUSTER, REDIS_FAULTS, create_redis
    from agent_gateway_store.storage.pubsub import CHANNEL
    from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache

    if not settings.redis_url:
        report.facts["redis"] = {"state": "off"}
        return
    facts = report.facts["redis"] = {"url": mask_url(settings.redis_url), "state": "down"}
    async with report.noting_errors():
        async with aclosing(create_redis(settings.redis_url, timeout_s=settings.redis_timeout_seconds)) as client:
            redis = RedisCache(client, timeout_s=settings.redis_timeout_seconds)
            await redis.drop_cluster()
            key = "approval:doctor"
            await redis.get(key)
            await redis.publish(CHANNEL, "doctor")
            is_stored = await redis.put_newer([CacheEntry(key, '{"version": 1}', 1, 1)])
            if is_stored:
                await redis.delete(key)
            refused = "" if is_stored else "it stores nothing: it is full, a replica, or this user may not SET"
            if redis.is_available:
                try:
                    async with client.pubsub() as listener:
                        await listener.subscribe(CHANNEL)
                        await listener.get_message(timeout=settings.redis_timeout_seconds)
                except REDIS_FAULTS as exc:
                    refused = describe(exc)
        # The cache hides a Redis that fails, as the store wants it, so that the failure must be asked for.
        if redis.is_cluster:
            facts["state"] = "cluster"
            report.problem(NO_CLUSTER)
        elif redis.is_available and not refused:
            facts["state"] = "reachable"
        else:
            report.problem(
                f"Redis cannot be used ({code_text(redis.fault or refused)}): check that it runs and that REDIS_URL is "
                "right; the store works without it.",
                ExitCode.UNAVAILABLE,
            )


def _check_plugins(report: Report, settings: StoreSettings) -> None:
    records = plugins.plugin_records(settings)
    report.facts["plugins"] = {record["name"]: record["state"] for record in records}
    for record in records:
        if record["state"] == "broken":
            report.problem(f"Plugin {record['name']} is broken: {record['error']}.")


def _check_signing_key(report: Report, settings: StoreSettings) -> None:
    from agent_gateway_store.evidence.notes import SigningKey

    try:
        if settings.audit_signing_key is not None:
            SigningKey.parse(settings.audit_signing_key.get_secret_value())
    except (GatewayStoreError, ValueError) as exc:
        report.problem(f"AUDIT_SIGNING_KEY: {exc}")


async def _check_approvals(report: Report, engine: AsyncEngine, settings: StoreSettings, org: str | None) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession

    from agent_gateway_store.approval import ApprovalManager

    # Not through an open store, which would replay the spool: this command changes nothing.
    async with AsyncSession(engine) as session:
        used = await ApprovalManager(session, settings=settings, org_id=org).list_requests("USED", limit=_MAX_USED)
    unknown = sum(request.outcome is None for request in used)
    report.facts["approvals"] = {"used_without_outcome": unknown, "used_examined": len(used)}
    if unknown:
        report.warning(
            f"{unknown} of the newest {len(used)} used approvals have no outcome: find out what became of their calls."
        )


async def _check_notifications(report: Report, database: Database, settings: StoreSettings, org: str | None) -> None:
    from agent_gateway_store.delivery import NotificationManager, StoreOutbox
    from agent_gateway_store.hooks.manager import Plugins

    loaded = Plugins().notifiers(settings)
    counts = await NotificationManager(database, StoreOutbox(database, settings), org_id=org).counts()
    away = {row["notifier"]: row for row in counts if row["waiting"] and row["notifier"] not in loaded}
    totals = {name: sum(row[name] for row in counts) for name in ("waiting", "due", "dead")}
    report.facts["notifications"] = {**totals, "not_loaded_here": sorted(away)}
    if totals["dead"]:
        report.warning(f"{totals['dead']} notices were given up: see `gateway-store notifications list --status DEAD`.")
    for name, row in sorted(away.items()):
        waiting = row["waiting"]
        # Where another process had it, those that are due would have been sent.
        is_nowhere = row["due"] and (utc_now() - row["oldest"]).total_seconds() > _NOBODY_S
        note = report.problem if is_nowhere else report.warning
        note(f"{waiting} notices wait for the notifier {name}, which is not loaded here: run a worker that has it.")


async def _check_sinks(report: Report, database: Database, org: str | None) -> None:
    """Find sinks that do not take events, and events that they have refused."""
    from agent_gateway_store.shipping import SinkManager

    sinks = await SinkManager(database, org_id=org).list()
    report.facts["sinks"] = {row["sink"]: {name: row[name] for name in ("lag_s", "dead", "due")} for row in sinks}
    for row in sinks:
        name, error = row["sink"], row["last_error"]
        if row["dead"]:
            report.warning(f"The sink {name} has refused {row['dead']} events: see `gateway-store sinks dead {name}`.")
        if row["lag_s"] is None:
            report.problem(f"The sink {name} cannot go on: {error}")
        elif row["lag_s"] > _NOBODY_S:
            why = f"it says {error!r}" if error else f"see whether `gateway-store audit ship {name}` runs"
            hours = f"{row['lag_s'] / 3600:,.0f} hours"
            report.problem(f"The oldest event that the sink {name} has not taken is {hours} old: {why}.")


async def _check_spool(report: Report, settings: StoreSettings) -> None:
    """Find out whether events could be spooled, and for which databases some wait."""
    from agent_gateway_store.audit.spool import MAX_BYTES, Spool
    from agent_gateway_store.cli.doctor_database import check_modes, free_bytes
    from agent_gateway_store.storage.urls import parse_database_url

    facts: dict[str, Any] = {"mode": settings.audit_mode, "spool_path": str(settings.audit_spool_path)}
    report.facts["audit"] = facts
    check_modes(report, settings.audit_spool_path.parent, settings.audit_spool_path)
    identity = report.facts.get("database", {}).get("identity")
    spool = Spool(settings.audit_spool_path, parse_database_url(settings.database_url)[0], identity)
    try:
        if settings.audit_mode == "spool" or spool.exists:
            await spool.check()
        targets = await spool.targets()
        waiting, quarantined = await spool.counts()
        since = await spool.oldest()
    except StoreUnavailableError as exc:
        strict = settings.audit_mode == "strict"
        effect = "What waits there is not brought in." if strict else "While the database is away events would be lost."
        report.problem(f"{effect} {exc}")
        return
    finally:
        await spool.close()
    facts["disk_free_bytes"] = free = free_bytes(settings.audit_spool_path)
    if free is not None and free < MAX_BYTES:
        report.problem(
            f"The disk of the spool has {free / 2**20:,.0f} MiB left, and the spool may take {MAX_BYTES / 2**20:,.0f}: "
            "make room, or events would be lost in an outage."
        )
    others = [each for each in targets if not spool.is_own(each)]
    facts |= {"spool_waiting": waiting, "spool_quarantined": quarantined}
    facts["spool_other_targets"] = [each._asdict() | {"url": each.url and _shown(each.url)} for each in others]
    if waiting:
        is_stuck = since is not None and (utc_now() - since).total_seconds() > _NOBODY_S
        note = report.problem if is_stuck else report.warning
        note(f"{waiting} events wait in the spool: an open store brings them in while the database answers.")
    if quarantined:
        report.warning(
            f"{quarantined} events are kept in the spool's quarantine: the database refused them, or they were altered "
            "in the spool, or a newer version wrote them. The log of the gateways says at ERROR which it is."
        )
    for each in others:
        place = f", last at {word(_shown(each.url))}" if each.url else ""
        report.warning(
            f"{each.waiting} events wait in the spool for another database ({word(each.target)}{place}), and "
            f"{each.quarantined} are quarantined: a store open on it brings them in; if this one replaces it, run "
            f"`gateway-store audit adopt {quote(each.target)}`."
        )


def _shown(url: str) -> str:
    """Return the URL of a spooled row as people write it: where it has no port, a colon stands in it all the same."""
    scheme, _, rest = url.partition("://")
    server, _, name = rest.partition("/")
    return f"{scheme}://{server.removesuffix(':')}/{name}"
