"""`gateway-store audit`: write events from standard input, find them, follow them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.ingest import Line, ingest
from agent_gateway_store.cli.output import JsonOption, print_fields, print_json, print_page, record, say, tidy, to_json
from agent_gateway_store.cli.running import choose, open_store, run

if TYPE_CHECKING:
    from agent_gateway_store.models import AuditEvent
    from agent_gateway_store.results import Page
    from agent_gateway_store.store import GatewayStore

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Write, find and follow audit events.")

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
def search(
    ctx: typer.Context,
    caller: Annotated[str | None, typer.Option(help="Events of this caller.")] = None,
    decision: Annotated[
        str | None, typer.Option(help="Events with this decision: ALLOW, DENY, APPROVAL_REQUIRED, SANITIZE_AND_ALLOW.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="The one event with this request id, whole.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    json: JsonOption = False,
) -> None:
    """Find audit events, newest first; takes one filter at a time."""
    from agent_gateway_store.models import Decision

    if sum(given is not None for given in (caller, decision, request_id)) > 1:
        raise typer.BadParameter("Use one of --caller, --decision and --request-id.")
    wanted = None if decision is None else choose(Decision, decision, "--decision")

    async def work() -> Page[AuditEvent]:
        from agent_gateway_store.results import Page

        async with open_store(ctx) as store:
            if caller is not None:
                return await store.audit.list_by_caller(caller, limit=limit)
            if wanted is not None:
                return await store.audit.list_by_decision(wanted, limit=limit)
            if request_id is None:
                return await store.audit.list_recent(limit)
            found = await store.audit.get_by_request_id(request_id)
            return Page([] if found is None else [found])

    found = run(work())
    if json:
        print_json({"items": found.to_dicts(), "next_cursor": found.next_cursor})
    elif request_id is not None and found:
        print_fields((name, value) for name, value in record(found[0]).items() if value not in (None, []))
    else:
        print_events(found)


def print_events(events: Page[AuditEvent]) -> None:
    """Print events as a table."""
    from agent_gateway_store.results import Page

    print_page(
        Page([_with_call(event) for event in events]),
        columns=_COLUMNS,
        whole={"timestamp", "decision", "execution_status", "request_id"},
        optional={"execution_status", "latency_ms", "request_id"},
        as_json=False,
    )


def _with_call(event: AuditEvent) -> dict[str, Any]:
    call = {"server": event.mcp_server, "tool": event.tool_name, "arguments": {}}
    return {**record(event), "tool_call": call}


@app.command()
def tail(
    ctx: typer.Context,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="Events to show at first.")] = 10,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    follow: Annotated[bool, typer.Option(help="Go on until Ctrl-C.")] = True,
    json: JsonOption = False,
) -> None:
    """Show the newest audit events, then those that are added, oldest first; Ctrl-C ends it."""

    async def work() -> None:
        import asyncio

        async with open_store(ctx) as store:
            window = _Window(store)
            first = await window.advance(at_least=lines)
            _print_lines(first[-lines:] if lines else [], as_json=json)
            while follow:
                await asyncio.sleep(interval)
                _print_lines(await window.advance(), as_json=json)

    try:
        run(work())
    except KeyboardInterrupt:
        return


def _print_lines(events: list[AuditEvent], *, as_json: bool) -> None:
    for event in events:
        if as_json:
            typer.echo(to_json(record(event)))
        else:
            ran = f"{event.execution_status} {event.latency_ms} ms" if event.execution_status else "not executed"
            stamp = tidy("timestamp", record(event)["timestamp"])
            call = f"{event.mcp_server}.{event.tool_name}"
            say("  ".join((stamp, event.decision, event.caller_id, call, ran, event.request_id)))
    sys.stdout.flush()


class _Window:
    """The newest events, by which those added since the last look are told.

    An event whose timestamp lies before the last 200 of the look before is not noticed.
    """

    _SIZE = 200

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._seen: set[int | None] | None = None
        self._floor: tuple[Any, int] | None = None

    async def advance(self, *, at_least: int = 0) -> list[AuditEvent]:
        """Return what is new since the last call (at the first: what is there), oldest first."""
        size = max(self._SIZE, at_least)
        while True:
            page = await self._store.audit.list_recent(size)
            above = [event for event in page if self._floor is None or _place(event) > self._floor]
            if self._seen is None or len(above) < size:
                break
            # All of them are new, so there may be more behind them.
            size *= 2
        new = [event for event in above if self._seen is None or event.id not in self._seen]
        if len(page) >= self._SIZE:
            self._floor = _place(page[self._SIZE - 1])
        self._seen = {event.id for event in page}
        return new[::-1]


def _place(event: AuditEvent) -> tuple[Any, int]:
    return event.timestamp, event.id or 0
