"""`gateway-store audit`: write events from standard input, find them, follow them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store._text import Shown, call_name, word
from agent_gateway_store.cli.context import open_store, run
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.filters import filtered
from agent_gateway_store.cli.ingest import Line, ingest
from agent_gateway_store.cli.output import JsonOption, print_fields, print_json, print_page, record, say, tidy, to_json

if TYPE_CHECKING:
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.results import Page, Stats

__all__ = ["app", "print_events"]

app = typer.Typer(no_args_is_help=True, help="Write, find and follow audit events.")

_HEADINGS = {"latency_p50_ms": "p50 ms", "latency_p95_ms": "p95 ms", "latency_p99_ms": "p99 ms"}
_COLUMNS = {
    "timestamp": "time",
    "caller_id": "caller",
    "tool_call": "tool call",
    "decision": "decision",
    "execution_status": "status",
    "latency_ms": "ms",
    "request_id": "request id",
}


@app.command()
def write(ctx: typer.Context, json: JsonOption = False) -> None:
    """Store audit events from JSON lines on standard input; each line gets its outcome.

    A malformed line is reported with its number and the others are still written; the exit code is then 1. It is 5 if
    an event was lost. A line that names no timestamp is stamped now, so that writing it again is another event.
    """

    def report(line: Line) -> None:
        if json:
            typer.echo(to_json({name: value for name, value in line._asdict().items() if value is not None}))
        else:
            say(" ".join(filter(None, (str(line.line), line.outcome, line.request_id))))

    ingest(ctx, sys.stdin.buffer, report)


@app.command()
@filtered
def search(
    ctx: typer.Context,
    filters: dict[str, Any],
    request_id: Annotated[str | None, typer.Option(help="The one event with this request id, whole.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    cursor: Annotated[
        str | None, typer.Option(help="Where the page before ended; the filters must be the same.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find audit events that match every filter, newest first."""
    if request_id is not None:
        if filters or cursor:
            raise typer.BadParameter("Use --request-id alone.")
        filters, limit = {"request_id": request_id}, 1

    async def work() -> Page[AuditEvent]:
        async with open_store(ctx) as store:
            return await store.audit.search(limit=limit, cursor=cursor, **filters)

    found = run(work())
    if request_id is not None:
        found.next_cursor = None
    if json:
        print_json({"items": found.to_dicts(), "next_cursor": found.next_cursor})
    elif request_id is None:
        print_events(found)
    elif found:
        print_fields((name, value) for name, value in record(found[0]).items() if value not in (None, []))
    if request_id is not None and not found:
        raise CommandError("No event has this request id: check it, and --org if you gave one.", ExitCode.NOT_FOUND)


@app.command()
@filtered
def stats(
    ctx: typer.Context,
    filters: dict[str, Any],
    by: Annotated[
        list[str] | None,
        typer.Option(help="caller_id, tool_name, mcp_server, decision, risk_label, ... (may be given several times)."),
    ] = None,
    bucket: Annotated[str | None, typer.Option(help="Length of time buckets: 15m, 1h, 1d, 1w.")] = None,
    json: JsonOption = False,
) -> None:
    """Count calls, denials, approvals and errors, with latency percentiles in milliseconds."""

    from agent_gateway_store.audit.grouping import bucket_of, columns_of
    from agent_gateway_store.results import Page

    try:
        names, length = columns_of(by), bucket_of(bucket)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None

    async def work() -> Stats:
        async with open_store(ctx) as store:
            return await store.audit.stats(names, length, **filters)

    found = run(work())
    rows = [{**row, "bucket": f"{row['bucket'].isoformat()[:-6]}Z"} if "bucket" in row else row for row in found]
    columns = {name: _HEADINGS.get(name, name) for name in found.columns or ()}
    print_page(Page(rows), columns=columns, as_json=json)


def print_events(events: Page[AuditEvent]) -> None:
    """Print events as a table."""
    from agent_gateway_store.results import Page

    print_page(
        Page([_with_call(event) for event in events], next_cursor=events.next_cursor),
        columns=_COLUMNS,
        whole={"timestamp", "decision", "execution_status", "request_id"},
        optional={"execution_status", "latency_ms", "request_id"},
        as_json=False,
    )


def _with_call(event: AuditEvent) -> dict[str, Any]:
    call = {"server": event.mcp_server, "tool": event.tool_name, "arguments": {}}
    return {**record(event), "tool_call": call}


@app.command()
@filtered
def tail(
    ctx: typer.Context,
    filters: dict[str, Any],
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="Events to show at first.")] = 10,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a database that is away.")] = 60.0,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Go on until Ctrl-C.")] = True,
    json: JsonOption = False,
) -> None:
    """Show the newest audit events, then new ones in the order of their commits, each once; Ctrl-C ends it."""

    async def work() -> None:
        async with open_store(ctx) as store:
            # First the place, then the list: what is committed between the two is in both.
            start = (await store.audit.changes(**filters)).next_cursor
            first = await store.audit.search(limit=lines, **filters) if lines else []
            _print_lines(first[::-1], as_json=json)
            if not follow or start is None:
                return
            shown = {event.id for event in first}
            async for event in store.audit.follow(start=start, poll_s=interval, patience_s=patience, **filters):
                if event.id not in shown:
                    _print_lines([event], as_json=json)

    try:
        run(work())
    except KeyboardInterrupt:
        return


def _print_lines(events: Sequence[AuditEvent], *, as_json: bool) -> None:
    for event in events:
        if as_json:
            typer.echo(to_json(record(event)))
        else:
            ran = f"{event.execution_status} {event.latency_ms} ms" if event.execution_status else "not executed"
            stamp = tidy("timestamp", record(event)["timestamp"])
            call = call_name(event.mcp_server, event.tool_name)
            say(Shown("  ".join((stamp, event.decision, word(event.caller_id), call, ran, word(event.request_id)))))
    sys.stdout.flush()
