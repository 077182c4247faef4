"""`gateway-store audit`: write events from standard input, find them, follow them."""

from __future__ import annotations

import inspect
import json as jsonlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent_gateway_store._text import Shown, call_name, word
from agent_gateway_store.cli.context import in_store, open_blocking_store, read_store
from agent_gateway_store.cli.errors import CommandError, ExitCode, describe_validation
from agent_gateway_store.cli.output import (
    JsonOption,
    complain,
    field_text,
    print_fields,
    print_json,
    print_page,
    print_result,
    say,
    to_dict,
    to_json,
)

if TYPE_CHECKING:
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.results import Page
    from agent_gateway_store.store import GatewayStore

app = typer.Typer(name="audit", no_args_is_help=True, help="Write, find and follow audit events.")

_HEADINGS = {"latency_p50_ms": "p50 ms", "latency_p95_ms": "p95 ms", "latency_p99_ms": "p99 ms"}
GroupOption = Annotated[
    list[str] | None,
    typer.Option(help="caller_id, tool_name, weekday, ... (may be given several times); a wrong one names them all."),
]
BucketOption = Annotated[str | None, typer.Option(help="Length of time buckets: 15m, 1h, 1d, 1w.")]
ZoneOption = Annotated[
    str | None, typer.Option(help="Whose hours and days these are, such as Europe/Berlin; default: UTC.")
]
_COLUMNS = {
    "timestamp": "time",
    "caller_id": "caller",
    "tool_call": "tool call",
    "decision": "decision",
    "execution_status": "status",
    "latency_ms": "ms",
    "request_id": "request id",
}

_INVALID = "INVALID"
_MANY = "may be given several times"
_OPTIONS: dict[str, tuple[str, str]] = {
    "caller_id": ("--caller", f"Events of this caller ({_MANY}, as the next ones)."),
    "decision": ("--decision", "ALLOW, DENY, APPROVAL_REQUIRED or SANITIZE_AND_ALLOW."),
    "tool_name": ("--tool", "Calls of this tool."),
    "mcp_server": ("--server", "Calls to this server."),
    "org_id": ("--org-id", "Events of this organisation, in a store that sees several."),
    "environment": ("--environment", "prod, dev, ..."),
    "session_id": ("--session", "Events of this session."),
    "trace_id": ("--trace", "Events of this trace."),
    "parent_request_id": ("--parent", "Calls that the call with this request id led to."),
    "key_id": ("--key", "Calls under this API key id."),
    "approver_id": ("--approver", "Calls that this approver decided."),
    "approval_id": ("--approval", "Calls that this approval released."),
    "raw_args_hash": ("--args-hash", "Calls with these arguments, by their raw_args_hash."),
    "risk_label": ("--label", "Events with this risk label."),
    "execution_status": ("--status", "SUCCESS, TOOL_ERROR, TIMEOUT, CANCELLED or APPROVED_OUTPUT_RELEASE."),
    "output_decision": ("--output-decision", "ALLOW, REDACT, APPROVAL_REQUIRED or DENY."),
    "min_risk_score": ("--min-risk-score", "This risk score or a higher one."),
    "since": ("--since", "From this time on: 24h or 7d ago, or 2026-05-01T12:00Z."),
    "until": ("--until", "Before this time."),
    "text": ("--text", "Text in the tool name or the rationale, in upper or lower case."),
}
# The other filters take several values.
_SINGLE: dict[str, Any] = {"min_risk_score": float | None, **dict.fromkeys(("since", "until", "text"), str | None)}


def filter_options(
    known: dict[str, tuple[str, str]], check: Callable[[dict[str, Any]], object], *, capitals: Sequence[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what gives a command an option for each known filter; its argument `filters` receives those given.

    `check` refuses wrong values before the store is opened; values of `capitals` are made capitals.
    """

    def filtered(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(*args: Any, **given: Any) -> None:
            filters = {name: given.pop(name) for name in known}
            for name in capitals:
                filters[name] = [each.upper() for each in filters[name] or ()]
            filters = {name: value for name, value in filters.items() if value not in (None, [])}
            try:
                check(filters)
            except ValueError as exc:
                raise typer.BadParameter(str(exc)) from None
            command(*args, filters=filters, **given)

        # Typer reads the options of a command from its signature.
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.name != "filters"]
        only = inspect.Parameter.KEYWORD_ONLY
        hints = {
            name: Annotated[_SINGLE.get(name, list[str] | None), typer.Option(flag, help=text)]
            for name, (flag, text) in known.items()
        }
        options = [inspect.Parameter(name, only, default=None, annotation=hint) for name, hint in hints.items()]
        with_options.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*(each.replace(kind=only) for each in own), *options]
        )
        return with_options

    return filtered


def _check(filters: dict[str, Any]) -> None:
    from agent_gateway_store.audit.filters import criteria

    criteria(filters, org_id=None)


filtered = filter_options(_OPTIONS, _check, capitals=("decision", "execution_status", "output_decision"))


def require_none_lost(count: int) -> None:
    """Raise CommandError if events were lost."""
    if count:
        raise CommandError(
            f"{count_text(count, 'event')} could not be stored: check the database with `gateway-store doctor`.",
            ExitCode.UNAVAILABLE,
        )


def count_text(number: int, noun: str) -> str:
    """Return `1 event` or `2 events`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _parse_line(text: bytes) -> tuple[AuditEvent | None, str]:
    from pydantic import ValidationError

    from agent_gateway_store.models.audit import AuditEvent

    try:
        fields: Any = jsonlib.loads(text)
    except (RecursionError, ValueError) as exc:
        return None, "nested too deeply" if isinstance(exc, RecursionError) else "not JSON"
    if not isinstance(fields, dict):
        return None, "not a JSON object"
    try:
        return AuditEvent(**fields), ""
    except ValidationError as exc:
        return None, describe_validation(exc)


@app.command()
def write(ctx: typer.Context, json: JsonOption = False) -> None:
    """Store audit events from JSON lines on standard input; each line gets its outcome.

    A malformed line is reported with its number and the others are still written; the exit code is then 1. It is 5 if
    an event was lost. A line without a timestamp is stamped now, so that to write it again stores another event.
    """
    if sys.stdin is None:
        raise CommandError("There is no standard input: give events as lines of JSON to it.", ExitCode.USAGE)
    counts: Counter[str] = Counter()
    # The main thread waits for input and for Ctrl-C, while the store's loop runs in a thread of its own.
    with open_blocking_store(ctx) as store:
        for number, text in enumerate(sys.stdin.buffer, start=1):
            if not text.strip():
                continue
            event, error = _parse_line(text)
            if event is None:
                complain(f"Line {number} is malformed: {error}.")
                outcome, more = _INVALID, {"error": error}
            else:
                outcome, more = str(store.audit.write(event)), {"request_id": event.request_id}
            counts[outcome] += 1
            if json:
                typer.echo(to_json({"line": number, "outcome": outcome, **more}))
            else:
                say(" ".join(filter(None, (str(number), outcome, more.get("request_id")))))
    if counts["SPOOLED"]:
        complain(f"{count_text(counts['SPOOLED'], 'event')} kept in the local spool until the database is back.")
    require_none_lost(counts["LOST"])
    if counts[_INVALID]:
        raise CommandError(
            f"{count_text(counts[_INVALID], 'malformed line')}: correct and write again; the rest is stored."
        )


@app.command()
def adopt(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(help="What the events wait for, as `gateway-store doctor` names it.")],
    json: JsonOption = False,
) -> None:
    """Bring in events that wait in this machine's spool for another database, such as one that this replaces."""

    async def work(store: GatewayStore) -> dict[str, Any]:
        from agent_gateway_store.audit.spool import Spool
        from agent_gateway_store.storage.identity import read_identity

        engine = store.database.engine
        spool = Spool(store.settings.audit_spool_path, engine.url, await read_identity(engine))
        try:
            adopted = await spool.adopt(target) if spool.exists else 0
        finally:
            await spool.close()
        return {"adopted": adopted, "waiting": await store.audit.flush()}

    found = in_store(ctx, work)
    if not found["adopted"]:
        raise CommandError("No event waits for that: see `gateway-store doctor`.", ExitCode.NOT_FOUND)
    text = f"{count_text(found['adopted'], 'event')} taken over, {found['waiting']:,} still waiting."
    print_result(found, text, as_json=json)


@app.command()
@filtered
def search(
    ctx: typer.Context,
    filters: dict[str, Any],
    request_id: Annotated[str | None, typer.Option(help="The one event with this request id, in full.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    cursor: Annotated[
        str | None, typer.Option(help="Where the previous page ended; the filters must be the same.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find audit events that match every filter, newest first."""
    if request_id is not None:
        if filters or cursor:
            raise typer.BadParameter("Use --request-id alone.")
        filters, limit = {"request_id": request_id}, 1
    found = read_store(ctx, lambda store: store.audit.search(limit=limit, cursor=cursor, **filters), as_json=json)
    # An id names one event, so that there is no next page, though the limit of one was reached.
    if request_id is not None:
        found.next_cursor = None
    if json:
        print_json({"items": found.to_dicts(), "next_cursor": found.next_cursor})
    elif request_id is None:
        _print_events(found)
    elif found:
        print_fields((name, value) for name, value in to_dict(found[0]).items() if value not in (None, [], {}))
    if request_id is not None and not found:
        raise CommandError("No event has this request id: check it, and --org if you gave one.", ExitCode.NOT_FOUND)


def add_stats(
    app: typer.Typer,
    service: Literal["audit", "approvals"],
    filtered: Callable[[Callable[..., None]], Callable[..., None]],
    *,
    groups: Callable[[], Sequence[str]],
    help: str,  # noqa: A002  as Typer has it
) -> None:
    """Add the command `stats` of a service, with the options of `filtered`; `groups` gives the columns of `--by`."""

    @app.command(help=help)
    @filtered
    def stats(
        ctx: typer.Context,
        filters: dict[str, Any],
        by: GroupOption = None,
        bucket: BucketOption = None,
        time_zone: ZoneOption = None,
        json: JsonOption = False,
    ) -> None:
        from agent_gateway_store.results import Page
        from agent_gateway_store.storage.grouping import grouping

        try:
            grouping(by, bucket, time_zone, groups())
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from None
        options: dict[str, Any] = {"bucket": bucket, "time_zone": time_zone, **filters}
        found = read_store(ctx, lambda store: getattr(store, service).stats(by, **options), as_json=json)
        rows = [dict(row) for row in found]
        for row in rows:
            if "bucket" in row:
                row["bucket"] = row["bucket"].isoformat().replace("+00:00", "Z")
        columns = {name: _HEADINGS.get(name, name) for name in found.columns or ()}
        print_page(Page(rows), columns=columns, as_json=json)


def _groups() -> Sequence[str]:
    from agent_gateway_store.audit.selects import GROUPS

    return GROUPS


add_stats(
    app,
    "audit",
    filtered,
    groups=_groups,
    help="Count calls, denials, approvals and errors, with latency percentiles in milliseconds.",
)


def _print_events(events: Page[AuditEvent]) -> None:
    from agent_gateway_store.results import Page

    rows = [
        {**to_dict(event), "tool_call": {"server": event.mcp_server, "tool": event.tool_name, "arguments": {}}}
        for event in events
    ]
    print_page(
        Page(rows, next_cursor=events.next_cursor),
        columns=_COLUMNS,
        whole={"timestamp", "decision", "execution_status", "request_id"},
        optional={"execution_status", "latency_ms", "request_id"},
        as_json=False,
    )


@app.command()
@filtered
def tail(
    ctx: typer.Context,
    filters: dict[str, Any],
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="Newest events to show first.")] = 10,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two reads of the database.")] = 1.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a database that does not answer.")] = 60.0,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Go on until Ctrl-C.")] = True,
    json: JsonOption = False,
) -> None:
    """Show the newest audit events, then new ones in the order of their commits, each once; Ctrl-C ends it."""

    async def work(store: GatewayStore) -> None:
        # First the cursor, then the list: what is committed between the two is in both, and shown once.
        start = (await store.audit.changes(**filters)).next_cursor
        first = await store.audit.search(limit=lines, **filters) if lines else []
        _print_lines(first[::-1], as_json=json)
        if not follow or start is None:
            return
        shown = {event.id for event in first}
        following = store.audit.follow(start=start, poll_s=interval, patience_s=patience, **filters)
        # It must not meet the store closed, where the reader of a pipe is gone.
        async with aclosing(following):
            async for event in following:
                if event.id not in shown:
                    _print_lines([event], as_json=json)

    read_store(ctx, work, as_json=json)


def _print_lines(events: Sequence[AuditEvent], *, as_json: bool) -> None:
    for event in events:
        if as_json:
            typer.echo(to_json(to_dict(event)))
        else:
            ran = f"{event.execution_status} {event.latency_ms} ms" if event.execution_status else "not executed"
            stamp = field_text("timestamp", to_dict(event)["timestamp"])
            call = call_name(event.mcp_server, event.tool_name)
            say(Shown("  ".join((stamp, event.decision, word(event.caller_id), call, ran, word(event.request_id)))))
    # The reader of a pipe must receive an event now, not when Python's buffer is full.
    sys.stdout.flush()
